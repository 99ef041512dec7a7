package packaging_test

import (
	"encoding/json"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	nodev1 "k8s.io/api/node/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	"sigs.k8s.io/yaml"

	"github.com/hearth-sh/hearth/api/v1alpha1"
)

const (
	chart     = root + "/packaging/chart/hearth"
	manifests = root + "/packaging/manifests/hearth.yaml"
	// kubeVersion is the oldest that the chart says it needs.
	kubeVersion = "1.36.0"

	// manifestsHead is what `helm install --create-namespace` does by itself.
	// The agent mounts directories of the host, which namespaces held to a
	// stricter Pod Security Standard refuse.
	manifestsHead = `# The chart packaging/chart/hearth with its own values, for kubectl apply.
# Written by make manifests; do not edit.
apiVersion: v1
kind: Namespace
metadata:
  name: hearth-system
  labels:
    pod-security.kubernetes.io/enforce: privileged
`
)

// render runs helm template with further arguments.
func render(t *testing.T, args ...string) (string, error) {
	t.Helper()
	args = append([]string{"template", "hearth", chart, "--namespace", "hearth-system", "--include-crds", "--kube-version", kubeVersion}, args...)
	return output(t, "", nil, tool(t, "helm"), args...)
}

// objects is what a rendering consists of, by kind and name.
type objects map[string]map[string]any

func parse(t *testing.T, manifest string) objects {
	t.Helper()
	all := objects{}
	for _, document := range strings.Split("\n"+manifest, "\n---") {
		var object map[string]any
		if err := yaml.UnmarshalStrict([]byte(document), &object); err != nil {
			t.Fatalf("%v in\n%s", err, document)
		}
		if object == nil {
			continue
		}
		metadata, _ := object["metadata"].(map[string]any)
		key := fmt.Sprintf("%v/%v", object["kind"], metadata["name"])
		if _, again := all[key]; again {
			t.Errorf("%s is there twice", key)
		}
		all[key] = object
	}
	return all
}

// as reads an object strictly: a field that Kubernetes does not know is an error.
func as[T any](t *testing.T, all objects, key string) T {
	t.Helper()
	var typed T
	object, ok := all[key]
	if !ok {
		t.Fatalf("there is no %s among %v", key, slices.Sorted(maps.Keys(all)))
	}
	data, err := yaml.Marshal(object)
	if err != nil {
		t.Fatal(err)
	}
	if err := yaml.UnmarshalStrict(data, &typed); err != nil {
		t.Fatalf("%s: %v", key, err)
	}
	return typed
}

func rendered(t *testing.T, args ...string) objects {
	t.Helper()
	manifest, err := render(t, args...)
	if err != nil {
		t.Fatal(err)
	}
	return parse(t, manifest)
}

