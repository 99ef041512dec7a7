package cluster

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"time"
)

// AuditEntry is what the API server's audit log says of one answered request:
// the fields of audit.k8s.io/v1 Event at level Metadata that tests ask for.
type AuditEntry struct {
	Stage                    string     `json:"stage"` // ResponseStarted (watches), ResponseComplete, Panic
	RequestURI               string     `json:"requestURI"`
	Verb                     string     `json:"verb"`
	User                     AuditUser  `json:"user"`
	ImpersonatedUser         *AuditUser `json:"impersonatedUser"`
	SourceIPs                []string   `json:"sourceIPs"`
	UserAgent                string     `json:"userAgent"`
	RequestReceivedTimestamp time.Time  `json:"requestReceivedTimestamp"`
	ObjectRef                struct {
		Resource    string `json:"resource"`
		Namespace   string `json:"namespace"`
		Name        string `json:"name"`
		APIGroup    string `json:"apiGroup"`
		Subresource string `json:"subresource"`
	} `json:"objectRef"`
	ResponseStatus struct {
		Code   int    `json:"code"`
		Reason string `json:"reason"`
	} `json:"responseStatus"`
	Annotations map[string]string `json:"annotations"`
}

// AuditUser is who asked.
type AuditUser struct {
	Username string              `json:"username"`
	Groups   []string            `json:"groups"`
	Extra    map[string][]string `json:"extra"`
}

// Write says whether the request would change something.
func (e AuditEntry) Write() bool {
	switch e.Verb {
	case "create", "update", "patch", "delete", "deletecollection":
		return true
	}
	return false
}

func (c *Cluster) auditLog() string { return filepath.Join(c.dir, "logs", "audit.json") }

// AuditEntries returns every request that was answered so far, oldest first.
// A request is in it before its answer is sent.
func (c *Cluster) AuditEntries() ([]AuditEntry, error) {
	file, err := os.Open(c.auditLog())
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	defer file.Close()
	var out []AuditEntry
	lines := bufio.NewReader(file)
	for {
		line, err := lines.ReadBytes('\n')
		if errors.Is(err, io.EOF) {
			return out, nil // a last line without its end is being written
		}
		if err != nil {
			return out, err
		}
		var entry AuditEntry
		if err := json.Unmarshal(line, &entry); err != nil {
			return out, fmt.Errorf("reading the audit log: %w", err)
		}
		out = append(out, entry)
	}
}
