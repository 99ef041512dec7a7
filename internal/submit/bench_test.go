package submit

import (
	"context"
	"crypto/tls"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"slices"
	"testing"
	"time"

	"github.com/hearth-sh/hearth/api/v1alpha1"
	"github.com/hearth-sh/hearth/internal/access"
	"github.com/hearth-sh/hearth/internal/function"
)

// manyFunctions is a store that has what a cluster's has in memory: answers cost
// it nothing, so that what is measured is the API.
type manyFunctions struct {
	function.Store
	all    []function.Function
	byName map[string]function.Function
}

func newManyFunctions(n, tenants int) *manyFunctions {
	s := &manyFunctions{byName: map[string]function.Function{}}
	at := time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
	for i := range n {
		settings := function.DefaultSettings()
		settings.Env = map[string]string{"GREETING": "hello", "LEVEL": "info"}
		settings.Secrets = map[string]string{"TOKEN": "s3cret"}
		f := function.Function{
			Name: fmt.Sprintf("bench-%04d", i), Tenant: fmt.Sprintf("tenant-%d", i%tenants), Wanted: 1, Active: 1, ETag: fmt.Sprintf("%q", fmt.Sprint(i)),
			Warm: "3/3", CreatedAt: at, UpdatedAt: at,
			Revision: function.Revision{
				Number: 1, ModuleDigest: "sha256:" + hash([]byte{byte(i)}), SizeBytes: 100 << 10, Settings: settings, State: v1alpha1.StateReady,
				Artifact: v1alpha1.Artifact{Registry: "registry.example.com", Repository: "team/functions", Digest: "sha256:" + hash([]byte{byte(i), 1})},
			},
		}
		for _, phase := range []string{"receive", "check", "publish", "record"} {
			f.Revision.Phases = append(f.Revision.Phases, v1alpha1.Phase{Name: phase, Milliseconds: 1.5})
		}
		for _, phase := range []string{"pull", "verify", "compile", "store", "load", "instantiate"} {
			f.Revision.NodePhases = append(f.Revision.NodePhases, v1alpha1.Phase{Name: phase, Milliseconds: 2.25})
		}
		s.all = append(s.all, f)
		s.byName[f.Name] = f
	}
	return s
}

func (s *manyFunctions) Get(_ context.Context, name string) (function.Function, error) {
	f, ok := s.byName[name]
	if !ok {
		return f, function.ErrNotFound
	}
	return f, nil
}

func (s *manyFunctions) List(_ context.Context, o function.ListOptions) (function.Page, error) {
	var p function.Page
	for _, f := range s.all {
		if o.Tenant == "" || f.Tenant == o.Tenant {
			p.Items = append(p.Items, f)
		}
	}
	return p, nil
}

func (s *manyFunctions) Revisions(_ context.Context, name string) ([]function.Revision, error) {
	return []function.Revision{s.byName[name].Revision}, nil
}

func (s *manyFunctions) Stats(context.Context) (function.Stats, error) { return function.Stats{}, nil }

// everybody may do everything; that costs nothing either.
type everybody struct{}

func (everybody) Authenticate(context.Context, *http.Request) (access.Caller, error) {
	return access.Caller{User: "bench"}, nil
}
func (everybody) Authorize(context.Context, access.Caller, access.Action) error { return nil }

// BenchmarkReads reports reads of an API with a thousand functions of ten
// tenants over one TLS connection that is kept.
func BenchmarkReads(b *testing.B) {
	store := newManyFunctions(1000, 10)
	s, err := New(Options{
		Store: store, Checker: &fixture{}, Publisher: &fixture{}, TempDir: b.TempDir(), Access: everybody{}, Quotas: &Quotas{},
		URLs: func(name string) (string, string) { return "http://" + name + ".203.0.113.7.nip.io/", "" },
	})
	if err != nil {
		b.Fatal(err)
	}
	defer s.Close()
	server := httptest.NewUnstartedServer(s.Handler())
	server.TLS = &tls.Config{MinVersion: tls.VersionTLS13, NextProtos: []string{"http/1.1"}}
	server.StartTLS()
	defer server.Close()
	client := server.Client()
	defer client.CloseIdleConnections()
	for _, c := range []struct {
		name string
		path func(i int) string
	}{
		{"one", func(i int) string { return fmt.Sprintf("/v1/functions/bench-%04d", i%1000) }},
		{"revisions", func(i int) string { return fmt.Sprintf("/v1/functions/bench-%04d/revisions", i%1000) }},
		{"list of 100", func(i int) string { return fmt.Sprintf("/v1/functions?tenant=tenant-%d", i%10) }},
		{"list of all", func(int) string { return "/v1/functions" }},
	} {
		b.Run(c.name, func(b *testing.B) {
			b.ReportAllocs()
			took := make([]time.Duration, 0, 1<<16)
			var size int64
			for i := 0; b.Loop(); i++ {
				began := time.Now()
				resp, err := client.Get(server.URL + c.path(i))
				if err != nil {
					b.Fatal(err)
				}
				size, err = io.Copy(io.Discard, resp.Body)
				_ = resp.Body.Close()
				if err != nil || resp.StatusCode != http.StatusOK {
					b.Fatal(resp.StatusCode, err)
				}
				took = append(took, time.Since(began))
			}
			slices.Sort(took)
			b.ReportMetric(float64(took[len(took)*99/100].Microseconds()), "p99-µs")
			b.ReportMetric(float64(size), "B/answer")
		})
	}
}
