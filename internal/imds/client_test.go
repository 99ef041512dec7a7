package imds_test

import (
	"context"
	"errors"
	"io"
	"net"
	"net/http"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/hearth-sh/hearth/internal/imds"
	"github.com/hearth-sh/hearth/internal/imds/imdstest"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func TestConformance(t *testing.T) {
	t.Run("IPv4", func(t *testing.T) {
		imdstest.Conformance(t, func(t testing.TB, s *imdstest.Server) string { return s.Start(t, "tcp4") })
	})
	t.Run("IPv6", func(t *testing.T) {
		needIPv6(t)
		imdstest.Conformance(t, func(t testing.TB, s *imdstest.Server) string { return s.Start(t, "tcp6") })
	})
	t.Run("far away", func(t *testing.T) {
		imdstest.Conformance(t, func(t testing.TB, s *imdstest.Server) string {
			return far(t, s.Start(t, "tcp4"), 15*time.Millisecond)
		})
	})
}

func needIPv6(t testing.TB) {
	t.Helper()
	ln, err := net.Listen("tcp6", "[::1]:0")
	if err != nil {
		// Not a tool that CI could install: some kernels have no IPv6.
		t.Skipf("this machine has no IPv6 loopback: %v", err)
	}
	ln.Close()
}

// far returns a URL behind a TCP proxy that holds every piece back for a while.
func far(t testing.TB, url string, delay time.Duration) string {
	t.Helper()
	ln, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			near, err := ln.Accept()
			if err != nil {
				return
			}
			wg.Go(func() {
				defer near.Close()
				there, err := (&net.Dialer{}).DialContext(ctx, "tcp", strings.TrimPrefix(url, "http://"))
				if err != nil {
					return
				}
				defer there.Close()
				stop := context.AfterFunc(ctx, func() { near.Close(); there.Close() })
				defer stop()
				var pair sync.WaitGroup
				pair.Go(func() { slowly(there, near, delay); there.(*net.TCPConn).CloseWrite() })
				err = slowly(near, there, delay)
				if err != nil {
					near.(*net.TCPConn).SetLinger(0) // a reset stays one
				}
				near.Close()
				pair.Wait()
			})
		}
	})
	t.Cleanup(func() { cancel(); ln.Close(); wg.Wait() })
	return "http://" + ln.Addr().String()
}

func slowly(dst io.Writer, src io.Reader, delay time.Duration) error {
	buf := make([]byte, 32<<10)
	for {
		n, err := src.Read(buf)
		if n > 0 {
			time.Sleep(delay)
			if _, err := dst.Write(buf[:n]); err != nil {
				return err
			}
		}
		if errors.Is(err, io.EOF) {
			return nil
		} else if err != nil {
			return err
		}
	}
}

func newClient(t testing.TB, o imds.Options, urls ...string) *imds.Client {
	t.Helper()
	c, err := imds.NewAt(o, urls...)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(c.Close)
	return c
}

func TestAutoFallsBackToIPv6AndStaysThere(t *testing.T) {
	needIPv6(t)
	silent := imdstest.New(imdstest.Default())
	silent.Fault(imdstest.Fault{Path: "*", Silent: true})
	six := imdstest.New(imdstest.Default())
	c := newClient(t, imds.Options{AttemptTimeout: 3 * time.Second, Timeout: time.Minute}, silent.Start(t, "tcp4"), six.Start(t, "tcp6"))
	for range 3 {
		if id, err := c.Identity(t.Context()); err != nil || id.InstanceID == "" {
			t.Fatalf("%+v, %v", id, err)
		}
	}
	if n := len(silent.Requests()); n != 1 {
		t.Errorf("the silent address was asked %d times", n)
	}
}

func TestAutoRemembersNoFailure(t *testing.T) {
	ln, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	four := "http://" + ln.Addr().String()
	ln.Close() // refused from here on
	s := imdstest.New(imdstest.Default())
	s.Fault(imdstest.Fault{Path: "*", Reset: true, Times: 3})
	c := newClient(t, imds.Options{AttemptTimeout: 10 * time.Second, Timeout: time.Minute}, four, s.Start(t, "tcp4"))
	_, err = c.Role(t.Context())
	if !errors.Is(err, imds.ErrUnreachable) || !strings.Contains(err.Error(), "neither over IPv4 nor IPv6") || !strings.Contains(err.Error(), "refused") {
		t.Fatalf("%v", err)
	}
	for range 10 { // the faults may need another attempt to be used up
		if _, err = c.Role(t.Context()); err == nil {
			return
		}
	}
	t.Error(err)
}