func TestTheManifestsAreTheChart(t *testing.T) {
	manifest, err := render(t)
	if err != nil {
		t.Fatal(err)
	}
	got := manifestsHead + manifest
	if *update {
		if err := os.MkdirAll(filepath.Dir(manifests), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(manifests, []byte(got), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(manifests)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(string(want), got); diff != "" {
		t.Errorf("%s is not what the chart renders; run make manifests\n%s", manifests, diff)
	}
}

func TestLintHasNothingToSay(t *testing.T) {
	out := must(t, "", nil, tool(t, "helm"), "lint", "--strict", chart)
	if strings.Contains(out, "[WARNING]") || strings.Contains(out, "[ERROR]") {
		t.Error(out)
	}
}

// TestTheChartRefusesOldClusters: without constrained impersonation the agent
// could do nothing as its node.
func TestTheChartRefusesOldClusters(t *testing.T) {
	_, err := render(t, "--kube-version", "1.35.9")
	if err == nil || !strings.Contains(err.Error(), "kubeVersion") {
		t.Errorf("got %v", err)
	}
	for _, version := range []string{"1.36.1+k3s1", "1.37.0-eks-1a2b3c"} {
		if _, err := render(t, "--kube-version", version); err != nil {
			t.Errorf("%s: %v", version, err)
		}
	}
}

func TestValuesTheSchemaDoesNotKnowAreRefused(t *testing.T) {
	for name, tt := range map[string]struct{ set, complaint string }{
		"an unknown value":                    {"agents.port=1", "agents"},
		"an unknown value below":              {"agent.prot=1", "prot"},
		"a name that is not there any more":   {"engine.replicas=3", "replicas"},
		"a repository with a tag in it":       {"image.repository=reg.example/hearth:1/x:2", "/image/repository"},
		"an empty repository":                 {"image.repository=", "/image/repository"},
		"a tag with a slash":                  {"image.tag=a/b", "/image/tag"},
		"a tag that begins with a dot":        {"image.tag=.x", "/image/tag"},
		"a digest of another kind":            {"image.digest=md5:abc", "/image/digest"},
		"a short digest":                      {"image.digest=sha256:abc", "/image/digest"},
		"a pull policy in lower case":         {"image.pullPolicy=always", "/image/pullPolicy"},
		"a pull secret without a name":        {"imagePullSecrets[0].secret=x", "secret"},
		"a port that is text":                 {"agent.port=http", "/agent/port"},
		"a port of zero":                      {"agent.port=0", "/agent/port"},
		"a port beyond the last":              {"engine.port=65536", "/engine/port"},
		"a port only root may have":           {"engine.port=80", "/engine/port"},
		"a store too small to compile":        {"agent.storeBudgetMiB=10", "/agent/storeBudgetMiB"},
		"a relative directory":                {"agent.dataDir=var/lib/hearth", "/agent/dataDir"},
		"the whole disk":                      {"agent.dataDir=/", "/agent/dataDir"},
		"a directory that climbs":             {"agent.dataDir=/var/../etc", "/agent/dataDir"},
		"a socket the pod does not see":       {"agent.containerdSocket=/var/containerd.sock", "/agent/containerdSocket"},
		"imds as a truth value":               {"agent.imds=true", "/agent/imds"},
		"an image list with a space":          {"agent.prefetch[0]=a b", "/agent/prefetch/0"},
		"a truth value that is text":          {"agent.drainOnRebalance=sometimes", "/agent/drainOnRebalance"},
		"a log level that is not one":         {"engine.logLevel=loud", "/engine/logLevel"},
		"an isolation that is not one":        {"engine.isolation=none", "/engine/isolation"},
		"a base domain with a scheme":         {"engine.baseDomain=http://x", "/engine/baseDomain"},
		"a registry with a scheme":            {"api.registry=https://reg.example", "/api/registry"},
		"a host template without a name":      {"api.hostTemplate=x.example", "/api/hostTemplate"},
		"no replicas":                         {"api.replicas=0", "/api/replicas"},
		"a quota of nothing":                  {"api.quotas.functions=0", "/api/quotas/functions"},
		"an argument that is no option":       {"agent.extraArgs[0]=precompile", "/agent/extraArgs/0"},
		"a variable that the agent has":       {"agent.env[0].name=NODE_NAME,agent.env[0].value=x", "/agent/env/0/name"},
		"a variable without a value":          {"agent.env[0].name=X", "/agent/env/0"},
		"another name for the node":           {"agent.env[0].name=NODE_NAME,agent.env[0].value=x", "/agent/env/0/name"},
		"a RuntimeClass without a handler":    {"runtimeClasses[0].name=x", "handler"},
		"a RuntimeClass in upper case":        {"runtimeClasses[0].name=X,runtimeClasses[0].handler=x,runtimeClasses[0].label=x", "/runtimeClasses/0/name"},
		"an annotation that is no text":       {"podAnnotations.a.b=c", "/podAnnotations/a"},
		"a node label that is no text":        {"agent.nodeSelector.pool.x=1", "/agent/nodeSelector/pool"},
		"a list where a map should be":        {"agent.resources[0]=x", "/agent/resources"},
		"tolerations that are not objects":    {"engine.tolerations[0]=all", "/engine/tolerations/0"},
		"a namespace, which is helm's option": {"namespace=x", "namespace"},
	} {
		t.Run(name, func(t *testing.T) {
			out, err := render(t, "--set", tt.set)
			if err == nil {
				t.Fatalf("%s was taken:\n%.400s", tt.set, out)
			}
			if message := err.Error(); !strings.Contains(message, "schema") || !strings.Contains(message, tt.complaint) {
				t.Errorf("%s: the error does not name %s: %s", tt.set, tt.complaint, message)
			}
		})
	}
}

// TestEveryValueDoesSomething renders with each value changed, so that none is
// described without being used.
func TestEveryValueDoesSomething(t *testing.T) {
	plain, err := render(t)
	if err != nil {
		t.Fatal(err)
	}
	digest := "sha256:" + strings.Repeat("a", 64)
	tests := map[string]struct{ set, want string }{
		"image.repository":                   {"image.repository=reg.example:5000/x/nodeagent", "image: reg.example:5000/x/nodeagent:0.1.0"},
		"image.tag":                          {"image.tag=v9", "image: hearth.sh/nodeagent:v9"},
		"image.digest":                       {"image.digest=" + digest, "image: hearth.sh/nodeagent@" + digest},
		"image.pullPolicy":                   {"image.pullPolicy=Always", "imagePullPolicy: Always"},
		"imagePullSecrets":                   {"imagePullSecrets[0].name=ecr", "imagePullSecrets:\n        - name: ecr"},
		"agent.nodeSelector":                 {"agent.nodeSelector.pool=wasm", "pool: wasm"},
		"agent.tolerations":                  {"agent.tolerations[0].key=mine", "key: mine"},
		"agent.affinity":                     {"agent.affinity.nodeAffinity.x=y", "x: \"y\""},
		"agent.resources":                    {"agent.resources.limits.memory=3Gi", "memory: 3Gi"},
		"agent.dataDir":                      {"agent.dataDir=/data/hearth", "--store-dir=/data/hearth/store"},
		"agent.storeBudgetMiB":               {"agent.storeBudgetMiB=100", "--store-budget=100"},
		"agent.port":                         {"agent.port=9999", "--http-listen=:9999"},
		"agent.imds":                         {"agent.imds=off", "name: HEARTH_IMDS, value: \"off\""},
		"agent.containerdSocket":             {"agent.containerdSocket=/run/c.sock", "name: HEARTH_CONTAINERD_SOCKET, value: \"/run/c.sock\""},
		"agent.prefetch":                     {"agent.prefetch[0]=reg.example/a:1", "images: |\n    reg.example/a:1"},
		"agent.drainOnRebalance":             {"agent.drainOnRebalance=true", "--drain-on-rebalance"},
		"agent.heartbeatSeconds":             {"agent.heartbeatSeconds=20", "--stale-after=90s"},
		"agent.logLevel":                     {"agent.logLevel=debug", "--log-level=debug"},
		"agent.env":                          {"agent.env[0].name=X,agent.env[0].value=y", "- name: X\n              value: \"y\""},
		"agent.extraArgs":                    {"agent.extraArgs[0]=--pod-name=x", "- --pod-name=x"},
		"engine.enabled":                     {"engine.enabled=false", "--engine-socket=\n"},
		"engine.nodeSelector":                {"engine.nodeSelector.pool=wasm", "pool: wasm"},
		"engine.tolerations":                 {"engine.tolerations[0].key=mine", "key: mine"},
		"engine.affinity":                    {"engine.affinity.nodeAffinity.x=y", "x: \"y\""},
		"engine.resources":                   {"engine.resources.limits.memory=3Gi", "memory: 3Gi"},
		"engine.port":                        {"engine.port=8888", "--listen=:8888"},
		"engine.probePort":                   {"engine.probePort=8889", "--http-listen=:8889"},
		"engine.baseDomain":                  {"engine.baseDomain=fn.example.com", "--base-domain=fn.example.com"},
		"engine.quotas.invocationsPerSecond": {"engine.quotas.invocationsPerSecond=7", "--quota-invocations=7"},
		"registrySecret":                     {"registrySecret=push", "secretName: push\n            defaultMode: 0400"},
		"engine.isolation":                   {"engine.isolation=function", "--isolation=function"},
		"engine.logLevel":                    {"engine.logLevel=debug", "--log-level=debug"},
		"engine.networkPolicy":               {"engine.networkPolicy=false", ""},
		"api.enabled":                        {"api.enabled=false", ""},
		"api.replicas":                       {"api.replicas=3", "replicas: 3"},
		"api.nodeSelector":                   {"api.nodeSelector.pool=control-plane", "pool: control-plane"},
		"api.tolerations":                    {"api.tolerations[0].key=mine", "key: mine"},
		"api.affinity":                       {"api.affinity.nodeAffinity.x=y", "x: \"y\""},
		"api.resources":                      {"api.resources.limits.memory=3Gi", "memory: 3Gi"},
		"api.priorityClassName":              {"api.priorityClassName=mine", "priorityClassName: mine"},
		"api.port":                           {"api.port=8888", "--listen=:8888"},
		"api.tlsPort":                        {"api.tlsPort=8889", "--tls-listen=:8889"},
		"api.probePort":                      {"api.probePort=8890", "--http-listen=:8890"},
		"api.registry":                       {"api.registry=reg.example:5000/hearth", "--registry=reg.example:5000/hearth"},
		"api.registryPlainHTTP":              {"api.registryPlainHTTP=true", "--registry-plain-http"},
		"api.spinPullSecret":                 {"api.spinPullSecret=pull", "--spin-pull-secret=pull"},
		"api.imds":                           {"api.imds=on", "name: HEARTH_IMDS, value: \"on\""},
		"api.hostNetwork":                    {"api.hostNetwork=true", ""},
		"api.hostTemplate":                   {"api.hostTemplate=\\{name\\}-\\{tenant\\}.\\{base\\}", "--host-template={name}-{tenant}.{base}"},
		"api.ingressClass":                   {"api.ingressClass=nginx", "--ingress-class=nginx"},
		"api.ingressAnnotations":             {"api.ingressAnnotations.note=text", `--ingress-annotations={\"note\":\"text\"}`},
		"api.host":                           {"api.host=api.example.com", "host: api.example.com"},
		"api.tls.enabled":                    {"api.host=api.example.com,api.tls.enabled=false", "host: api.example.com"},
		"api.tls.secretName":                 {"api.host=api.example.com,api.tls.secretName=cert", "tls:\n    - hosts: [api.example.com]\n      secretName: cert"},
		"api.guardHosts":                     {"api.guardHosts=true,engine.baseDomain=fn.example.com", `r.host.endsWith(".fn.example.com")`},
		"api.quotas.functions":               {"api.quotas.functions=7", "--quota-functions=7"},
		"api.quotas.mib":                     {"api.quotas.mib=7", "--quota-mib=7"},
		"api.quotas.changesPerSecond":        {"api.quotas.changesPerSecond=7", "--quota-changes=7"},
		"api.quotas.requestsPerSecond":       {"api.quotas.requestsPerSecond=7", "--quota-requests=7"},
		"api.logLevel":                       {"api.logLevel=debug", "--log-level=debug"},
		"api.env":                            {"api.env[0].name=X,api.env[0].value=y", "- name: X\n              value: \"y\""},
		"api.extraArgs":                      {"api.extraArgs[0]=--pod-name=x", "- --pod-name=x"},
		"runtimeClasses":                     {"runtimeClasses[0].name=w,runtimeClasses[0].handler=edge,runtimeClasses[0].label=wasmedge", `hearth.sh/runtime-wasmedge: "true"`},
		"priorityClassName":                  {"priorityClassName=mine", "priorityClassName: mine"},
		"podAnnotations":                     {"podAnnotations.note=text", "note: text"},
	}
	for _, leaf := range schemaLeaves(t) {
		t.Run(leaf.path, func(t *testing.T) {
			tt, ok := tests[leaf.path]
			if !ok {
				t.Fatal("no test changes this value; add one here")
			}
			got, err := render(t, "--set", tt.set)
			if err != nil {
				t.Fatal(err)
			}
			if got == plain || !strings.Contains(got, tt.want) {
				t.Errorf("%s: %q is missing in what differs:\n%s", tt.set, tt.want, cmp.Diff(plain, got))
			}
			parse(t, got)
			delete(tests, leaf.path)
		})
	}
	if !t.Failed() {
		for path := range tests {
			t.Errorf("the schema has no %s", path)
		}
	}
}

type schema struct {
	Description string            `json:"description"`
	Type        string            `json:"type"`
	Enum        []any             `json:"enum"`
	Properties  map[string]schema `json:"properties"`
	Additional  json.RawMessage   `json:"additionalProperties"`
}

type leaf struct {
	path string
	schema
}

// schemaLeaves are the values that are not groups of others, in order.
func schemaLeaves(t *testing.T) []leaf {
	t.Helper()
	data, err := os.ReadFile(filepath.Join(chart, "values.schema.json"))
	if err != nil {
		t.Fatal(err)
	}
	var top schema
	if err := json.Unmarshal(data, &top); err != nil {
		t.Fatal(err)
	}
	var leaves []leaf
	var walk func(prefix string, s schema)
	walk = func(prefix string, s schema) {
		if s.Properties == nil {
			leaves = append(leaves, leaf{prefix, s})
			return
		}
		if string(s.Additional) != "false" {
			t.Errorf("%q takes values it does not know", prefix)
		}
		for _, name := range slices.Sorted(maps.Keys(s.Properties)) {
			walk(strings.TrimPrefix(prefix+"."+name, "."), s.Properties[name])
		}
	}
	walk("", top)
	return leaves
}

// values are the chart's own, by path.
func values(t *testing.T) map[string]any {
	t.Helper()
	data, err := os.ReadFile(filepath.Join(chart, "values.yaml"))
	if err != nil {
		t.Fatal(err)
	}
	var top map[string]any
	if err := yaml.UnmarshalStrict(data, &top); err != nil {
		t.Fatal(err)
	}
	leaves := map[string]bool{}
	for _, l := range schemaLeaves(t) {
		leaves[l.path] = true
	}
	all := map[string]any{}
	var walk func(prefix string, v any)
	walk = func(prefix string, v any) {
		group, isGroup := v.(map[string]any)
		if leaves[prefix] || !isGroup {
			all[prefix] = v
			return
		}
		for name, below := range group {
			walk(strings.TrimPrefix(prefix+"."+name, "."), below)
		}
	}
	walk("", top)
	return all
}

func TestSchemaAndValuesAgree(t *testing.T) {
	defaults := values(t)
	for _, l := range schemaLeaves(t) {
		if _, ok := defaults[l.path]; !ok {
			t.Errorf("values.yaml lacks %s", l.path)
		}
		if !strings.HasSuffix(l.Description, ".") {
			t.Errorf("the schema does not describe %s in a sentence", l.path)
		}
		if l.Type == "" && l.Enum == nil {
			t.Errorf("%s may be anything", l.path)
		}
		delete(defaults, l.path)
	}
	for path := range defaults {
		t.Errorf("the schema lacks %s", path)
	}
}

const (
	operations = root + "/docs/operations.md"
	tableBegin = "<!-- Chart values, from values.schema.json by make manifests; do not edit. -->\n"
	tableEnd   = "<!-- end of the chart's values -->\n"
)

func TestTheDocumentedValuesAreTheChartsOwn(t *testing.T) {
	var table strings.Builder
	defaults := values(t)
	table.WriteString("| value | default | meaning |\n|---|---|---|\n")
	for _, l := range schemaLeaves(t) {
		text, err := json.Marshal(defaults[l.path])
		if err != nil {
			t.Fatal(err)
		}
		value := "`" + string(text) + "`"
		if len(value) > 42 {
			value = "see values.yaml"
		}
		meaning := l.Description
		for n, v := range l.Enum {
			if n == 0 {
				meaning += " One of"
			}
			meaning += fmt.Sprintf(" `%v`", v)
		}
		fmt.Fprintf(&table, "| `%s` | %s | %s |\n", l.path, value, strings.ReplaceAll(meaning, "|", `\|`))
	}
	page, err := os.ReadFile(operations)
	if err != nil {
		t.Fatal(err)
	}
	before, rest, begun := strings.Cut(string(page), tableBegin)
	got, after, ended := strings.Cut(rest, tableEnd)
	if !begun || !ended {
		t.Fatalf("%s has no table of values", operations)
	}
	if *update {
		if err := os.WriteFile(operations, []byte(before+tableBegin+table.String()+tableEnd+after), 0o644); err != nil {
			t.Fatal(err)
		}
		return
	}
	if diff := cmp.Diff(got, table.String()); diff != "" {
		t.Errorf("%s does not say what the schema says; run make manifests\n%s", operations, diff)
	}
}

func TestNoRuleIsBroaderThanItMustBe(t *testing.T) {
	all := rendered(t)
	checked := 0
	for key := range all {
		if !strings.HasPrefix(key, "ClusterRole/") && !strings.HasPrefix(key, "Role/") {
			continue
		}
		for _, rule := range as[rbacv1.ClusterRole](t, all, key).Rules {
			checked++
			if slices.Contains(rule.Verbs, "*") || slices.Contains(rule.Resources, "*") || slices.Contains(rule.APIGroups, "*") {
				t.Errorf("%s has a rule for everything: %v", key, rule)
			}
			for _, resource := range rule.Resources {
				// Which pull secrets a ServiceAccount names may be read; it may not be
				// changed, and no token of it be had.
				if resource == "serviceaccounts" && slices.Equal(rule.Verbs, []string{"list", "watch"}) {
					continue
				}
				// The values of functions' secrets are Secrets of any namespace; the
				// API's own certificate is one it renews.
				if resource == "secrets" && (key == "ClusterRole/hearth-api" && slices.Equal(rule.Verbs, []string{"get", "list", "watch", "create", "patch", "delete"}) ||
					key == "Role/hearth-api" && slices.Equal(rule.Verbs, []string{"update"})) {
					continue
				}
				if strings.Contains(resource, "secret") || strings.Contains(resource, "serviceaccount") || strings.Contains(resource, "role") ||
					resource == "pods/exec" || resource == "nodes/proxy" {
					t.Errorf("%s has a rule about %s: %v", key, resource, rule)
				}
			}
			for _, verb := range rule.Verbs {
				if verb == "impersonate" || verb == "escalate" || verb == "bind" {
					t.Errorf("%s may %s: %v", key, verb, rule)
				}
			}
			if len(rule.NonResourceURLs) > 0 {
				t.Errorf("%s has a rule about paths: %v", key, rule)
			}
		}
	}
	if checked < 5 {
		t.Errorf("only %d rules were looked at", checked)
	}
}

// TestRolesAreOfTheReleasesNamespace: every subject and every name in a policy
// follows the release, or the rules would bind somebody else's account.
func TestRolesAreOfTheReleasesNamespace(t *testing.T) {
	manifest, err := render(t, "--namespace", "elsewhere")
	if err != nil {
		t.Fatal(err)
	}
	if at := strings.Index(manifest, "hearth-system"); at >= 0 {
		t.Errorf("the namespace of the default is still named: …%s", manifest[max(0, at-200):min(len(manifest), at+100)])
	}
	all := parse(t, manifest)
	accounts := 0
	for key := range all {
		if !strings.HasSuffix(strings.SplitN(key, "/", 2)[0], "RoleBinding") {
			continue
		}
		for _, subject := range as[rbacv1.ClusterRoleBinding](t, all, key).Subjects {
			accounts++
			if subject.Kind != "ServiceAccount" || subject.Namespace != "elsewhere" {
				t.Errorf("%s binds %v", key, subject)
			}
			if _, ok := all["ServiceAccount/"+subject.Name]; !ok {
				t.Errorf("%s binds %s, which the chart does not make", key, subject.Name)
			}
		}
	}
	if accounts == 0 {
		t.Error("nobody is bound to anything")
	}
}

func TestTheAgentHasNoMorePowerThanItNeeds(t *testing.T) {
	pod := as[appsv1.DaemonSet](t, rendered(t), "DaemonSet/hearth-nodeagent").Spec.Template.Spec
	// The host's processes: containerd names its own and those of probes so.
	if !pod.HostPID || pod.HostIPC || !pod.HostNetwork {
		t.Errorf("hostPID %v, hostIPC %v, hostNetwork %v", pod.HostPID, pod.HostIPC, pod.HostNetwork)
	}
	if len(pod.Containers) != 1 || len(pod.InitContainers) != 0 {
		t.Fatalf("%d containers, %d before them", len(pod.Containers), len(pod.InitContainers))
	}
	confined(t, pod.Containers[0], []corev1.Capability{"CHOWN", "DAC_OVERRIDE", "FOWNER", "KILL", "SETGID", "SETUID", "SYS_CHROOT", "SYS_PTRACE"})
	writable := map[string]bool{}
	for _, mount := range pod.Containers[0].VolumeMounts {
		if !mount.ReadOnly {
			writable[hostPath(pod, mount.Name)] = true
		}
	}
	if diff := cmp.Diff(map[string]bool{"": true, "/run/hearth": true, "/var/lib/hearth": true}, writable); diff != "" {
		t.Errorf("what the agent can write to: %s", diff)
	}
	tolerated := false
	for _, toleration := range pod.Tolerations {
		tolerated = tolerated || toleration.Operator == corev1.TolerationOpExists && (toleration.Key == "" || toleration.Key == v1alpha1.TaintNotReady)
	}
	if !tolerated {
		t.Error("the agent does not run on a node with the startup taint, which it alone removes")
	}
}

func TestTheEngineHasNoPowerAtAll(t *testing.T) {
	all := rendered(t)
	pod := as[appsv1.DaemonSet](t, all, "DaemonSet/hearth-engine").Spec.Template.Spec
	if pod.HostPID || pod.HostIPC || pod.HostNetwork {
		t.Errorf("hostPID %v, hostIPC %v, hostNetwork %v", pod.HostPID, pod.HostIPC, pod.HostNetwork)
	}
	account := as[corev1.ServiceAccount](t, all, "ServiceAccount/hearth-engine")
	for what, automount := range map[string]*bool{"pod": pod.AutomountServiceAccountToken, "account": account.AutomountServiceAccountToken} {
		if automount == nil || *automount {
			t.Errorf("the %s mounts a token", what)
		}
	}
	for key := range all {
		if strings.HasSuffix(strings.SplitN(key, "/", 2)[0], "RoleBinding") {
			for _, subject := range as[rbacv1.ClusterRoleBinding](t, all, key).Subjects {
				if subject.Name == "hearth-engine" {
					t.Errorf("%s gives the engine a role", key)
				}
			}
		}
	}
	if s := pod.SecurityContext; s == nil || s.RunAsNonRoot == nil || !*s.RunAsNonRoot || s.RunAsUser == nil || *s.RunAsUser == 0 {
		t.Error("the engine may be root")
	}
	if len(pod.Containers) != 1 || len(pod.InitContainers) != 0 {
		t.Fatalf("%d containers, %d before them", len(pod.Containers), len(pod.InitContainers))
	}
	confined(t, pod.Containers[0], nil)
	for _, mount := range pod.Containers[0].VolumeMounts {
		path := hostPath(pod, mount.Name)
		switch {
		case path == "", path == "/run/hearth/engine":
		case path == "/var/lib/hearth/store" && mount.ReadOnly:
		default:
			t.Errorf("the engine sees the host's %s (read-only: %v)", path, mount.ReadOnly)
		}
	}
	for _, volume := range pod.Volumes {
		if volume.Secret != nil || volume.Projected != nil || volume.ConfigMap != nil {
			t.Errorf("the engine has the volume %s", volume.Name)
		}
	}
	policy := as[networkingv1.NetworkPolicy](t, all, "NetworkPolicy/hearth-engine")
	denied := false
	for _, rule := range policy.Spec.Egress {
		if len(rule.To) == 0 {
			t.Error("a rule without a peer allows everything")
		}
		for _, peer := range rule.To {
			denied = denied || peer.IPBlock != nil && slices.Contains(peer.IPBlock.Except, "169.254.169.254/32")
		}
	}
	labels := as[appsv1.DaemonSet](t, all, "DaemonSet/hearth-engine").Spec.Template.Labels
	for key, value := range policy.Spec.PodSelector.MatchLabels {
		if labels[key] != value {
			t.Errorf("the policy is for pods with %s=%s, the engine's have %q", key, value, labels[key])
		}
	}
	if !denied {
		t.Error("the engine reaches instance metadata")
	}
}

func TestTheAPIIsNobodyOnItsNode(t *testing.T) {
	pod := as[appsv1.Deployment](t, rendered(t), "Deployment/hearth-api").Spec.Template.Spec
	if pod.HostPID || pod.HostIPC || pod.HostNetwork || len(pod.Containers) != 1 {
		t.Errorf("hostPID %v, hostIPC %v, hostNetwork %v, %d containers", pod.HostPID, pod.HostIPC, pod.HostNetwork, len(pod.Containers))
	}
	confined(t, pod.Containers[0], nil)
	if c := pod.SecurityContext; c == nil || c.RunAsNonRoot == nil || !*c.RunAsNonRoot || c.RunAsUser == nil || *c.RunAsUser == 0 {
		t.Errorf("it may be root: %+v", pod.SecurityContext)
	}
	for _, v := range pod.Volumes {
		if v.HostPath != nil {
			t.Errorf("it sees %s of the host", v.HostPath.Path)
		}
	}
}

// TestTheAPIsHostHasTLS: callers show it their tokens.
func TestTheAPIsHostHasTLS(t *testing.T) {
	for name, tt := range map[string]struct {
		set  string
		want []networkingv1.IngressTLS
	}{
		"unless it is said otherwise": {"api.host=api.example.com", []networkingv1.IngressTLS{{Hosts: []string{"api.example.com"}}}},
		"with a certificate of one's own": {
			"api.host=api.example.com,api.tls.secretName=cert",
			[]networkingv1.IngressTLS{{Hosts: []string{"api.example.com"}, SecretName: "cert"}},
		},
		"except where that is done before": {"api.host=api.example.com,api.tls.enabled=false", nil},
	} {
		t.Run(name, func(t *testing.T) {
			got := as[networkingv1.Ingress](t, rendered(t, "--set", tt.set), "Ingress/hearth-api").Spec.TLS
			if diff := cmp.Diff(tt.want, got); diff != "" {
				t.Error(diff)
			}
		})
	}
}

func TestHostsCannotBeGuardedBelowADomainNobodyKnows(t *testing.T) {
	if _, err := render(t, "--set", "api.guardHosts=true"); err == nil || !strings.Contains(err.Error(), "engine.baseDomain") {
		t.Errorf("got %v", err)
	}
}

func TestWithoutTheAPINothingOfItIsLeft(t *testing.T) {
	manifest, err := render(t, "--set", "api.enabled=false")
	if err != nil {
		t.Fatal(err)
	}
	for _, left := range []string{"Deployment", "HEARTH_API_URL", "serviceAccountToken"} {
		if strings.Contains(manifest, left) {
			t.Errorf("%s is left", left)
		}
	}
}

func TestWithoutTheEngineNothingOfItIsLeft(t *testing.T) {
	for key := range rendered(t, "--set", "engine.enabled=false") {
		if strings.Contains(key, "engine") {
			t.Errorf("%s is still there", key)
		}
	}
}

func TestRuntimeClassesSendPodsToProvenNodes(t *testing.T) {
	all := rendered(t)
	found := 0
	for key := range all {
		if strings.HasPrefix(key, "RuntimeClass/") {
			found++
			class := as[nodev1.RuntimeClass](t, all, key)
			want := map[string]string{"hearth.sh/runtime-" + strings.TrimPrefix(class.Name, "hearth-"): "true"}
			if class.Scheduling == nil || !maps.Equal(class.Scheduling.NodeSelector, want) {
				t.Errorf("%s: %+v", key, class.Scheduling)
			}
		}
	}
	if found == 0 {
		t.Error("there are none")
	}
}

// confined checks what holds for every container.
func confined(t *testing.T, container corev1.Container, capabilities []corev1.Capability) {
	t.Helper()
	s := container.SecurityContext
	switch {
	case s == nil || s.Capabilities == nil:
		t.Fatalf("%s has no security context", container.Name)
	case s.Privileged != nil && *s.Privileged:
		t.Errorf("%s is privileged", container.Name)
	case s.AllowPrivilegeEscalation == nil || *s.AllowPrivilegeEscalation:
		t.Errorf("%s may gain privileges", container.Name)
	case s.ReadOnlyRootFilesystem == nil || !*s.ReadOnlyRootFilesystem:
		t.Errorf("%s can write to its image", container.Name)
	case !slices.Equal(s.Capabilities.Drop, []corev1.Capability{"ALL"}):
		t.Errorf("%s keeps the runtime's capabilities", container.Name)
	}
	if diff := cmp.Diff(capabilities, s.Capabilities.Add); diff != "" {
		t.Errorf("capabilities of %s: %s", container.Name, diff)
	}
	if container.Resources.Limits.Memory().IsZero() {
		t.Errorf("%s has no memory limit", container.Name)
	}
	for name, probe := range map[string]*corev1.Probe{"liveness": container.LivenessProbe, "readiness": container.ReadinessProbe, "startup": container.StartupProbe} {
		if probe == nil {
			t.Errorf("%s has no %s probe", container.Name, name)
		}
	}
}

// hostPath is where a volume is on the host; empty when it is not.
func hostPath(pod corev1.PodSpec, volume string) string {
	for _, v := range pod.Volumes {
		if v.Name == volume && v.HostPath != nil {
			return v.HostPath.Path
		}
	}
	return ""
}
