package imdstest

import (
	"context"
	"errors"
	"net/http"
	"net/netip"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/credentials/ec2rolecreds"
	sdk "github.com/aws/aws-sdk-go-v2/feature/ec2/imds"

	"github.com/hearth-sh/hearth/internal/imds"
)

// Connect starts the server and returns the URL at which clients reach it,
// directly or through something.
type Connect func(t testing.TB, s *Server) (url string)

// Timeouts of the clients under test: short for those that must run out, long
// for those that must not.
const (
	shortAttempt = 150 * time.Millisecond
	longAttempt  = 40 * time.Second
)

// Conformance checks what callers rely on of imds.Client, over any way to reach
// a service.
func Conformance(t *testing.T, connect Connect) {
	// start returns a server and a client that waits as long as it takes.
	start := func(t *testing.T, change ...func(*Config)) (*Server, *imds.Client) {
		c := Default()
		for _, f := range change {
			f(&c)
		}
		s := New(c)
		return s, client(t, imds.Options{Endpoint: connect(t, s), AttemptTimeout: longAttempt, Timeout: 3 * longAttempt})
	}
	// hasty returns one whose timeouts run out.
	hasty := func(t *testing.T, change ...func(*Config)) (*Server, *imds.Client) {
		c := Default()
		for _, f := range change {
			f(&c)
		}
		s := New(c)
		return s, client(t, imds.Options{Endpoint: connect(t, s), AttemptTimeout: shortAttempt, Attempts: 2, Timeout: longAttempt})
	}

	t.Run("identity is read whole", func(t *testing.T) {
		s, c := start(t, func(c *Config) { c.LocalIPv6 = "2001:db8::17" })
		got, err := c.Identity(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		want := imds.Identity{
			InstanceID: "i-0123456789abcdef0", InstanceType: "t4g.xlarge", ImageID: "ami-0123456789abcdef0", AccountID: "123456789012",
			Architecture: imds.ArchitectureARM64, LifeCycle: imds.LifeCycleSpot, Region: "eu-central-1", Zone: "eu-central-1a", ZoneID: "euc1-az2",
			Partition: "aws", ServicesDomain: "amazonaws.com", LocalIPv4: netip.MustParseAddr("10.0.1.23"), LocalIPv6: netip.MustParseAddr("2001:db8::17"),
			Hostname: "ip-10-0-1-23.eu-central-1.compute.internal", Role: "hearth-node", PendingTime: time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC),
		}
		if !reflect.DeepEqual(got, want) {
			t.Errorf("got  %+v\nwant %+v", got, want)
		}
		if got.ProviderID() != "aws:///eu-central-1a/i-0123456789abcdef0" {
			t.Errorf("provider ID %s", got.ProviderID())
		}
		if n := s.Count(http.MethodPut, "api/token"); n != 1 {
			t.Errorf("a snapshot cost %d tokens", n)
		}
	})

	t.Run("what an instance may lack is not an error", func(t *testing.T) {
		_, c := start(t, func(c *Config) {
			c.Role, c.Tags, c.LocalIPv4, c.LocalIPv6 = "", nil, "", "2001:db8::17"
		})
		id, err := c.Identity(t.Context())
		if err != nil || id.Role != "" || id.LocalIPv4.IsValid() {
			t.Errorf("identity: %+v, %v", id, err)
		}
		if b, err := c.UserData(t.Context()); err != nil || b != nil {
			t.Errorf("user-data: %q, %v", b, err)
		}
		if n, err := c.Notices(t.Context()); err != nil || !reflect.DeepEqual(n, imds.Notices{}) {
			t.Errorf("notices: %+v, %v", n, err)
		}
	})

	t.Run("what an instance must have is an error without", func(t *testing.T) {
		_, c := start(t, func(c *Config) { c.Missing = []string{"meta-data/instance-id"} })
		_, err := c.Identity(t.Context())
		is(t, err, imds.ErrNotFound, "meta-data/instance-id")
	})

	t.Run("tags are read, and their absence is explained", func(t *testing.T) {
		s, c := start(t, func(c *Config) { c.Tags["empty"] = ""; c.Tags["größe"] = "groß und klein" })
		tags, err := c.Tags(t.Context())
		want := map[string]string{"Name": "worker-1", "hearth.sh:pool": "wasm", "empty": "", "größe": "groß und klein"}
		if err != nil || !reflect.DeepEqual(tags, want) {
			t.Errorf("tags: %v, %v", tags, err)
		}
		s.Update(func(c *Config) { c.Tags = nil })
		_, err = c.Tags(t.Context())
		is(t, err, imds.ErrNotFound, "InstanceMetadataTags")
		if !errors.Is(err, imds.ErrNoTags) {
			t.Errorf("%v is not ErrNoTags", err)
		}
	})

	t.Run("user-data is returned byte for byte up to its limit", func(t *testing.T) {
		binary := "\x1f\x8b\x00\xff\n" + strings.Repeat("x", 16<<10-5)
		s, c := start(t, func(c *Config) { c.UserData = binary })
		if b, err := c.UserData(t.Context()); err != nil || string(b) != binary {
			t.Errorf("%d bytes, %v", len(b), err)
		}
		s.Update(func(c *Config) { c.UserData = strings.Repeat("x", 33<<10) })
		_, err := c.UserData(t.Context())
		is(t, err, imds.ErrMalformed, "longer than allowed")
	})

	t.Run("all notices are read", func(t *testing.T) {
		s, c := start(t)
		at := time.Date(2026, 11, 22, 10, 0, 0, 0, time.UTC)
		s.SetSpotAction("hibernate", at)
		s.SetRebalance(at.Add(-time.Hour))
		s.SetTargetState("Warmed:Terminated")
		s.SetMaintenance(
			Maintenance{ID: "instance-event-2", Code: "system-reboot", State: "active", NotBefore: at, NotAfter: at.Add(time.Hour), Description: "scheduled reboot"},
			Maintenance{ID: "instance-event-1", Code: "instance-retirement", State: "canceled", NotBefore: at})
		got, err := c.Notices(t.Context())
		want := imds.Notices{
			Spot: &imds.SpotAction{Action: imds.ActionHibernate, Time: at}, Rebalance: &imds.Rebalance{NoticeTime: at.Add(-time.Hour)},
			TargetState: imds.LifecycleWarmedTerminated,
			Maintenance: []imds.MaintenanceEvent{
				{ID: "instance-event-1", Code: "instance-retirement", State: "canceled", NotBefore: at},
				{ID: "instance-event-2", Code: "system-reboot", State: "active", NotBefore: at, NotAfter: at.Add(time.Hour), Description: "scheduled reboot"},
			},
		}
		if err != nil || !reflect.DeepEqual(got, want) {
			t.Errorf("got  %+v\nwant %+v\nerror %v", got, want, err)
		}
	})

	t.Run("one bad source of notices does not hide another", func(t *testing.T) {
		s, c := start(t)
		s.SetSpotAction("terminate", time.Date(2026, 11, 22, 10, 0, 0, 0, time.UTC))
		bad := `[{"EventId": 7}]`
		s.Fault(Fault{Path: "meta-data/events/maintenance/scheduled", Body: &bad})
		n, err := c.Notices(t.Context())
		is(t, err, imds.ErrMalformed, "maintenance")
		if n.Spot == nil {
			t.Error("the interruption was lost")
		}
	})

	t.Run("the SDK takes the role's credentials through the client", func(t *testing.T) {
		_, c := start(t)
		p := ec2rolecreds.New(func(o *ec2rolecreds.Options) { o.Client = c })
		checkCredentials(t, p)
	})

	t.Run("the SDK takes the role's credentials by itself", func(t *testing.T) {
		s := New(Default())
		p := ec2rolecreds.New(func(o *ec2rolecreds.Options) {
			o.Client = sdk.New(sdk.Options{Endpoint: connect(t, s), EnableFallback: aws.FalseTernary, HTTPClient: &http.Client{Timeout: longAttempt, Transport: transport(t)}})
		})
		checkCredentials(t, p)
	})

	t.Run("a service without version 2 is refused, and the error says so", func(t *testing.T) {
		s, c := start(t, func(c *Config) { c.OnlyV1 = true })
		_, err := c.Identity(t.Context())
		is(t, err, imds.ErrVersion1, "IMDSv1")
		_, err = c.UserData(t.Context())
		is(t, err, imds.ErrVersion1, "IMDSv1")
		for _, r := range s.Requests() {
			if r.Method != http.MethodPut {
				t.Errorf("read without a token: %s %s", r.Method, r.Path)
			}
		}
	})

	t.Run("a service that would also answer without tokens gets them all the same", func(t *testing.T) {
		s, c := start(t, func(c *Config) { c.AllowV1 = true })
		if _, err := c.Identity(t.Context()); err != nil {
			t.Fatal(err)
		}
		for _, r := range s.Requests() {
			if r.Method == http.MethodGet && !r.Token {
				t.Errorf("read without a token: %s", r.Path)
			}
		}
	})

	t.Run("a disabled service is named as such", func(t *testing.T) {
		s, c := start(t, func(c *Config) { c.Disabled = true })
		_, err := c.Identity(t.Context())
		is(t, err, imds.ErrDisabled, "HttpEndpoint")
		if n := len(s.Requests()); n != 1 {
			t.Errorf("a refusal was tried %d times", n)
		}
	})

	t.Run("silence towards a pod names the hop limit", func(t *testing.T) {
		_, c := hasty(t, func(c *Config) { c.HopLimitTooLow = true })
		_, err := c.Identity(t.Context())
		is(t, err, imds.ErrUnreachable, "hop limit")
	})

	t.Run("a forgotten token is replaced once", func(t *testing.T) {
		s, c := start(t)
		if _, err := c.Role(t.Context()); err != nil {
			t.Fatal(err)
		}
		s.RevokeTokens()
		if role, err := c.Role(t.Context()); err != nil || role != "hearth-node" {
			t.Errorf("after a restart of the service: %q, %v", role, err)
		}
		if n := s.Count(http.MethodPut, "api/token"); n != 2 {
			t.Errorf("%d tokens, want 2", n)
		}
	})

	t.Run("a service that refuses its own tokens is not asked for ever", func(t *testing.T) {
		s, c := start(t)
		s.Fault(Fault{Path: "meta-data/*", RejectToken: true})
		_, err := c.Role(t.Context())
		is(t, err, imds.ErrUnavailable, "refuses the tokens")
		if n := s.Count(http.MethodPut, "api/token"); n != 2 {
			t.Errorf("%d tokens, want 2", n)
		}
	})

	const role = "meta-data/iam/security-credentials/"
	for name, fault := range map[string]Fault{
		"500":                {Path: role, Status: 500, Times: 1},
		"503 for a token":    {Path: "api/token", Status: 503, Times: 2},
		"429":                {Path: role, Status: 429, Times: 2},
		"a broken one":       {Path: role, Reset: true, Times: 1},
		"a truncated one":    {Path: role, Truncate: true, Times: 1},
		"a rejected token":   {Path: role, RejectToken: true, Times: 1},
		"one broken mid-way": {Path: "*", Skip: 1, Reset: true, Times: 1},
	} {
		t.Run("a passing failure is survived: "+name, func(t *testing.T) {
			s, c := start(t)
			s.Fault(fault)
			if got, err := c.Role(t.Context()); err != nil || got != "hearth-node" {
				t.Errorf("%q, %v", got, err)
			}
		})
	}

	t.Run("a silent answer is given up and asked for again", func(t *testing.T) {
		s := New(Default())
		s.Fault(Fault{Path: role, Silent: true, Times: 1})
		c := client(t, imds.Options{Endpoint: connect(t, s), AttemptTimeout: time.Second, Timeout: 3 * longAttempt})
		if got, err := c.Role(t.Context()); err != nil || got != "hearth-node" {
			t.Errorf("%q, %v", got, err)
		}
	})

	html := "<html>Welcome to the hotel's network</html>"
	for name, f := range map[string]struct {
		fault Fault
		kind  error
		says  string
		tries int
	}{
		"500 for ever":     {Fault{Path: role, Status: 500}, imds.ErrUnavailable, "500", 3},
		"no such value":    {Fault{Path: "meta-data/instance-life-cycle", Status: 404}, imds.ErrNotFound, "life-cycle", 0},
		"400":              {Fault{Path: role, Status: 400}, imds.ErrMalformed, "400", 1},
		"a redirect":       {Fault{Path: role, Status: 302, Location: "/latest/meta-data/ami-id"}, imds.ErrMalformed, "302", 1},
		"too long":         {Fault{Path: role, Oversize: 1 << 20}, imds.ErrMalformed, "longer than allowed", 1},
		"a page of HTML":   {Fault{Path: role, Body: &html}, imds.ErrMalformed, "hotel", 1},
		"HTML as token":    {Fault{Path: "api/token", Body: &html}, imds.ErrMalformed, "api", 0},
		"HTML as document": {Fault{Path: "dynamic/instance-identity/document", Body: &html}, imds.ErrMalformed, "document", 0},
	} {
		t.Run("a lasting failure is explained: "+name, func(t *testing.T) {
			s, c := start(t)
			s.Fault(f.fault)
			_, err := c.Identity(t.Context())
			if f.tries > 0 {
				_, err = c.Role(t.Context())
			}
			says := f.says
			if says == "api" {
				says = "unknown way"
			}
			is(t, err, f.kind, says)
		})
	}

	t.Run("two answers that contradict each other are refused", func(t *testing.T) {
		_, c := start(t, func(c *Config) {
			c.Extra = map[string]string{"meta-data/instance-id": "i-0fedcba9876543210"}
		})
		_, err := c.Identity(t.Context())
		is(t, err, imds.ErrMalformed, "identity document")
	})

	t.Run("a caller that leaves is let go", func(t *testing.T) {
		s, c := start(t, func(c *Config) { c.HopLimitTooLow = true })
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error, 1)
		go func() {
			_, err := c.Identity(ctx)
			done <- err
		}()
		for s.Count(http.MethodPut, "api/token") == 0 {
			time.Sleep(time.Millisecond)
		}
		cancel()
		select {
		case err := <-done:
			if !errors.Is(err, context.Canceled) {
				t.Errorf("%v is not the context's error", err)
			}
		case <-time.After(longAttempt / 2):
			t.Fatal("still reading")
		}
	})

	t.Run("a caller's deadline counts", func(t *testing.T) {
		_, c := start(t, func(c *Config) { c.HopLimitTooLow = true })
		ctx, cancel := context.WithTimeout(t.Context(), shortAttempt)
		defer cancel()
		_, err := c.Identity(ctx)
		is(t, err, imds.ErrUnreachable, "hop limit")
	})
}

