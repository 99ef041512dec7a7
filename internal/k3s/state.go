package k3s

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/hearth-sh/hearth/api/v1alpha1"
	"github.com/hearth-sh/hearth/internal/bootstrap/fault"
	"github.com/hearth-sh/hearth/internal/host"
)

// maxMarker bounds the marker file.
const maxMarker = 4 << 10

// Marker says which generation of which cluster the data on disk belongs to. It
// is written before k3s first starts, so data without it is somebody else's.
type Marker struct {
	Cluster    string            `json:"cluster"`
	Generation int               `json:"generation"`
	Role       v1alpha1.NodeRole `json:"role"`
	// Node is the instance's ID: a disk that was copied to another instance has
	// another node's identity on it.
	Node string `json:"node"`
	// CAHash is the one in the generation's tokens.
	CAHash string `json:"caHash,omitempty"`
}

// File is the marker as a file to install before the first start.
func (m Marker) File(p Paths) (host.File, error) {
	if err := m.check(); err != nil {
		return host.File{}, err
	}
	b, err := json.Marshal(m)
	return host.File{Path: p.Marker, Content: append(b, '\n'), Mode: 0o644, Reason: "which cluster the data of k3s belongs to"}, err
}

func (m Marker) check() error {
	if m.Cluster == "" || m.Generation < 1 || m.Node == "" || m.Role != v1alpha1.RoleServer && m.Role != v1alpha1.RoleAgent {
		return fmt.Errorf("a marker needs cluster, generation, role and node, and this one is %+v", m)
	}
	return nil
}

// ParseMarker reads a marker strictly.
func ParseMarker(b []byte) (Marker, error) {
	d := json.NewDecoder(bytes.NewReader(b))
	d.DisallowUnknownFields()
	var m Marker
	if err := d.Decode(&m); err != nil {
		return Marker{}, fmt.Errorf("the marker of the cluster's generation is no valid JSON: %w", err)
	}
	if d.More() {
		return Marker{}, errors.New("the marker of the cluster's generation has something after its end")
	}
	return m, m.check()
}

// State is what is on disk.
type State struct {
	// Binary says that the program is there.
	Binary bool
	// Extracted says that k3s has unpacked its programs, which its first start
	// after an image was made need not do then.
	Extracted bool
	// ServerData and AgentData say that k3s has run as one or the other.
	ServerData, AgentData bool
	// Etcd says that this server is, or was, a member of a cluster; k3s then
	// ignores cluster-init and server.
	Etcd bool
	// Marker is nil if there is none.
	Marker *Marker
	// OtherConfig are configuration files that are not bootstrap's. Those after
	// its own in the order of names win over it.
	OtherConfig []string
}

// ReadState looks below a root directory ("/" for the machine itself). It runs
// nothing.
func ReadState(root string, p Paths) (State, error) {
	at := func(name string) string { return filepath.Join(root, name) }
	s := State{
		Binary: exists(at(Binary)), Extracted: exists(at(p.DataDir + "/data/current")),
		ServerData: exists(at(p.DataDir + "/server/db")), AgentData: exists(at(p.KubeletKubeconfig)), Etcd: exists(at(p.EtcdDir + "/member")),
	}
	b, err := readBounded(at(p.Marker))
	if err == nil {
		var m Marker
		if m, err = ParseMarker(b); err == nil {
			s.Marker = &m
		}
	}
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return s, fault.New(CodeState, err, "bootstrap reset clears the machine", "reading %s failed", p.Marker)
	}
	if exists(at(ConfigFile)) {
		s.OtherConfig = append(s.OtherConfig, ConfigFile)
	}
	entries, err := os.ReadDir(at(ConfigDir))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return s, fault.New(CodeState, err, "see the cause", "reading %s failed", ConfigDir)
	}
	for _, e := range entries {
		name := ConfigDir + "/" + e.Name()
		if (strings.HasSuffix(name, ".yaml") || strings.HasSuffix(name, ".yml")) && !slices.Contains([]string{HearthConfig, ExtraConfig}, name) {
			s.OtherConfig = append(s.OtherConfig, name)
		}
	}
	return s, nil
}

func exists(name string) bool { _, err := os.Lstat(name); return err == nil }

func readBounded(name string) ([]byte, error) {
	f, err := os.Open(name)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return io.ReadAll(io.LimitReader(f, maxMarker))
}