func TestAutoTakesARefusalForAnAnswer(t *testing.T) {
	cfg := imdstest.Default()
	cfg.Disabled = true
	four, other := imdstest.New(cfg), imdstest.New(imdstest.Default())
	c := newClient(t, imds.Options{AttemptTimeout: 10 * time.Second}, four.Start(t, "tcp4"), other.Start(t, "tcp4"))
	if _, err := c.Role(t.Context()); !errors.Is(err, imds.ErrDisabled) {
		t.Errorf("%v", err)
	}
	if n := len(other.Requests()); n != 0 {
		t.Errorf("the second address was asked %d times", n)
	}
}

func TestManyReadersOfASilentServiceLeaveTogether(t *testing.T) {
	cfg := imdstest.Default()
	cfg.HopLimitTooLow = true
	s := imdstest.New(cfg)
	c := newClient(t, imds.Options{AttemptTimeout: 100 * time.Millisecond, Timeout: time.Second}, s.Start(t, "tcp4"), "http://127.0.0.1:1")
	began := time.Now()
	var wg sync.WaitGroup
	for range 32 {
		wg.Go(func() {
			if _, err := c.Role(t.Context()); !errors.Is(err, imds.ErrUnreachable) {
				t.Errorf("%v", err)
			}
		})
	}
	wg.Wait()
	if d := time.Since(began); d > time.Minute {
		t.Errorf("32 readers with a second each took %v", d)
	}
}

func TestEndpointsComeFromOptionsThenEnvironment(t *testing.T) {
	for name, tc := range map[string]struct {
		options imds.Options
		env     map[string]string
		want    []string
		err     string
	}{
		"nothing":                   {want: []string{imds.EndpointIPv4, imds.EndpointIPv6}},
		"mode":                      {options: imds.Options{Mode: imds.ModeIPv6}, want: []string{imds.EndpointIPv6}},
		"endpoint":                  {options: imds.Options{Endpoint: "http://[::1]:1338/"}, want: []string{"http://[::1]:1338"}},
		"environment":               {env: map[string]string{"AWS_EC2_METADATA_SERVICE_ENDPOINT": "http://127.0.0.1:1338"}, want: []string{"http://127.0.0.1:1338"}},
		"environment's mode":        {env: map[string]string{"AWS_EC2_METADATA_SERVICE_ENDPOINT_MODE": "IPv6"}, want: []string{imds.EndpointIPv6}},
		"endpoint over environment": {options: imds.Options{Endpoint: "http://127.0.0.2"}, env: map[string]string{"AWS_EC2_METADATA_SERVICE_ENDPOINT": "http://127.0.0.1"}, want: []string{"http://127.0.0.2"}},
		"mode over environment":     {options: imds.Options{Mode: imds.ModeIPv4}, env: map[string]string{"AWS_EC2_METADATA_SERVICE_ENDPOINT": "http://127.0.0.1"}, want: []string{imds.EndpointIPv4}},
		"no URL":                    {options: imds.Options{Endpoint: "169.254.169.254"}, err: "not a URL"},
		"a path":                    {options: imds.Options{Endpoint: "http://127.0.0.1/latest"}, err: "not a URL"},
		"wrong environment":         {env: map[string]string{"AWS_EC2_METADATA_SERVICE_ENDPOINT": "ftp://127.0.0.1"}, err: "AWS_EC2_METADATA_SERVICE_ENDPOINT"},
		"wrong mode":                {options: imds.Options{Mode: "ipx"}, err: "neither ipv4 nor ipv6"},
	} {
		t.Run(name, func(t *testing.T) {
			tc.options.Getenv = func(k string) string { return tc.env[k] }
			got, err := imds.Endpoints(tc.options)
			if tc.err != "" {
				if err == nil || !strings.Contains(err.Error(), tc.err) {
					t.Errorf("%v does not say %q", err, tc.err)
				}
			} else if err != nil || !slices.Equal(got, tc.want) {
				t.Errorf("%v, %v", got, err)
			}
		})
	}
}

func TestTheEnvironmentCanForbidMetadata(t *testing.T) {
	c, err := imds.New(imds.Options{Getenv: func(k string) string {
		return map[string]string{"AWS_EC2_METADATA_DISABLED": "TRUE"}[k]
	}})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := c.Identity(t.Context()); !errors.Is(err, imds.ErrDisabled) || !strings.Contains(err.Error(), "AWS_EC2_METADATA_DISABLED") {
		t.Errorf("%v", err)
	}
}

