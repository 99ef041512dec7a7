package functions_test

import (
	"bytes"
	"context"
	"fmt"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/hearth-sh/hearth/internal/kube"
	"github.com/hearth-sh/hearth/test/cluster"
)

// kubectl is the program itself, in a namespace, for whoever has the
// administrator's kubeconfig.
type kubectl struct {
	program, namespace, home string
}

func newKubectl(t *testing.T, namespace string) kubectl {
	t.Helper()
	tools, err := cluster.Tools(t.Context(), nil)
	if err != nil {
		t.Fatal(err)
	}
	return kubectl{filepath.Join(tools, "kubectl"), namespace, t.TempDir()}
}

// run feeds it stdin.
func (k kubectl) run(t *testing.T, stdin string, args ...string) (stdout, stderr string, err error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), soon)
	defer cancel()
	command := exec.CommandContext(ctx, k.program, append([]string{"--namespace", k.namespace}, args...)...)
	// Its discovery is cached in the home directory.
	command.Env = append(os.Environ(), "KUBECONFIG="+bench.Kubeconfig(), "HOME="+k.home)
	var out, errs bytes.Buffer
	command.Stdin, command.Stdout, command.Stderr = strings.NewReader(stdin), &out, &errs
	err = command.Run()
	return out.String(), errs.String(), err
}

// must is run that has to succeed.
func (k kubectl) must(t *testing.T, stdin string, args ...string) string {
	t.Helper()
	stdout, stderr, err := k.run(t, stdin, args...)
	if err != nil {
		t.Fatalf("kubectl %s: %v\n%s%s", strings.Join(args, " "), err, stdout, stderr)
	}
	return stdout
}

// refused is run that has to fail, with these words.
func (k kubectl) refused(t *testing.T, stdin string, args []string, words ...string) {
	t.Helper()
	stdout, stderr, err := k.run(t, stdin, args...)
	if err == nil {
		t.Errorf("kubectl %s succeeded: %s", strings.Join(args, " "), stdout)
		return
	}
	t.Logf("kubectl %s says: %s", strings.Join(args, " "), strings.TrimSpace(stderr))
	for _, word := range words {
		if !strings.Contains(stderr, word) {
			t.Errorf("kubectl %s does not say %q", strings.Join(args, " "), word)
		}
	}
}

// awaitDenial waits until what is applied is refused.
func awaitDenial(t *testing.T, k kubectl, manifest string) {
	t.Helper()
	if err := bench.WaitFor(t.Context(), "the policy to count", soon, func(context.Context) (bool, error) {
		_, stderr, err := k.run(t, manifest, "apply", "--dry-run=server", "-f", "-")
		return err != nil && strings.Contains(stderr, "hearth-hosts"), nil
	}); err != nil {
		t.Fatal(err)
	}
}

// manifest is a Function as people write them.
func manifest(name, image, greeting string) string {
	return fmt.Sprintf(`apiVersion: hearth.sh/v1alpha1
kind: Function
metadata:
  name: %s
spec:
  image: %s
  env:
    - name: GREETING
      value: %s
`, name, image, greeting)
}

