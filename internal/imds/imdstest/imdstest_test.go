package imdstest_test

import (
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/hearth-sh/hearth/internal/imds/imdstest"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func TestConfigurationIsReadStrictly(t *testing.T) {
	c, err := imdstest.ParseConfig([]byte(`{
		"instanceId": "i-0aaaaaaaaaaaaaaaa", "tags": {"Name": "n1"}, "allowV1": true,
		"spotAction": {"action": "stop", "time": "2026-11-22T10:00:00Z"},
		"faults": [{"path": "meta-data/*", "status": 503, "times": 2}]}`))
	if err != nil {
		t.Fatal(err)
	}
	if c.InstanceID != "i-0aaaaaaaaaaaaaaaa" || c.Region != "eu-central-1" || len(c.Tags) != 1 || c.SpotAction.Action != "stop" || c.Faults[0].Times != 2 {
		t.Errorf("%+v", c)
	}
	if _, err := imdstest.ParseConfig([]byte(`{"instanceID_": "x"}`)); err == nil || !strings.Contains(err.Error(), "instanceID_") {
		t.Errorf("a misspelt field: %v", err)
	}
}

// get asks without a token, which the server must allow.
func get(s http.Handler, path string) int {
	w := httptest.NewRecorder()
	s.ServeHTTP(w, httptest.NewRequest(http.MethodGet, "/latest/"+path, nil))
	return w.Code
}

func TestFaultsComeAndGo(t *testing.T) {
	const id, kind = "meta-data/instance-id", "meta-data/instance-type"
	now := time.Now()
	c := imdstest.Default()
	c.AllowV1 = true
	c.Faults = []imdstest.Fault{{Path: id, Status: 500, Skip: 1, Times: 2}}
	s := imdstest.New(c)
	s.SetClock(func() time.Time { return now })
	expect := func(what, path string, want ...int) {
		t.Helper()
		for i, status := range want {
			if got := get(s, path); got != status {
				t.Errorf("%s, request %d: %d, want %d", what, i, got, status)
			}
		}
	}
	expect("skip and times", id, 200, 500, 500, 200)
	remove := s.Fault(imdstest.Fault{Path: "meta-data/*", Status: 503})
	expect("a prefix", kind, 503, 503)
	expect("another path", "dynamic/instance-identity/document", 200)
	remove()
	expect("removed", kind, 200)
	s.Fault(imdstest.Fault{Path: kind, Status: 429, For: time.Minute})
	expect("for a minute", kind, 429)
	now = now.Add(time.Minute)
	expect("a minute later", kind, 200)
	s.Reset(c)
	expect("another instance, same faults", id, 200, 500, 500, 200)
	s.Update(func(c *imdstest.Config) { c.Missing = []string{"meta-data/placement"} })
	expect("missing", "meta-data/placement/region", 404)
	s.Update(func(c *imdstest.Config) { c.Disabled = true })
	expect("disabled", id, 403)
	s.Update(func(c *imdstest.Config) { c.Disabled, c.AllowV1 = false, false })
	expect("no token", id, 401)
}