func client(t testing.TB, o imds.Options) *imds.Client {
	t.Helper()
	o.Getenv = func(string) string { return "" }
	c, err := imds.New(o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(c.Close)
	return c
}

func transport(t testing.TB) *http.Transport {
	tr := &http.Transport{}
	t.Cleanup(tr.CloseIdleConnections)
	return tr
}

func checkCredentials(t *testing.T, p aws.CredentialsProvider) {
	t.Helper()
	got, err := p.Retrieve(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	want := Default().Credentials
	if got.AccessKeyID != want.AccessKeyID || got.SecretAccessKey != want.SecretAccessKey || got.SessionToken != want.SessionToken || !got.CanExpire || !got.Expires.After(time.Now()) {
		t.Errorf("credentials are not those of the role: %s, expire %v", got.AccessKeyID, got.Expires)
	}
}

// is checks an error's kind, and that its sentence says a word.
func is(t *testing.T, err, kind error, word string) {
	t.Helper()
	var e *imds.Error
	switch {
	case err == nil:
		t.Fatalf("no error, want %v", kind)
	case !errors.Is(err, kind), !errors.As(err, &e):
		t.Errorf("%v (%T) is not of the kind %q", err, err, kind)
	case !strings.Contains(err.Error(), word):
		t.Errorf("%q does not say %q", err, word)
	case strings.Contains(err.Error(), "\n"):
		t.Errorf("%q is more than one line", err)
	}
}