func TestAProxyOfTheEnvironmentIsNotUsed(t *testing.T) {
	// The proxy is on a loopback name, which ProxyFromEnvironment would not
	// bypass for the link-local address; nothing may ask it.
	proxy := imdstest.New(imdstest.Default())
	t.Setenv("HTTP_PROXY", proxy.Start(t, "tcp4"))
	t.Setenv("http_proxy", proxy.Start(t, "tcp4"))
	c := newClient(t, imds.Options{AttemptTimeout: 50 * time.Millisecond, Attempts: 1, Timeout: time.Second}, "http://192.0.2.1")
	if _, err := c.Role(t.Context()); !errors.Is(err, imds.ErrUnreachable) {
		t.Errorf("%v", err)
	}
	if n := len(proxy.Requests()); n != 0 {
		t.Errorf("the proxy was asked %d times", n)
	}
}

func TestOptionsOutOfRangeAreRefused(t *testing.T) {
	for name, o := range map[string]imds.Options{
		"attempts": {Attempts: 11}, "negative attempts": {Attempts: -1}, "timeout": {Timeout: -1}, "attempt timeout": {AttemptTimeout: -1},
	} {
		if _, err := imds.New(o); err == nil {
			t.Errorf("%s: accepted", name)
		}
	}
}

func TestTheFakeKeepsTheProtocol(t *testing.T) {
	now := time.Now()
	s := imdstest.New(imdstest.Default())
	s.SetClock(func() time.Time { return now })
	url := s.Start(t, "tcp4")
	do := func(method, path string, headers ...string) (int, string) {
		t.Helper()
		req, err := http.NewRequestWithContext(t.Context(), method, url+path, nil)
		if err != nil {
			t.Fatal(err)
		}
		for i := 0; i < len(headers); i += 2 {
			req.Header.Set(headers[i], headers[i+1])
		}
		tr := &http.Transport{DisableKeepAlives: true}
		resp, err := tr.RoundTrip(req)
		if err != nil {
			t.Fatal(err)
		}
		defer resp.Body.Close()
		b, err := io.ReadAll(resp.Body)
		if err != nil {
			t.Fatal(err)
		}
		return resp.StatusCode, string(b)
	}
	const ttl, tok = "X-aws-ec2-metadata-token-ttl-seconds", "X-aws-ec2-metadata-token"
	for name, tc := range map[string]struct {
		method  string
		headers []string
		want    int
	}{
		"GET":              {"GET", []string{ttl, "60"}, 405},
		"no TTL":           {"PUT", nil, 400},
		"TTL too long":     {"PUT", []string{ttl, "21601"}, 400},
		"through a proxy":  {"PUT", []string{ttl, "60", "X-Forwarded-For", "10.0.0.1"}, 403},
		"in good order":    {"PUT", []string{ttl, "21600"}, 200},
		"shortest allowed": {"PUT", []string{ttl, "1"}, 200},
	} {
		if got, _ := do(tc.method, "/latest/api/token", tc.headers...); got != tc.want {
			t.Errorf("a token, %s: %d, want %d", name, got, tc.want)
		}
	}
	_, token := do("PUT", "/latest/api/token", ttl, "60")
	for path, want := range map[string]string{
		"/latest/meta-data/instance-id":                  "i-0123456789abcdef0",
		"/2021-03-23/meta-data/instance-id":              "i-0123456789abcdef0",
		"/latest/meta-data/placement/":                   "availability-zone\navailability-zone-id\nregion",
		"/latest/meta-data/iam":                          "info\nsecurity-credentials/",
		"/latest":                                        "dynamic\nmeta-data",
		"/latest/meta-data/iam/security-credentials/":    "hearth-node",
		"/latest/meta-data/network/interfaces/macs/":     "02:00:0a:00:01:17/",
		"/latest/meta-data/tags/instance/hearth.sh:pool": "wasm",
	} {
		if status, got := do("GET", path, tok, token); status != 200 || got != want {
			t.Errorf("%s: %d %q, want %q", path, status, got, want)
		}
	}
	if status, _ := do("GET", "/latest/meta-data/instance-id"); status != 401 {
		t.Errorf("without a token: %d", status)
	}
	if status, _ := do("GET", "/latest/meta-data/nothing", tok, token); status != 404 {
		t.Errorf("no such value: %d", status)
	}
	now = now.Add(time.Minute)
	if status, _ := do("GET", "/latest/meta-data/instance-id", tok, token); status != 401 {
		t.Errorf("with an expired token: %d", status)
	}
}
