package bootstrap_test

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/credentials"

	"github.com/hearth-sh/hearth/internal/artifact"
	"github.com/hearth-sh/hearth/internal/bootstrap"
	"github.com/hearth-sh/hearth/internal/bootstrap/fault"
	"github.com/hearth-sh/hearth/internal/host"
	"github.com/hearth-sh/hearth/internal/imds/imdstest"
	"github.com/hearth-sh/hearth/internal/k3s/election"
	"github.com/hearth-sh/hearth/internal/k3s/join"
	"github.com/hearth-sh/hearth/internal/nodeconfig"
	"github.com/hearth-sh/hearth/internal/systemd"
	"github.com/hearth-sh/hearth/test/machine"
)

const (
	// binDir is where programs are installed.
	binDir = "/usr/local/bin"
	// program is bootstrap where nothing is installed, so that a whole directory
	// can be taken away from it.
	program = "/opt/bootstrap"
)

// bare is a machine with bootstrap on its disk and nothing that starts it.
func (l *lab) bare(name string, spec machine.Spec) *machine.Machine {
	l.t.Helper()
	m := l.add(name, "", spec)
	if err := m.WriteFile(program, l.program, 0o755); err != nil {
		l.t.Fatal(err)
	}
	l.boot(m)
	return m
}

// attempt is one `bootstrap run` by hand.
type attempt struct {
	config   string            // NodeConfig; "" for the usual sources
	env      map[string]string // beside the lab's
	stateDir string
}

// run returns the result and the exit code.
func (l *lab) run(ctx context.Context, m *machine.Machine, a attempt) (bootstrap.Result, int, error) {
	argv := []string{"AWS_ENDPOINT_URL=" + l.aws}
	for name, value := range a.env {
		argv = append(argv, name+"="+value)
	}
	argv = append(argv, program, "run", "-o", "json", "--state-dir", a.stateDir)
	if a.config != "" {
		// Not in the state directory: that is bootstrap's own.
		file := a.stateDir + ".yaml"
		if err := m.WriteFile(file, []byte(a.config), 0o644); err != nil {
			return bootstrap.Result{}, 0, err
		}
		argv = append(argv, "--config", file)
	}
	command := m.Command(ctx, "env", argv...)
	var progress bytes.Buffer
	command.Stderr = &progress
	out, err := command.Output()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		return bootstrap.Result{}, 0, err
	}
	var r bootstrap.Result
	if err := json.Unmarshal(out, &r); err != nil {
		return r, 0, fmt.Errorf("no result: %w: %s %s", err, out, progress.String())
	}
	return r, command.ProcessState.ExitCode(), nil
}

// spec is a NodeConfig with a store of its own and short deadlines.
func (l *lab) spec(pool, store, more string) string {
	return fmt.Sprintf(`apiVersion: hearth.sh/v1alpha1
kind: NodeConfig
spec:
  pool: %s
  cluster:
    name: lab
    store: s3://%s/%s
    lease: 15s
  artifacts:
    manifest: s3://%s/artifacts.json
    publicKeys: [%q]
%s
`, pool, stateBucket, store, filesBucket, l.key, more)
}

// rest completes spec: k3s, and deadlines as short as they may be where nothing
// is done before they are over.
func (l *lab) rest(host string) string {
	if host == "" {
		host = "minDiskFree: 512Mi"
	}
	return fmt.Sprintf(`  k3s:
    version: %s
    config:
      kubelet-arg: [fail-cgroupv1=false]
  shims:
  - name: wasmtime
  addons:
    hearth: {values: {image: {repository: hearth.sh/nodeagent}}}
  host:
    %s
  timeouts: {fetch: 5m, join: 10s, ready: 10s, prove: 10s}
`, l.k3s.Version, host)
}

