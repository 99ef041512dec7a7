package connect

import (
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"k8s.io/client-go/tools/clientcmd"
	clientcmdapi "k8s.io/client-go/tools/clientcmd/api"
)

// writeKubeconfig writes one with a context of each name for a server.
func writeKubeconfig(t *testing.T, server, current string, contexts ...string) string {
	t.Helper()
	config := clientcmdapi.NewConfig()
	config.Clusters["c"] = &clientcmdapi.Cluster{Server: server}
	config.AuthInfos["u"] = &clientcmdapi.AuthInfo{Token: "t"}
	for _, name := range contexts {
		config.Contexts[name] = &clientcmdapi.Context{Cluster: "c", AuthInfo: "u", Namespace: name + "-ns"}
	}
	config.CurrentContext = current
	path := filepath.Join(t.TempDir(), "kubeconfig")
	if err := clientcmd.WriteToFile(*config, path); err != nil {
		t.Fatal(err)
	}
	return path
}

func TestKubeconfigsThatCannotBeUsedSayWhy(t *testing.T) {
	t.Setenv("HOME", t.TempDir())
	t.Setenv("KUBECONFIG", "")
	broken := filepath.Join(t.TempDir(), "broken")
	if err := os.WriteFile(broken, []byte("clusters: {"), 0o600); err != nil {
		t.Fatal(err)
	}
	two := writeKubeconfig(t, "https://192.0.2.1:6443", "", "a", "b")
	dangling := writeKubeconfig(t, "https://192.0.2.1:6443", "gone", "a")
	for name, tt := range map[string]struct {
		o            Options
		want, remedy string
	}{
		"no file anywhere":        {Options{}, "there is no kubeconfig", "--kubeconfig"},
		"a file that is missing":  {Options{Kubeconfig: "/nonexistent/kc"}, "/nonexistent/kc", "--kubeconfig"},
		"a file that is no YAML":  {Options{Kubeconfig: broken}, "cannot be read", "--kubeconfig"},
		"no current context":      {Options{Kubeconfig: two}, "no current context", "a, b"},
		"an unknown context":      {Options{Kubeconfig: two, Context: "c"}, `no context "c"`, "a, b"},
		"a dangling context":      {Options{Kubeconfig: dangling}, `no context "gone"`, "a"},
		"a malformed account":     {Options{Kubeconfig: two, Context: "a", ServiceAccount: "a/b/c"}, "is no ServiceAccount", "NAMESPACE/NAME"},
		"an account without name": {Options{Kubeconfig: two, Context: "a", ServiceAccount: "a/"}, "is no ServiceAccount", "NAMESPACE/NAME"},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := Load(tt.o)
			var known *Error
			if !errors.As(err, &known) || !known.Usage || !strings.Contains(known.Message, tt.want) || !strings.Contains(known.Remedy, tt.remedy) {
				t.Errorf("%#v", err)
			}
		})
	}
}

func TestContextGivesTheTenant(t *testing.T) {
	path := writeKubeconfig(t, "https://user:password@192.0.2.1:6443/prefix", "a", "a", "b")
	for context, want := range map[string]string{"": "a-ns", "a": "a-ns", "b": "b-ns"} {
		c, err := Load(Options{Kubeconfig: path, Context: context})
		if err != nil {
			t.Fatal(err)
		}
		if c.Tenant() != want || strings.Contains(c.String(), "password") {
			t.Errorf("%q: %s of %s", context, c.Tenant(), c)
		}
		c.Close()
	}
}

func TestAPIServersThatDoNotAnswerAreNamed(t *testing.T) {
	gone := httptest.NewServer(http.NotFoundHandler())
	gone.Close()
	odd := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		http.Error(w, "hello from a proxy", http.StatusBadGateway)
	}))
	defer odd.Close()
	for name, tt := range map[string]struct{ server, want string }{
		"nobody there":   {gone.URL, "does not answer: dial tcp"},
		"something else": {odd.URL, "hello from a proxy"},
	} {
		t.Run(name, func(t *testing.T) {
			c, err := Load(Options{Kubeconfig: writeKubeconfig(t, tt.server, "a", "a")})
			if err != nil {
				t.Fatal(err)
			}
			defer c.Close()
			_, err = c.Connect(t.Context(), ConnectOptions{})
			var known *Error
			if !errors.As(err, &known) || known.Usage || known.Denied || !strings.Contains(known.Message, tt.want) || !strings.Contains(known.Message, tt.server) {
				t.Errorf("%v", err)
			}
		})
	}
}

func TestTokensThatAreTooShortAreNotAskedFor(t *testing.T) {
	c, err := Load(Options{Kubeconfig: writeKubeconfig(t, "https://192.0.2.1:6443", "a", "a")})
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	for _, d := range []time.Duration{0, time.Minute, TokenLifetime - 1, MaxTokenLifetime + 1} {
		var known *Error
		if _, err := c.NewToken(t.Context(), d); !errors.As(err, &known) || !known.Usage {
			t.Errorf("%v: %v", d, err)
		}
	}
}

func TestHeldTokenIsRenewedInTime(t *testing.T) {
	now := time.Now()
	held := hold(Token{Value: "secret"}, now)
	for after, want := range map[time.Duration]bool{0: true, 8 * time.Minute: true, 9 * time.Minute: false, time.Hour: false} {
		if got := held.good(now.Add(after)); got != want {
			t.Errorf("after %v: %v", after, got)
		}
	}
	if (heldToken{}).good(now) {
		t.Error("no token is good")
	}
	if strings.Contains(fmt.Sprintf("%v %+v", Token{Value: "secret"}, Token{Value: "secret"}), "secret") {
		t.Error("a token prints itself")
	}
}
