package bootstrap

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/json"
	"fmt"
	"maps"
	"math/big"
	"net"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/hearth-sh/hearth/internal/k3s/election"
	"github.com/hearth-sh/hearth/internal/k3s/pki"
)

// nodeList is an API server that has nothing but Nodes, and takes orders from
// administrators alone.
type nodeList struct {
	url string

	mu      sync.Mutex
	nodes   map[string]string // addresses by name
	list    int               // status of the list of Nodes
	refuse  int               // status of deletions; 0 for success
	subject pkix.Name         // of whom it heard last
}

func newNodeList(t *testing.T, a *pki.Authorities, nodes map[string]string) *nodeList {
	t.Helper()
	files, err := a.Files()
	if err != nil {
		t.Fatal(err)
	}
	content := map[string][]byte{}
	for _, f := range files {
		content[f.Path] = f.Data
	}
	issuer, err := tls.X509KeyPair(content["server-ca.crt"], content["server-ca.key"])
	if err != nil {
		t.Fatal(err)
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	der, err := x509.CreateCertificate(rand.Reader, &x509.Certificate{
		SerialNumber: big.NewInt(2), NotBefore: time.Now().Add(-time.Minute), NotAfter: time.Now().Add(time.Hour),
		IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)}, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
	}, issuer.Leaf, key.Public(), issuer.PrivateKey)
	if err != nil {
		t.Fatal(err)
	}
	clients, err := pki.Pool(content["client-ca.crt"])
	if err != nil {
		t.Fatal(err)
	}
	n := &nodeList{nodes: nodes, list: http.StatusOK}
	server := httptest.NewUnstartedServer(n)
	server.TLS = &tls.Config{
		Certificates: []tls.Certificate{{Certificate: [][]byte{der}, PrivateKey: key}}, MinVersion: tls.VersionTLS12,
		ClientAuth: tls.RequireAndVerifyClientCert, ClientCAs: clients,
	}
	server.StartTLS()
	t.Cleanup(server.Close)
	n.url = server.URL
	return n
}

func (n *nodeList) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.subject = r.TLS.PeerCertificates[0].Subject
	name, one := strings.CutPrefix(r.URL.Path, "/api/v1/nodes/")
	switch {
	case r.Method == http.MethodDelete && one && n.refuse != 0:
		w.WriteHeader(n.refuse)
	case r.Method == http.MethodDelete && one:
		delete(n.nodes, name)
	case r.Method == http.MethodGet && r.URL.Path == "/api/v1/nodes" && r.URL.Query().Get("labelSelector") == "node-role.kubernetes.io/control-plane=true":
		if n.list != http.StatusOK {
			w.WriteHeader(n.list)
			_, _ = w.Write([]byte("<html>"))
			return
		}
		type object = map[string]any
		items := []object{}
		for _, name := range slices.Sorted(maps.Keys(n.nodes)) {
			items = append(items, object{"metadata": object{"name": name}, "status": object{"addresses": []object{
				{"type": "Hostname", "address": name}, {"type": "InternalIP", "address": n.nodes[name]}, {"type": "InternalIP", "address": "fd00::1"},
			}}})
		}
		_ = json.NewEncoder(w).Encode(object{"kind": "NodeList", "items": items})
	default:
		w.WriteHeader(http.StatusNotFound)
	}
}

// TestOnlyServersThatAreGoneAreRemoved: a Node that is deleted takes its member
// of etcd along, so every doubt keeps it, and is said.
func TestOnlyServersThatAreGoneAreRemoved(t *testing.T) {
	authorities, err := pki.Generate(time.Now())
	if err != nil {
		t.Fatal(err)
	}
	const self, alive, silent, gone, unknown = "i-self", "i-alive", "i-silent", "i-gone", "i-unknown"
	for name, tt := range map[string]struct {
		nodes        []string
		list, refuse int
		want         []string // nodes that are left
		warning      string
	}{
		"nobody else":                            {nodes: []string{self}, want: []string{self}},
		"a server that answers":                  {nodes: []string{alive}, want: []string{alive}},
		"a terminated server":                    {nodes: []string{alive, gone}, want: []string{alive}},
		"a server that does not answer":          {nodes: []string{alive, silent}, want: []string{alive, silent}, warning: "server i-silent does not answer; its instance exists"},
		"a server that EC2 says nothing about":   {nodes: []string{unknown, gone}, want: []string{unknown}, warning: "kubectl delete node i-unknown"},
		"an API server that is not ready":        {nodes: []string{gone}, list: http.StatusServiceUnavailable, want: []string{gone}, warning: "dead servers were not looked for"},
		"an API server that keeps its Node":      {nodes: []string{gone}, refuse: http.StatusForbidden, want: []string{gone}, warning: "the terminated server i-gone was not removed: the API server answers 403"},
		"this machine's own Node of an old life": {nodes: []string{self, gone}, want: []string{self}},
	} {
		t.Run(name, func(t *testing.T) {
			nodes := map[string]string{}
			for i, n := range tt.nodes {
				nodes[n] = fmt.Sprintf("10.0.0.%d", i+1)
			}
			server := newNodeList(t, authorities, maps.Clone(nodes))
			if tt.list != 0 {
				server.list = tt.list
			}
			server.refuse = tt.refuse
			api, err := newAPI(server.url, election.Credentials{Authorities: authorities, ServerCA: authorities.ServerCA()})
			if err != nil {
				t.Fatal(err)
			}
			defer api.close()
			rec, _ := newRecorder(t.TempDir())
			census{
				self: self, rec: rec,
				answers: func(_ context.Context, address string) bool { return address == nodes[alive] && address != "" },
				state: func(_ context.Context, id string) (instanceState, error) {
					switch id {
					case gone:
						return instanceGone, nil
					case silent:
						return instanceAlive, nil
					case unknown:
						return "", errPlain
					}
					return "", fmt.Errorf("EC2 was asked about %s", id)
				},
			}.removeDead(t.Context(), api)

			server.mu.Lock()
			defer server.mu.Unlock()
			if left := slices.Sorted(maps.Keys(server.nodes)); !slices.Equal(left, slices.Sorted(slices.Values(tt.want))) {
				t.Errorf("the nodes left are %q, not %q", left, tt.want)
			}
			if !slices.Contains(server.subject.Organization, "system:masters") {
				t.Errorf("the API server was asked as %s", server.subject)
			}
			warnings := strings.Join(rec.result.Warnings, "\n")
			if tt.warning == "" && warnings != "" || !strings.Contains(warnings, tt.warning) {
				t.Errorf("the warnings are %q, not %q", warnings, tt.warning)
			}
			if rec.result.Changed != (len(server.nodes) < len(nodes)) {
				t.Errorf("changed: %t", rec.result.Changed)
			}
		})
	}
}

func TestAServerOfAnotherAuthorityIsNotAsked(t *testing.T) {
	ours, err := pki.Generate(time.Now())
	if err != nil {
		t.Fatal(err)
	}
	theirs, err := pki.Generate(time.Now())
	if err != nil {
		t.Fatal(err)
	}
	server := newNodeList(t, theirs, map[string]string{"i-gone": "10.0.0.1"})
	api, err := newAPI(server.url, election.Credentials{Authorities: ours, ServerCA: ours.ServerCA()})
	if err != nil {
		t.Fatal(err)
	}
	defer api.close()
	if servers, err := api.servers(t.Context()); err == nil {
		t.Errorf("it said %v", servers)
	}
	if _, err := newAPI(server.url, election.Credentials{ServerCA: ours.ServerCA()}); err == nil {
		t.Error("an agent, which has no authorities, could have asked")
	}
}
