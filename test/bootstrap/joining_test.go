package bootstrap_test

import (
	"encoding/json"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/hearth-sh/hearth/internal/bootstrap"
	"github.com/hearth-sh/hearth/internal/bootstrap/fault"
	"github.com/hearth-sh/hearth/internal/imds/imdstest"
	"github.com/hearth-sh/hearth/internal/k3s/join"
	"github.com/hearth-sh/hearth/test/machine"
)

// copyRecords gives another cluster's store the records of this lab's, each as
// change leaves it.
func (l *lab) copyRecords(t *testing.T, to string, change func(key string, record map[string]any)) {
	t.Helper()
	for _, key := range l.keys(t, stateBucket) {
		below, ours := strings.CutPrefix(key, l.name+"/")
		if !ours {
			continue
		}
		content := l.object(t, stateBucket, key)
		var record map[string]any
		if err := json.Unmarshal(content, &record); err != nil {
			t.Fatalf("%s: %v", key, err)
		}
		change(below, record)
		changed, err := json.Marshal(record)
		if err != nil {
			t.Fatal(err)
		}
		if err := l.put(t.Context(), stateBucket, to+"/"+below, changed); err != nil {
			t.Fatal(err)
		}
	}
}

// whyNobodyJoins has a machine meet everything that can be wrong when a server
// that runs is joined. k3s itself would wait without an end for each of them.
func (l *lab) whyNobodyJoins(t *testing.T, server, worker, joiner *machine.Machine) {
	as := func(id string) func(*testing.T) {
		return func(t *testing.T) {
			before := joiner.InstanceID
			joiner.IMDS.Update(func(c *imdstest.Config) { c.InstanceID = id })
			t.Cleanup(func() { joiner.IMDS.Update(func(c *imdstest.Config) { c.InstanceID = before }) })
		}
	}
	// Nobody has it: machines' addresses begin elsewhere.
	host := netip.MustParseAddr(l.network.HostIP()).As4()
	nobody := netip.AddrFrom4([4]byte{host[0], host[1], host[2], 250}).String()
	never := l.insteadOfK3s(l.name+"-never", []byte(exiting), []byte(exiting))
	const newer = "v1.99.0+k3s1"
	for _, tc := range []struct {
		name, pool string
		change     func(key string, record map[string]any)
		before     func(*testing.T)
		version    string
		codes      []fault.Code
		mentions   string
	}{
		{
			name: "a server that cannot be reached", pool: "wasm", mentions: nobody,
			change: func(_ string, record map[string]any) {
				if _, ok := record["address"]; ok {
					record["address"] = nobody
				}
			},
			// Silence, or a router's or the kernel's word.
			codes: []fault.Code{join.CodeConnectTimeout, join.CodeNoRoute},
		},
		{
			name: "a server of another cluster", pool: "wasm", mentions: server.IP,
			before: func(t *testing.T) { l.foundedElsewhere(t, "joining-a-server-of-another-cluster", server.IP) },
			codes:  []fault.Code{join.CodeCAMismatch},
		},
		{
			name: "a token that was changed", pool: "wasm", mentions: "token",
			change: func(_ string, record map[string]any) {
				if token, ok := record["agentToken"].(string); ok {
					last := "0"
					if strings.HasSuffix(token, last) {
						last = "1"
					}
					record["agentToken"] = token[:len(token)-1] + last
				}
			},
			codes: []fault.Code{join.CodeBadToken},
		},
		{
			name: "a name that another machine has", pool: "wasm", mentions: worker.InstanceID,
			before: as(worker.InstanceID), codes: []fault.Code{join.CodeNodeClash},
		},
		{
			name: "a k3s that is newer than the server's", pool: "wasm", mentions: newer, version: newer, codes: []fault.Code{join.CodeVersionSkew},
		},
		{
			name: "a server whose etcd does not answer", pool: "control-plane", mentions: server.IP,
			before: func(t *testing.T) {
				if l.k3s.Real {
					t.Skip("its etcd is part of it and cannot be stopped alone")
				}
				signal := func(name string) {
					if out, err := server.Exec(t.Context(), "pkill", "-"+name, "-x", "etcd"); err != nil {
						t.Fatalf("%v: %s", err, out)
					}
				}
				signal("STOP")
				t.Cleanup(func() { _, _ = server.Exec(boundedBy(t, time.Minute), "pkill", "-CONT", "-x", "etcd") })
			},
			// After some ten seconds, which is how long it is tried, k3s ends: it
			// could not renew its leases.
			codes: []fault.Code{join.CodeNotReady, join.CodeRefused},
		},
	} {
		t.Run(tc.name, func(t *testing.T) {
			store := "joining-" + strings.ReplaceAll(tc.name, " ", "-")
			if !slices.Contains(tc.codes, join.CodeCAMismatch) {
				l.copyRecords(t, store, func(key string, record map[string]any) {
					if tc.change != nil {
						tc.change(key, record)
					}
				})
			}
			if tc.before != nil {
				tc.before(t)
			}
			config := l.spec(tc.pool, store, never+l.rest(""))
			if tc.version != "" {
				config = strings.ReplaceAll(config, l.k3s.Version, tc.version) + "  registries: {systemDefault: images.hearth.test}\n"
			}
			a := attempt{config: config, stateDir: "/var/lib/hearth/" + store}
			began := time.Now()
			r, exit, err := l.run(boundedBy(t, soon), joiner, a)
			if err != nil {
				t.Fatal(err)
			}
			t.Logf("%s: exit %d, %s: %s (%s)", time.Since(began).Round(100*time.Millisecond), exit, r.Code, r.Message, r.Remedy)
			if exit != bootstrap.ExitCluster || !slices.Contains(tc.codes, r.Code) {
				t.Errorf("exit %d with %s, not %d with %s", exit, r.Code, bootstrap.ExitCluster, tc.codes)
			}
			if r.Remedy == "" || !strings.Contains(r.Message+fmt.Sprint(r.Remedy), tc.mentions) {
				t.Errorf("%q is not mentioned: %s (%s)", tc.mentions, r.Message, r.Remedy)
			}
			if out, err := joiner.Exec(t.Context(), program, "reset", "--yes", "--state-dir", a.stateDir); err != nil {
				t.Errorf("reset: %v: %s", err, out)
			}
		})
	}
}