// insteadOfK3s publishes something in k3s's place and returns its entry for
// spec.artifacts. served is what S3 has under its name.
func (l *lab) insteadOfK3s(key string, content, served []byte) string {
	l.t.Helper()
	sum := sha256.Sum256(content)
	if err := l.put(l.t.Context(), filesBucket, key, served); err != nil {
		l.t.Fatal(err)
	}
	return fmt.Sprintf(`    files:
    - name: k3s
      version: %s
      sha256: %s
      size: %d
      urls: ["s3://%s/%s"]
`, l.k3s.Version, hex.EncodeToString(sum[:]), len(content), filesBucket, key)
}

// shiftedClock is the AWS endpoint of somebody whose clock is right while ours
// is not, or the other way round.
func (l *lab) shiftedClock(by time.Duration) string {
	target, err := url.Parse(l.aws)
	if err != nil {
		l.t.Fatal(err)
	}
	proxy := httputil.NewSingleHostReverseProxy(target)
	proxy.ModifyResponse = func(r *http.Response) error {
		r.Header.Set("Date", time.Now().Add(by).UTC().Format(http.TimeFormat))
		return nil
	}
	return l.serve(proxy)
}

// stalling is the AWS endpoint, but downloads of that key stop half-way.
func (l *lab) stalling(key string) string {
	target, err := url.Parse(l.aws)
	if err != nil {
		l.t.Fatal(err)
	}
	proxy := httputil.NewSingleHostReverseProxy(target)
	return l.serve(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Method != http.MethodGet || !strings.HasSuffix(r.URL.Path, "/"+key) {
			proxy.ServeHTTP(w, r)
			return
		}
		whole := httptest.NewRecorder()
		proxy.ServeHTTP(whole, r)
		for name, values := range whole.Header() {
			w.Header()[name] = values
		}
		w.WriteHeader(whole.Code)
		_, _ = w.Write(whole.Body.Bytes()[:whole.Body.Len()/2])
		_ = http.NewResponseController(w).Flush()
		<-r.Context().Done()
	}))
}