func TestKubectlAndTheAPIChangeTheSameFunctionInTurns(t *testing.T) {
	t.Parallel()
	tenant := newTenant(t)
	k := newKubectl(t, tenant)
	images := map[string]string{}
	for _, text := range []string{"applied first", "applied second", "applied by the server"} {
		images[text] = submit(t, tenant, "applied-source", text).Image
	}
	const name = "applied-kubectl"
	file := []string{"apply", "-f", "-"}
	at := func(revision int) {
		t.Helper()
		waitObject(t, tenant, name, fmt.Sprintf("revision %d to be warm", revision), func(f *kube.Function) bool {
			return f.Status.Revision == revision && allWarm(f)
		})
	}
	if out := k.must(t, manifest(name, images["applied first"], "one"), file...); !strings.Contains(out, "function.hearth.sh/"+name+" created") {
		t.Errorf("%s", out)
	}
	k.must(t, "", "wait", "--for=condition=Ready", "--timeout=2m", "function/"+name)
	url := strings.TrimSpace(k.must(t, "", "get", "function", name, "-o", "jsonpath={.status.url}"))
	if url != "http://"+name+"."+base+"/" {
		t.Errorf("the URL is %q", url)
	}
	answers(t, url, "applied first")
	at(1)

	// The same file again changes nothing.
	if out := k.must(t, manifest(name, images["applied first"], "one"), file...); !strings.Contains(out, "unchanged") {
		t.Errorf("%s", out)
	}
	if f := submit(t, tenant, name, "changed by the API", "--env", "GREETING=api"); f.Revision != 2 {
		t.Errorf("%+v", f)
	}
	answers(t, url, "changed by the API")
	// A changed file wins, as kubectl has it: last come.
	if out := k.must(t, manifest(name, images["applied second"], "two"), file...); !strings.Contains(out, "configured") {
		t.Errorf("%s", out)
	}
	answers(t, url, "applied second")
	at(3)
	if shown := must(t, "functions", "get", "--kubeconfig", bench.Kubeconfig(), "--tenant", tenant, name); !strings.Contains(shown, "GREETING=two") {
		t.Errorf("the API does not show what was applied:\n%s", shown)
	}

	table := strings.Split(strings.TrimSpace(k.must(t, "", "get", "functions")), "\n")
	if got := strings.Fields(table[0]); strings.Join(got, " ") != "NAME RUNTIME URL REVISION ACTIVE WARM READY AGE" {
		t.Errorf("the columns are %v", got)
	}
	found := false
	for _, line := range table[1:] {
		if cells := strings.Fields(line); cells[0] == name {
			found = true
			if want := fmt.Sprintf("%s resident %s 3 3 %d/%d True", name, url, len(nodes), len(nodes)); strings.Join(cells[:len(cells)-1], " ") != want {
				t.Errorf("shown is %v, want %s", cells, want)
			}
		}
	}
	if !found {
		t.Errorf("the table lacks it: %v", table)
	}

	// Who applies on the server is told whose change would be undone.
	if f := submit(t, tenant, name, "changed by the API again"); f.Revision != 4 {
		t.Errorf("%+v", f)
	}
	onServer := []string{"apply", "--server-side", "-f", "-"}
	k.refused(t, manifest(name, images["applied by the server"], "two"), onServer, "conflict", `"hearth-api"`, ".spec.image")
	answers(t, url, "changed by the API again")
	k.must(t, manifest(name, images["applied by the server"], "two"), append(onServer, "--force-conflicts")...)
	answers(t, url, "applied by the server")
	at(5)

	k.must(t, "", "delete", "function", name)
	waitStatusCode(t, url, http.StatusNotFound)
}

func TestKubectlIsToldWhatIsWrongWithAFunction(t *testing.T) {
	t.Parallel()
	tenant := newTenant(t)
	k := newKubectl(t, tenant)
	const image = "registry.example.com/team/hello"
	digest := "@sha256:" + strings.Repeat("0", 64)
	spec := func(lines string) string {
		return "apiVersion: hearth.sh/v1alpha1\nkind: Function\nmetadata: {name: wrong}\nspec:\n" + lines
	}
	for _, c := range []struct{ name, manifest, word string }{
		{"a tag", spec("  image: " + image + ":1\n"), "image must be named by digest"},
		{"no image", spec("  runtime: resident\n"), "spec.image: Required value"},
		{"a runtime that is none", spec("  image: " + image + digest + "\n  runtime: docker\n"), `supported values: "resident", "spin"`},
		{"too much memory", spec("  image: " + image + digest + "\n  limits: {memoryMiB: 4096}\n"), "spec.limits.memoryMiB"},
		{"a host that is none", spec("  image: " + image + digest + "\n  host: Not_A_Host\n"), "host must be a DNS name in lower case"},
		{"two sources of a value", spec("  image: " + image + digest + "\n  env: [{name: A, value: b, secretKeyRef: {name: c, key: d}}]\n"), "a value or a secretKeyRef, not both"},
		{"a field that is none", spec("  image: " + image + digest + "\n  replicas: 3\n"), `unknown field "spec.replicas"`},
	} {
		t.Run(c.name, func(t *testing.T) {
			k.refused(t, c.manifest, []string{"apply", "-f", "-"}, c.word)
		})
	}
}
