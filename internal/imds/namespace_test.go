//go:build linux

package imds_test

import (
	"net"
	"net/http"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/hearth-sh/hearth/internal/imds"
	"github.com/hearth-sh/hearth/internal/imds/imdstest"
	"github.com/hearth-sh/hearth/test/needs"
)

// insideEnv says to the test binary that it runs in a network namespace of its
// own, and which of the service's addresses this instance has.
const insideEnv = "HEARTH_TEST_IMDS_ADDRESSES"

// TestTheServiceIsFoundAtItsOwnAddresses has the service on the very addresses
// that instances have, with nothing said about where it is: each instance is a
// network namespace. Where a namespace of users is needed too and is forbidden,
// the test is skipped.
func TestTheServiceIsFoundAtItsOwnAddresses(t *testing.T) {
	needIPv6(t)
	for _, addresses := range []string{"IPv4", "IPv6", "IPv4 and IPv6"} {
		t.Run(addresses, func(t *testing.T) {
			t.Parallel()
			self, err := os.Executable()
			if err != nil {
				t.Fatal(err)
			}
			command := exec.CommandContext(t.Context(), self, "-test.run=^TestInsideANamespace$", "-test.v")
			command.Env = append(os.Environ(), insideEnv+"="+addresses)
			command.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNET}
			if os.Geteuid() != 0 {
				command.SysProcAttr.Cloneflags |= syscall.CLONE_NEWUSER
				command.SysProcAttr.UidMappings = []syscall.SysProcIDMap{{HostID: os.Geteuid(), Size: 1}}
				command.SysProcAttr.GidMappings = []syscall.SysProcIDMap{{HostID: os.Getegid(), Size: 1}}
			}
			out, err := command.CombinedOutput()
			switch {
			case err != nil && os.Geteuid() != 0 && (strings.Contains(err.Error(), "not permitted") || strings.Contains(string(out), "no network can be made")):
				needs.Missing(t, "network namespaces need root here: %v", err)
			case err != nil:
				t.Errorf("%v\n%s", err, out)
			case strings.Contains(string(out), "--- SKIP") || !strings.Contains(string(out), "--- PASS"):
				t.Errorf("it was not tested:\n%s", out)
			}
		})
	}
}

// TestInsideANamespace is the part of the test above that runs in one.
func TestInsideANamespace(t *testing.T) {
	addresses := os.Getenv(insideEnv)
	if addresses == "" {
		t.Skip("runs in a network namespace, as a part of TestTheServiceIsFoundAtItsOwnAddresses")
	}
	if out, err := exec.CommandContext(t.Context(), "ip", "link", "set", "lo", "up").CombinedOutput(); err != nil {
		t.Fatalf("no network can be made: %v: %s", err, out)
	}
	services := map[string]*imdstest.Server{}
	for family, address := range map[string]string{"IPv4": "169.254.169.254", "IPv6": "fd00:ec2::254"} {
		if !strings.Contains(addresses, family) {
			continue
		}
		argv := []string{"address", "add", address, "dev", "lo"}
		if family == "IPv6" {
			argv = append(argv, "nodad")
		}
		if out, err := exec.CommandContext(t.Context(), "ip", argv...).CombinedOutput(); err != nil {
			t.Fatalf("%v: %s", err, out)
		}
		listener, err := new(net.ListenConfig).Listen(t.Context(), "tcp", net.JoinHostPort(address, "80"))
		if err != nil {
			t.Fatal(err)
		}
		service := imdstest.New(imdstest.Default())
		server := &http.Server{Handler: service, ReadHeaderTimeout: time.Minute}
		done := make(chan struct{})
		go func() { defer close(done); _ = server.Serve(listener) }()
		t.Cleanup(func() { service.Close(); _ = server.Close(); <-done })
		services[family] = service
		// The kernel adds routes a moment after addresses.
		for began := time.Now(); ; time.Sleep(time.Millisecond) {
			connection, err := net.Dial("tcp", listener.Addr().String())
			if err == nil {
				_ = connection.Close()
				break
			}
			if time.Since(began) > 2*time.Minute {
				t.Fatal(err)
			}
		}
	}
	for name, tc := range map[string]struct {
		options imds.Options
		env     string // the mode of the environment
		asked   map[string]string
	}{
		"nothing is said":           {asked: map[string]string{"IPv4": "IPv4", "IPv6": "IPv6", "IPv4 and IPv6": "IPv4"}},
		"IPv4 is asked for":         {options: imds.Options{Mode: imds.ModeIPv4}, asked: map[string]string{"IPv4": "IPv4", "IPv4 and IPv6": "IPv4"}},
		"IPv6 is asked for":         {options: imds.Options{Mode: imds.ModeIPv6}, asked: map[string]string{"IPv6": "IPv6", "IPv4 and IPv6": "IPv6"}},
		"the environment says IPv6": {env: "IPv6", asked: map[string]string{"IPv6": "IPv6", "IPv4 and IPv6": "IPv6"}},
	} {
		t.Run(name, func(t *testing.T) {
			before := map[string]int{}
			for family, service := range services {
				before[family] = len(service.Requests())
			}
			// A machine that is busy answers late; nothing here is refused late.
			tc.options.AttemptTimeout, tc.options.Timeout, tc.options.Attempts = 20*time.Second, 2*time.Minute, 1
			tc.options.Getenv = func(k string) string {
				return map[string]string{"AWS_EC2_METADATA_SERVICE_ENDPOINT_MODE": tc.env}[k]
			}
			c, err := imds.New(tc.options)
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(c.Close)
			id, err := c.Identity(t.Context())
			want, answers := tc.asked[addresses]
			if !answers {
				if err == nil {
					t.Errorf("somebody answered: %+v", id)
				}
				return
			}
			if err != nil || id.InstanceID != imdstest.Default().InstanceID {
				t.Fatalf("%+v, %v", id, err)
			}
			for family, service := range services {
				if asked := len(service.Requests()) > before[family]; asked != (family == want) {
					t.Errorf("the service at its %s address was asked: %t", family, asked)
				}
			}
		})
	}
}
