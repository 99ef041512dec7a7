package election

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/hearth-sh/hearth/internal/bootstrap/fault"
	"github.com/hearth-sh/hearth/internal/k3s/pki"
)

func TestAddresses(t *testing.T) {
	for address, ok := range map[string]bool{
		"10.0.0.1": true, "fd00::1": true, "k3s.example": true, "ip-10-0-0-1.eu-central-1.compute.internal": true,
		"": false, "10.0.0.1:6443": false, "[fd00::1]": false, "fe80::1%eth0": false, "https://x": false, "a b": false, "-x": false, ".": false, "x\n": false, strings.Repeat("x", 254): false,
	} {
		if err := checkAddress(address); (err == nil) != ok {
			t.Errorf("%q: %v", address, err)
		}
	}
}

// FuzzRecords reads what anybody with access to the store could have written.
func FuzzRecords(f *testing.F) {
	for _, seed := range []string{
		`{"holder":"i-1","nonce":"n","started":"2026-07-01T00:00:00Z","restore":{"from":1,"snapshot":"s"}}`,
		`{"outcome":"founded","by":"i-1","nonce":"n","address":"10.0.0.1"}`,
		`{"address":"10.0.0.1","left":true}`,
		`{"serverCA":"x","agentToken":"K10"}`,
	} {
		f.Add([]byte(seed))
	}
	r := &records{store: NewDirectory("/nonexistent"), patience: time.Second}
	f.Fuzz(func(t *testing.T, b []byte) {
		holder, err := decode[holderRecord](r, "holder", b)
		if err == nil && (holder.Holder == "" || holder.Nonce == "" || holder.Restore != nil && holder.Restore.Generation < 1) {
			t.Fatalf("accepted %+v", holder)
		}
		if err != nil && fault.CodeOf(err) != CodeCorrupt {
			t.Fatalf("unclassified: %v", err)
		}
		if out, err := decode[outcomeRecord](r, "outcome", b); err == nil && out.Outcome == founded && checkAddress(out.Address) != nil {
			t.Fatalf("accepted %+v", out)
		}
		if m, err := decode[memberRecord](r, "member", b); err == nil && strings.ContainsAny(m.Address, "/ \n") {
			t.Fatalf("accepted %+v", m)
		}
		var server serverRecord
		if unmarshal(b, &server) == nil {
			if c, err := server.credentials(); err == nil && c.Authorities == nil {
				t.Fatal("no authorities")
			}
		}
		var agent agentRecord
		if unmarshal(b, &agent) == nil {
			if c, err := agent.credentials(); err == nil && errors.Is(c.AgentToken.VerifyCA(c.ServerCA), pki.ErrCAMismatch) {
				t.Fatal("token and CA do not belong together")
			}
		}
	})
}

func FuzzFileState(f *testing.F) {
	f.Add([]byte(`{"store":"s3://b/p","instance":"i-1","generation":1,"phase":"holding","nonce":"n"}`))
	f.Add([]byte(`{}`))
	file := filepath.Join(f.TempDir(), "election.json")
	f.Fuzz(func(t *testing.T, b []byte) {
		if err := os.WriteFile(file, b, 0o600); err != nil {
			t.Fatal(err)
		}
		m, err := NewFileState(file).Load()
		if err != nil && fault.CodeOf(err) != CodeState {
			t.Fatalf("unclassified: %v", err)
		}
		if err == nil && m.Phase == PhaseHolding && (m.Nonce == "" || m.Generation < 1) {
			t.Fatalf("accepted %+v", m)
		}
	})
}

func FuzzOpen(f *testing.F) {
	f.Add("s3://bucket/prefix")
	f.Add("ssm:///path")
	f.Add("file:///path")
	f.Fuzz(func(t *testing.T, location string) {
		s, err := Open(location, OpenOptions{})
		if err != nil {
			if fault.CodeOf(err) != CodeLocation {
				t.Fatalf("unclassified: %v", err)
			}
			return
		}
		if bytes.Contains([]byte(s.Location()), []byte("..//")) {
			t.Fatalf("%q became %q", location, s.Location())
		}
	})
}
