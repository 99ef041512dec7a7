package functions_test

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/hearth-sh/hearth/api/v1alpha1"
	"github.com/hearth-sh/hearth/test/chart"
	"github.com/hearth-sh/hearth/test/guests"
	"github.com/hearth-sh/hearth/test/needs"
)

// byURL is somebody who has no kubeconfig: a URL, a token and a certificate.
type byURL struct {
	hosts string // stands in the place of /etc/hosts
	args  []string
}

// newByURL gives the token in a file. The name in the URL resolves to one of
// the replicas, as a record in somebody's DNS would have it.
func newByURL(t *testing.T, token string) byURL {
	t.Helper()
	dir := t.TempDir()
	published, err := bench.Client().CoreV1().ConfigMaps(chart.Namespace).Get(t.Context(), "hearth-api", metav1.GetOptions{})
	if err != nil {
		t.Fatal(err)
	}
	name := strings.TrimPrefix(apiURL, "https://")
	files := map[string]string{
		"token": token + "\n", "ca.crt": published.Data["ca.crt"],
		"hosts": "127.0.0.1 localhost\n" + replicas(t)[0].Status.PodIP + " " + name + "\n",
	}
	for file, content := range files {
		if err := os.WriteFile(filepath.Join(dir, file), []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return byURL{hosts: filepath.Join(dir, "hosts"), args: []string{
		"--api", apiURL + ":8443", "--token-file", filepath.Join(dir, "token"), "--ca-file", filepath.Join(dir, "ca.crt"),
	}}
}

// run has the command line in a mount namespace with hosts of its own: the
// command and its options, those of where the API is, then the arguments.
func (p byURL) run(t *testing.T, command []string, rest ...string) (stdout, stderr string, err error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), soon)
	defer cancel()
	argv := slices.Concat([]string{"--mount", "--propagation", "private", "sh", "-c", `mount --bind "$0" /etc/hosts && exec "$@"`, p.hosts, agent}, command, p.args, rest)
	c := exec.CommandContext(ctx, "unshare", argv...)
	c.Env = append(os.Environ(), "HOME=/nonexistent", "KUBECONFIG=/nonexistent")
	var out, errs bytes.Buffer
	c.Stdout, c.Stderr = &out, &errs
	err = c.Run()
	return out.String(), errs.String(), err
}

func (p byURL) must(t *testing.T, command []string, rest ...string) (stdout, stderr string) {
	t.Helper()
	stdout, stderr, err := p.run(t, command, rest...)
	if err != nil {
		t.Fatalf("nodeagent %s %s: %v\n%s%s", strings.Join(command, " "), strings.Join(rest, " "), err, stdout, stderr)
	}
	return stdout, stderr
}

func TestTheCommandLineWorksWithAURLAndAToken(t *testing.T) {
	t.Parallel()
	tenant := newTeam(t)
	me := newByURL(t, tokenOf(t, tenant, v1alpha1.Group))
	const name = "by-url"
	url := "http://" + name + "." + base + "/"

	out, told := me.must(t, []string{"submit", "--tenant", tenant, "--name", name, "--env", "A=b"}, wasmFile(t, "one by URL"))
	for _, word := range []string{name + " is ready: revision 1", url, "curl " + url, "warm", "nodes"} {
		if !strings.Contains(out, word) {
			t.Errorf("submit does not say %q:\n%s", word, out)
		}
	}
	// Its steps, one a line where nobody watches.
	if steps := regexp.MustCompile(`(?s)uploading [0-9.]+ [KM]iB ….*checking and publishing …`); !steps.MatchString(told) {
		t.Errorf("submit's steps are\n%s", told)
	}
	// nip.io's names need no resolver: there is none that knows this one here.
	if out, _ := me.must(t, []string{"invoke"}, name); !strings.Contains(out, "one by URL") {
		t.Errorf("invoke: %s", out)
	}
	if out, _ := me.must(t, []string{"open", "--print"}, name); strings.TrimSpace(out) != url {
		t.Errorf("open: %s", out)
	}
	if out, _ := me.must(t, []string{"functions", "list", "--tenant", tenant}); !strings.Contains(out, name) || !strings.Contains(out, url) {
		t.Errorf("list: %s", out)
	}
	me.must(t, []string{"submit", "--tenant", tenant, "--name", name}, wasmFile(t, "two by URL"))
	if out, _ := me.must(t, []string{"functions", "revisions"}, name); len(strings.Split(strings.TrimSpace(out), "\n")) != 3 {
		t.Errorf("revisions: %s", out)
	}
	if out, _ := me.must(t, []string{"functions", "rollback"}, name); !strings.Contains(out, "is ready") {
		t.Errorf("rollback: %s", out)
	}
	answers(t, url, "one by URL")

	me.must(t, []string{"submit", "--tenant", tenant, "--name", "by-url-logs"}, guests.Build(t, "log-query"))
	me.must(t, []string{"invoke"}, "by-url-logs", "/?from-a-url")
	if err := bench.WaitFor(t.Context(), "the function's line to be shown", soon, func(context.Context) (bool, error) {
		out, _, err := me.run(t, []string{"logs"}, "by-url-logs")
		return err == nil && strings.Contains(out, "asked from-a-url"), nil
	}); err != nil {
		t.Error(err)
	}
	if out, _ := me.must(t, []string{"functions", "delete"}, name); !strings.Contains(out, "is deleted") {
		t.Errorf("delete: %s", out)
	}
	if _, told, err := me.run(t, []string{"invoke"}, name); err == nil || !strings.Contains(told, "functions list") {
		t.Errorf("invoke of what is deleted: %v %s", err, told)
	}

	// Without the certificate nothing is sent, and the reader knows what to give.
	strange := byURL{hosts: me.hosts, args: me.args[:4]}
	if _, told, err := strange.run(t, []string{"functions", "list"}); err == nil || !strings.Contains(told, "--ca-file") {
		t.Errorf("without the authority: %v %s", err, told)
	}
}

