package functions_test

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/hearth-sh/hearth/test/chart"
	"github.com/hearth-sh/hearth/test/guests"
)

// TestAGuardedBaseDomainIsForFunctionsOnly applies the chart's policy alone:
// the rest is installed already.
func TestAGuardedBaseDomainIsForFunctionsOnly(t *testing.T) {
	t.Parallel() // beside tests that make no Ingresses themselves
	root, err := guests.Root()
	if err != nil {
		t.Fatal(err)
	}
	policy, err := exec.CommandContext(t.Context(), filepath.Join(root, "bin", "helm"), "template", "hearth", filepath.Join(root, "packaging", "chart", "hearth"),
		"--namespace", chart.Namespace, "--kube-version", "1.36.3", "--show-only", "templates/guard.yaml",
		"--set", "api.guardHosts=true", "--set", "engine.baseDomain="+base).Output()
	if err != nil {
		t.Fatal(err)
	}
	tenant := newTenant(t)
	k := newKubectl(t, tenant)
	// The administrator is held to it as well: who may apply Ingresses is not asked.
	ingress := func(name, host string) string {
		return `{apiVersion: networking.k8s.io/v1, kind: Ingress, metadata: {name: ` + name + `}, spec: {ingressClassName: nobody, rules: [{host: ` + host + `,
  http: {paths: [{path: /, pathType: Prefix, backend: {service: {name: x, port: {number: 80}}}}]}}]}}`
	}
	const denied = "make a Function of that name, or choose a host elsewhere"
	k.must(t, ingress("before", "before."+base), "apply", "-f", "-")
	file := filepath.Join(t.TempDir(), "policy.yaml")
	if err := os.WriteFile(file, policy, 0o600); err != nil {
		t.Fatal(err)
	}
	k.must(t, "", "apply", "-f", file)
	t.Cleanup(func() {
		if out, err := exec.Command(k.program, "--kubeconfig", bench.Kubeconfig(), "delete", "-f", file).CombinedOutput(); err != nil {
			t.Errorf("%v: %s", err, out)
		}
	})
	// Policies count a moment after they were made.
	awaitDenial(t, k, ingress("probe", "probe."+base))
	for _, host := range []string{"mine." + base, base, "a.b." + base} {
		k.refused(t, ingress("mine", host), []string{"apply", "-f", "-"}, denied)
	}
	k.must(t, ingress("elsewhere", "mine.example.test"), "apply", "-f", "-")
	k.must(t, ingress("near", "not"+base), "apply", "-f", "-")
	k.must(t, "", "label", "ingress", "before", "changed=yes") // keeps what it has
	k.refused(t, ingress("before", "other."+base), []string{"apply", "-f", "-"}, denied)

	// Functions of both runtimes get theirs.
	f := submit(t, tenant, "guarded", "resident below the guarded domain")
	answers(t, f.URL, "resident below the guarded domain")
	spun := submit(t, spinTenant(t), "guarded-spin", "spin", "--runtime", "spin", "--wait", "2m")
	if answers(t, spun.URL, digestOf(spun.Image)); !strings.HasSuffix(spun.URL, base+"/") {
		t.Errorf("%+v", spun)
	}
}