// foundedElsewhere makes the records of a cluster whose only server is at an
// address.
func (l *lab) foundedElsewhere(t *testing.T, prefix, address string) {
	t.Helper()
	store, err := election.Open("s3://"+stateBucket+"/"+prefix, election.OpenOptions{PathStyle: true, AWS: aws.Config{
		Region: "eu-central-1", BaseEndpoint: &l.aws, Credentials: credentials.NewStaticCredentialsProvider("test", "test", ""),
	}})
	if err != nil {
		t.Fatal(err)
	}
	elector, err := election.New(election.Options{
		Store: store, Instance: "i-0ffffffffffffffff", Server: true, State: election.NewFileState(filepath.Join(t.TempDir(), "election.json")),
		Discard: func(context.Context, int) error { return nil }, DataPresent: func() (bool, error) { return false, nil },
		Lease: 15 * time.Second, FoundWithin: time.Minute, Timeout: time.Minute,
	})
	if err != nil {
		t.Fatal(err)
	}
	decision, err := elector.Elect(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if err := decision.Hold.Found(t.Context(), address); err != nil {
		t.Fatal(err)
	}
}

// What may be in k3s's place: one that ends, one that never says that it is
// ready, one that says so and ends.
const (
	exiting = "#!/bin/sh\necho 'Fatal: no way'\nexit 1\n"
	hanging = "#!/bin/sh\necho 'waiting for something'\nexec sleep 1000\n"
	looping = "#!/bin/sh\nsystemd-notify --ready\nsleep 0.3\necho 'Fatal: it does not stay'\nexit 1\n"
)

// TestBadInputEndsInAClassifiedError gives one machine everything that can be
// wrong, one thing after the other. Each ends in its code, with a remedy, and
// with nothing half-done.
func TestBadInputEndsInAClassifiedError(t *testing.T) {
	t.Parallel() // most of it is waiting
	l := newLab(t, "faults")
	m := l.bare("victim", machine.Spec{Configure: func(c *imdstest.Config) { c.Tags = map[string]string{} }})
	ctx := boundedBy(t, 20*time.Minute)
	if err := m.WaitCloudInit(ctx); err != nil {
		t.Fatal(err)
	}
	exec := func(argv ...string) func(*testing.T) {
		return func(t *testing.T) {
			t.Helper()
			if out, err := m.Exec(ctx, argv[0], argv[1:]...); err != nil {
				t.Fatalf("%v: %s", err, out)
			}
		}
	}
	instance := func(change func(*imdstest.Config)) func(*testing.T) {
		return func(*testing.T) { m.IMDS.Update(change) }
	}
	userData := func(text string) func(*testing.T) { return func(*testing.T) { m.SetUserData(text) } }
	metadata := func(f imdstest.Fault) func(*testing.T) {
		return func(t *testing.T) { t.Cleanup(m.IMDS.Fault(f)) }
	}
	wrong := bytes.Repeat([]byte("not k3s "), 1000)
	k3sIs := func(key, script string) string { return l.insteadOfK3s(key, []byte(script), []byte(script)) }
	good := func(store, files, host string) string { return l.spec("control-plane", store, files+l.rest(host)) }
	unfetched := func(config string) string { return strings.Replace(config, "fetch: 5m", "fetch: 10s", 1) }

	// What passes by itself is waited for as long as instance metadata may take,
	// so these run beside everything else, each with a service of its own.
	wait := l.metadataThatNeverRecovers(t, m)

	for name, tc := range map[string]struct {
		before, after func(*testing.T)
		attempt       attempt
		exit          int
		code          fault.Code
		mentions      string // in the message
		soak          bool   // for what takes long and is much like another one
	}{
		"a mirror that serves other bytes": {
			attempt: attempt{config: good("mirror", l.insteadOfK3s("other-bytes", bytes.Repeat([]byte("k3s 1.2.3"), 1000), wrong), "")},
			exit:    bootstrap.ExitFetch, code: artifact.CodeDigestMismatch, mentions: "k3s",
		},
		"a mirror without the file": {
			attempt: attempt{config: strings.ReplaceAll(good("missing", k3sIs("there", exiting), ""), filesBucket+"/there", filesBucket+"/not-there")},
			exit:    bootstrap.ExitFetch, code: artifact.CodeNotFound, mentions: "k3s",
		},
		"a download that stalls": {
			attempt: attempt{config: unfetched(good("stall", l.insteadOfK3s("stalled", wrong, wrong), "")), env: map[string]string{"AWS_ENDPOINT_URL_S3": l.stalling("stalled")}},
			exit:    bootstrap.ExitFetch, code: artifact.CodeTimeout, mentions: "k3s",
		},
		"a list of artifacts that nobody trusted signed": {
			attempt: attempt{config: strings.ReplaceAll(good("untrusted", "", ""), l.key.String(), otherKey(t))},
			exit:    bootstrap.ExitFetch, code: artifact.CodeManifestUntrusted, mentions: "artifacts.json",
		},
		"a read-only /usr/local": {
			before: exec("sh", "-c", "mount --bind /usr/local /usr/local && mount -o remount,bind,ro /usr/local"), after: exec("umount", "/usr/local"),
			attempt: attempt{config: good("read-only", k3sIs("read-only", exiting), "")},
			exit:    bootstrap.ExitHost, code: host.CodeReadOnly, mentions: "/usr/local",
		},
		"a full /usr/local": {
			before: exec("sh", "-c", "mount -t tmpfs -o size=16k tmpfs /usr/local/bin"), after: exec("umount", "/usr/local/bin"),
			attempt: attempt{config: good("full", l.insteadOfK3s("large", bytes.Repeat(wrong, 20), bytes.Repeat(wrong, 20)), "")},
			exit:    bootstrap.ExitFetch, code: artifact.CodeNoSpace, mentions: binDir,
		},
		"too small a disk": {
			attempt: attempt{config: good("small", "", "minDiskFree: 900Ti")},
			exit:    bootstrap.ExitHost, code: host.CodeDiskFull, mentions: "free",
		},
		"a configuration with an unknown field": {
			attempt: attempt{config: good("unknown", "", "") + "  clutser: {name: x}\n"},
			exit:    bootstrap.ExitConfig, code: nodeconfig.CodeInvalid, mentions: "spec.clutser",
		},
		"user-data with a wrong value": {
			before:  userData(good("wrong-value", "", "minDiskFree: plenty")),
			attempt: attempt{}, exit: bootstrap.ExitConfig, code: nodeconfig.CodeInvalid, mentions: "spec.host.minDiskFree",
		},
		"empty user-data": {
			before: userData(""), attempt: attempt{}, exit: bootstrap.ExitConfig, code: nodeconfig.CodeMissing, mentions: "NodeConfig",
		},
		"binary user-data": {
			before:  userData("\x7fELF\x02\x01\x01\x00\x00\xff\xfe\x00"),
			attempt: attempt{}, exit: bootstrap.ExitConfig, code: nodeconfig.CodeUserData, mentions: "user-data",
		},
		"damaged gzip as user-data": {
			before:  userData("\x1f\x8b\x08\x00\x00\x00\x00\x00\x00\xffgarbage"),
			attempt: attempt{}, exit: bootstrap.ExitConfig, code: nodeconfig.CodeUserData, mentions: "gzip",
		},
		"a server on Spot": {
			before:  instance(func(c *imdstest.Config) { c.LifeCycle = "spot" }),
			after:   instance(func(c *imdstest.Config) { c.LifeCycle = "on-demand" }),
			attempt: attempt{config: good("spot", "", "")}, exit: bootstrap.ExitConfig, code: nodeconfig.CodeSpotServer, mentions: "Spot",
		},
		"the other processor": {
			before:  instance(func(c *imdstest.Config) { c.Architecture = otherArchitecture(c.Architecture) }),
			after:   instance(func(c *imdstest.Config) { c.Architecture = otherArchitecture(c.Architecture) }),
			attempt: attempt{config: good("processor", "", "")}, exit: bootstrap.ExitHost, code: host.CodeArchitecture, mentions: "bootstrap is for",
		},
		"a clock that is an hour off": {
			attempt: attempt{config: good("clock", "", ""), env: map[string]string{"AWS_ENDPOINT_URL": l.shiftedClock(time.Hour)}},
			exit:    bootstrap.ExitHost, code: host.CodeClock, mentions: "clock",
		},
		"instance metadata that is switched off": {
			before:  metadata(imdstest.Fault{Path: "*", Status: http.StatusForbidden}),
			attempt: attempt{config: good("forbidden", "", "")}, exit: bootstrap.ExitMetadata, code: bootstrap.CodeMetadataDisabled, mentions: "metadata",
		},
		"instance metadata that knows no tokens": {
			before:  metadata(imdstest.Fault{Path: "api/token", Status: http.StatusNotFound}),
			attempt: attempt{config: good("version-1", "", "")}, exit: bootstrap.ExitMetadata, code: bootstrap.CodeMetadataVersion1, mentions: "metadata",
		},
		"an instance without a role": {
			before:  instance(func(c *imdstest.Config) { c.Role = "" }),
			after:   instance(func(c *imdstest.Config) { c.Role = role }),
			attempt: attempt{config: unfetched(good("no-role", "", ""))}, exit: bootstrap.ExitFetch, code: artifact.CodeManifestUnreachable, mentions: "manifest",
		},
		"a store without a bucket": {
			attempt: attempt{config: strings.ReplaceAll(good("no-bucket", k3sIs("no-bucket", exiting), ""), "s3://"+stateBucket, "s3://nobody-has-this")},
			exit:    bootstrap.ExitCluster, code: election.CodeMissing, mentions: "nobody-has-this",
		},
		"an agent whose cluster nobody founds": {
			attempt: attempt{config: l.spec("wasm", "nobody", k3sIs("nobody", exiting)+l.rest(""))},
			exit:    bootstrap.ExitCluster, code: election.CodeTimeout, mentions: "found",
		},
		"a server that is gone while it is joined": {
			before:  func(t *testing.T) { l.foundedElsewhere(t, "gone", l.network.HostIP()) },
			attempt: attempt{config: l.spec("wasm", "gone", k3sIs("gone", exiting)+l.rest(""))},
			exit:    bootstrap.ExitCluster, code: join.CodeRefused, mentions: l.network.HostIP(),
		},
		"systemd out of reach": {
			before:  exec("sh", "-c", "mv /run/systemd/private /run/systemd/private.away; mv /run/dbus /run/dbus.away"),
			after:   exec("sh", "-c", "mv /run/systemd/private.away /run/systemd/private; mv /run/dbus.away /run/dbus"),
			attempt: attempt{config: good("no-bus", k3sIs("no-bus", exiting), "")}, exit: bootstrap.ExitHost, code: host.CodeNoSystemd, mentions: "systemd",
		},
		"a k3s that exits": {
			attempt: attempt{config: good("exits", k3sIs("exits", exiting), "")}, exit: bootstrap.ExitStart, code: systemd.CodeUnitTimeout, mentions: "no way",
		},
		"a k3s that hangs and was tried for long": {
			before: exec("sh", "-c", "mkdir -p /var/lib/hearth/a-k3s-that-hangs-and-was-tried-for-long && "+
				`echo '{"runs": 9, "spentMs": 3600000}' > /var/lib/hearth/a-k3s-that-hangs-and-was-tried-for-long/attempts.json`),
			attempt: attempt{config: good("hangs", k3sIs("hangs", hanging), "")}, exit: bootstrap.ExitGaveUp, code: systemd.CodeUnitTimeout, mentions: "waiting for something",
		},
		"a k3s that is ready and does not stay": {
			attempt: attempt{config: good("loops", k3sIs("loops", looping), "")}, exit: bootstrap.ExitStart, code: systemd.CodeUnitLoops, mentions: "does not stay",
		},
		"a k3s that no kernel can execute": {
			attempt: attempt{config: good("garbage", k3sIs("garbage", "\x00garbage"), "")}, exit: bootstrap.ExitStart, code: systemd.CodeUnitTimeout, mentions: "k3s", soak: true,
		},
	} {
		t.Run(name, func(t *testing.T) {
			if tc.soak && !soaked(false, true) {
				t.Skip("a case for soaks: set HEARTH_SOAK")
			}
			tc.attempt.stateDir = "/var/lib/hearth/" + strings.ReplaceAll(name, " ", "-")
			before := tree(t, m, binDir)
			if tc.before != nil {
				tc.before(t)
			}
			after := sync.OnceFunc(func() {
				if tc.after != nil {
					tc.after(t)
				}
			})
			t.Cleanup(after)
			began := time.Now()
			r, exit, err := l.run(ctx, m, tc.attempt)
			if err != nil {
				t.Fatal(err)
			}
			t.Logf("%s: exit %d, %s: %s (%s)", time.Since(began).Round(100*time.Millisecond), exit, r.Code, r.Message, r.Remedy)
			if exit != tc.exit || r.ExitCode != tc.exit || r.Code != tc.code {
				t.Errorf("exit %d (%d in the result) with %s, not %d with %s", exit, r.ExitCode, r.Code, tc.exit, tc.code)
			}
			if !strings.Contains(r.Message, tc.mentions) {
				t.Errorf("the message does not mention %q: %s", tc.mentions, r.Message)
			}
			if r.Remedy == "" {
				t.Error("there is no remedy")
			}
			explain := m.Command(ctx, program, "explain", string(r.Code))
			if out, err := explain.CombinedOutput(); err != nil {
				t.Errorf("explain %s: %v: %s", r.Code, err, out)
			}
			// Its exit code is the run's.
			status, _ := m.Command(ctx, program, "status", "--state-dir", tc.attempt.stateDir).CombinedOutput()
			if !strings.Contains(string(status), tc.mentions) || !strings.Contains(string(status), string(tc.code)) {
				t.Errorf("status says\n%s", status)
			}
			after()
			if out, err := m.Exec(ctx, program, "reset", "--yes", "--state-dir", tc.attempt.stateDir); err != nil {
				t.Errorf("reset: %v: %s", err, out)
			}
			before.compare(t, tree(t, m, binDir))
		})
	}
	wait()
}

func otherArchitecture(a string) string {
	if a == "arm64" {
		return "x86_64"
	}
	return "arm64"
}

func otherKey(t *testing.T) string {
	t.Helper()
	private, err := artifact.GenerateKey()
	if err != nil {
		t.Fatal(err)
	}
	return private.Public().String()
}

// metadataThatNeverRecovers meets every fault of instance metadata that might
// pass, all at once, each with a service of its own. A plan gives up at once; a
// run waits for as long as the phase has, for which only soaks have the time.
// The returned function waits and judges.
func (l *lab) metadataThatNeverRecovers(t *testing.T, m *machine.Machine) (wait func()) {
	t.Helper()
	html := "<!DOCTYPE html><html><body>Sign in to this network</body></html>"
	var running sync.WaitGroup
	for name, tc := range map[string]struct {
		fault    imdstest.Fault
		code     fault.Code
		mentions string
	}{
		"answers 401":     {imdstest.Fault{Path: "meta-data/*", RejectToken: true}, bootstrap.CodeMetadataFailing, "401"},
		"answers 503":     {imdstest.Fault{Path: "*", Status: http.StatusServiceUnavailable}, bootstrap.CodeMetadataFailing, "503"},
		"answers HTML":    {imdstest.Fault{Path: "*", Body: &html}, bootstrap.CodeMetadataMalformed, "unknown way"},
		"is silent":       {imdstest.Fault{Path: "*", Silent: true}, bootstrap.CodeMetadataUnreachable, "does not answer"},
		"is cut off":      {imdstest.Fault{Path: "dynamic/*", Truncate: true}, bootstrap.CodeMetadataUnreachable, "cut off"},
		"has no identity": {imdstest.Fault{Path: "dynamic/*", Status: http.StatusNotFound}, bootstrap.CodeMetadataMissing, "404"},
	} {
		service := imdstest.New(imdstest.Default())
		t.Cleanup(service.Close)
		service.Fault(tc.fault)
		const variable = "AWS_EC2_METADATA_SERVICE_ENDPOINT"
		endpoint := l.serve(service)
		a := attempt{
			config: l.spec("wasm", "metadata", l.rest("")), env: map[string]string{variable: endpoint},
			stateDir: "/var/lib/hearth/metadata-" + strings.ReplaceAll(name, " ", "-"),
		}
		running.Go(func() {
			began := time.Now()
			plan := m.Command(t.Context(), "env", variable+"="+endpoint, program, "plan")
			out, _ := plan.CombinedOutput() // its exit code is looked at
			t.Logf("a plan with instance metadata that %s: %s: %s", name, time.Since(began).Round(time.Second), out)
			if code := plan.ProcessState.ExitCode(); code != bootstrap.ExitMetadata || !strings.Contains(string(out), tc.mentions) || !strings.Contains(string(out), "bootstrap explain "+string(tc.code)+")") {
				t.Errorf("a plan with instance metadata that %s: exit %d, not %d with %s", name, code, bootstrap.ExitMetadata, tc.code)
			}
			if !soaked(false, true) {
				return
			}
			r, exit, err := l.run(t.Context(), m, a)
			if err != nil {
				t.Errorf("instance metadata that %s: %v", name, err)
				return
			}
			t.Logf("instance metadata that %s: %s: exit %d, %s: %s (%s)", name, time.Since(began).Round(time.Second), exit, r.Code, r.Message, r.Remedy)
			if exit != bootstrap.ExitMetadata || r.Code != tc.code || r.Remedy == "" {
				t.Errorf("instance metadata that %s: exit %d with %s, not %d with %s", name, exit, r.Code, bootstrap.ExitMetadata, tc.code)
			}
		})
	}
	return running.Wait
}