func TestATokenMadeWithTheKubeconfigIsGoodForTheURL(t *testing.T) {
	t.Parallel()
	token, told, err := nodeagent(t.Context(), "token", "--kubeconfig", bench.Kubeconfig())
	if err != nil || !strings.Contains(told, "hearth-cli") {
		t.Fatalf("%v: %s", err, told)
	}
	me := newByURL(t, strings.TrimSpace(token))
	tenant := newTenant(t)
	out, _ := me.must(t, []string{"submit", "--tenant", tenant, "--name", "by-token", "-o", "json"}, wasmFile(t, "by a token"))
	var f v1alpha1.Function
	if err := json.Unmarshal([]byte(out), &f); err != nil || f.State != v1alpha1.StateReady {
		t.Errorf("%v: %s", err, out)
	}
	if out, _ := me.must(t, []string{"functions", "get"}, "by-token"); !strings.Contains(out, f.URL) {
		t.Errorf("get: %s", out)
	}
}

// TestSubmitShowsItsSteps is for who watches: build, push, deploy, warm n/m.
func TestSubmitShowsItsSteps(t *testing.T) {
	t.Parallel()
	if _, err := exec.LookPath("script"); err != nil {
		needs.Missing(t, "script (bsdutils) gives a program a terminal: %v", err)
	}
	tenant := newTenant(t)
	root := filepath.Join("..", "guests", "src", "go", "cgi")
	ctx, cancel := context.WithTimeout(t.Context(), 2*soon)
	defer cancel()
	line := fmt.Sprintf("stty cols 200; %s submit --kubeconfig %s --tenant %s --name steps %s", agent, bench.Kubeconfig(), tenant, root)
	command := exec.CommandContext(ctx, "script", "--quiet", "--return", "--flush", "--command", line, "/dev/null")
	command.Env = append(os.Environ(), "TERM=xterm", "NO_COLOR=1")
	out, err := command.CombinedOutput()
	if err != nil {
		t.Fatalf("%v: %q", err, out)
	}
	// In this order; a step that was over between two looks may be missing.
	at := 0
	for _, step := range []string{"connecting to the cluster", "building steps", "uploading ", "checking and publishing", "steps is ready: revision 1"} {
		i := strings.Index(string(out[at:]), step)
		if i < 0 {
			t.Fatalf("%q is not shown, or too early: %q", step, out)
		}
		at += i
	}
	if deploy := regexp.MustCompile(`deploying revision 1: warm on [0-3]/3 nodes`); !deploy.Match(out) {
		t.Logf("the rollout was over before the first look at it: %q", out)
	}
	if !regexp.MustCompile(`warm +[1-3]/3 nodes`).Match(out) {
		t.Errorf("it is not said on how many nodes it is warm: %q", out)
	}
}
