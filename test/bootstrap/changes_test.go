package bootstrap_test

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
	"sigs.k8s.io/yaml"

	"github.com/hearth-sh/hearth/api/v1alpha1"
	"github.com/hearth-sh/hearth/internal/artifact"
	"github.com/hearth-sh/hearth/internal/bootstrap"
	"github.com/hearth-sh/hearth/internal/imds/imdstest"
	installed "github.com/hearth-sh/hearth/internal/k3s"
	"github.com/hearth-sh/hearth/packaging/chart"
	"github.com/hearth-sh/hearth/test/cluster"
	"github.com/hearth-sh/hearth/test/k3s"
	"github.com/hearth-sh/hearth/test/machine"
	"github.com/hearth-sh/hearth/test/shims"
)

const (
	// addonManifest is our addon's on servers.
	addonManifest = "/var/lib/rancher/k3s/server/manifests/hearth-addon.yaml"
	shimPath      = binDir + "/containerd-shim-wasmtime-v1"
)

// TestAClusterLivesWithItsAddonAndItsChanges has a server and an agent that came
// up from user-data alone, and an agent whose image brought everything. What the server gives k3s as our addon takes the
// startup taint away; an agent follows its NodeConfig; and another machine is
// told why it cannot join.
func TestAClusterLivesWithItsAddonAndItsChanges(t *testing.T) {
	t.Parallel()
	l := newLab(t, "changes")
	l.lease = "5m"
	image := l.agentImage(t)
	files := l.publishFile(t, "hearth-image", l.name+"-image.tar", image)
	pool := func(pool string) string {
		data := strings.Replace(l.userData(pool, ""), strings.TrimRight(indent(pulls, "    "), "\n")+"\n", "", 1)
		return strings.Replace(data, "\n        manifest: ", "\n        files:\n        - "+files+"\n        manifest: ", 1)
	}
	server := l.add("server", pool("control-plane"), machine.Spec{})
	worker := l.add("worker", pool("wasm"), machine.Spec{})
	_, config, _ := strings.Cut(pool("wasm"), "content: |\n")
	config, _, _ = strings.Cut(config, "bootcmd:")
	baked := l.baked(t, "baked", image, strings.ReplaceAll(strings.TrimPrefix(config, "    "), "\n    ", "\n"))
	joiner := l.bare("joiner", machine.Spec{})
	for _, m := range []*machine.Machine{server, worker, baked} {
		l.boot(m)
	}
	for _, m := range []*machine.Machine{server, worker, baked} {
		r := l.succeeded(m)
		t.Logf("%s is a node: %s", m.Name, phases(r))
		theJournalHasTheResult(t, m, r)
	}
	l.downloadedNothing(t, baked)
	kube := client(t, server)
	for _, part := range []struct {
		name string
		do   func(*testing.T)
	}{
		{"the addon takes the startup taint away", func(t *testing.T) { l.theAddonUntaints(t, kube, server, worker) }},
		{"a node follows its configuration", func(t *testing.T) { l.followsItsConfiguration(t, kube, worker) }},
		{"an edited file comes back, and the console says so", func(t *testing.T) { l.putsBackWhatWasEdited(t, worker) }},
		{"an addon that is switched off goes", func(t *testing.T) { l.dropsAnAddon(t, server) }},
		{"joining", func(t *testing.T) { l.whyNobodyJoins(t, server, worker, joiner) }},
	} {
		t.Run(part.name, part.do)
	}
}

// agentImage is an archive with the image of our chart's pods.
func (l *lab) agentImage(t *testing.T) []byte {
	t.Helper()
	agent, err := cluster.GoBinary(t.Context(), "./cmd/nodeagent")
	if err != nil {
		t.Fatal(err)
	}
	image, err := cluster.BinaryImage(map[string]string{"/usr/bin/nodeagent": agent}, "/usr/bin/nodeagent")
	if err != nil {
		t.Fatal(err)
	}
	archive := filepath.Join(t.TempDir(), "image.tar")
	if err := k3s.WriteImages(archive, map[string]v1.Image{"hearth.sh/nodeagent:" + chart.ImageTag(l.version()): image}); err != nil {
		t.Fatal(err)
	}
	content, err := os.ReadFile(archive)
	if err != nil {
		t.Fatal(err)
	}
	return content
}

// publishFile puts a file into S3 and returns its entry for spec.artifacts.files.
func (l *lab) publishFile(t *testing.T, name, key string, content []byte) string {
	t.Helper()
	if err := l.put(t.Context(), filesBucket, key, content); err != nil {
		t.Fatal(err)
	}
	return fmt.Sprintf("{name: %s, sha256: %x, urls: [%q]}", name, sha256.Sum256(content), "s3://"+filesBucket+"/"+key)
}

// theJournalHasTheResult looks for the fields that docs/bootstrap.md promises.
func theJournalHasTheResult(t *testing.T, m *machine.Machine, r bootstrap.Result) {
	t.Helper()
	out, err := m.Command(t.Context(), "journalctl", "--unit=hearth-bootstrap", "--output=json", "--all", "--no-pager").Output()
	if err != nil {
		t.Fatal(err)
	}
	durations := map[string]string{}
	var said *bootstrap.Result
	for line := range bytes.Lines(out) {
		var fields map[string]any
		if err := json.Unmarshal(line, &fields); err != nil {
			t.Fatalf("%v: %s", err, line)
		}
		duration, _ := fields["HEARTH_DURATION_MS"].(string)
		if document, ok := fields["HEARTH_RESULT"].(string); ok && fields["HEARTH_RUN"] == r.Run {
			said = &bootstrap.Result{}
			if err := json.Unmarshal([]byte(document), said); err != nil {
				t.Errorf("HEARTH_RESULT is no result: %v: %s", err, document)
			}
			if duration != fmt.Sprint(r.DurationMS) || fields["HEARTH_OUTCOME"] != string(r.Outcome) {
				t.Errorf("beside HEARTH_RESULT there is %v", fields)
			}
		} else if phase, ok := fields["HEARTH_PHASE"].(string); ok {
			durations[phase] = duration
		}
	}
	if said == nil || said.Run != r.Run || said.Node.Name != m.InstanceID || len(said.Phases) != len(r.Phases) {
		t.Errorf("the journal of %s has the result %+v", m.Name, said)
	}
	for _, p := range r.Phases {
		if durations[string(p.Name)] != fmt.Sprint(p.DurationMS) {
			t.Errorf("the journal of %s says that phase %s took %q ms, the result %d", m.Name, p.Name, durations[string(p.Name)], p.DurationMS)
		}
	}
}

// theAddonUntaints does what k3s's Helm controller does with the HelmChart that
// the API server has: nothing of it is known to the test.
func (l *lab) theAddonUntaints(t *testing.T, kube kubernetes.Interface, server, worker *machine.Machine) {
	var charts struct {
		Items []struct {
			Metadata metav1.ObjectMeta
			Spec     struct{ ChartContent, ValuesContent, TargetNamespace string }
		}
	}
	waitFor(t, server, "the HelmChart to be in the API", func(ctx context.Context) (bool, error) {
		list, err := kube.Discovery().RESTClient().Get().AbsPath("/apis/helm.cattle.io/v1/namespaces/kube-system/helmcharts").DoRaw(ctx)
		if err != nil {
			return false, nil
		}
		return json.Unmarshal(list, &charts) == nil && len(charts.Items) > 0, nil
	})
	if len(charts.Items) != 1 || charts.Items[0].Metadata.Name != "hearth" {
		t.Fatalf("the HelmCharts are %+v", charts.Items)
	}
	given := charts.Items[0].Spec
	taints := nodes(t, kube)[worker.InstanceID].Spec.Taints
	if !slices.ContainsFunc(taints, func(t corev1.Taint) bool { return t.Key == v1alpha1.TaintNotReady }) {
		t.Errorf("before anybody proved it, the worker has the taints %v", taints)
	}
	archive, err := base64.StdEncoding.DecodeString(given.ChartContent)
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	for name, content := range map[string][]byte{"chart.tgz": archive, "values.yaml": []byte(given.ValuesContent)} {
		if err := os.WriteFile(filepath.Join(dir, name), content, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	render := exec.CommandContext(t.Context(), helm(t), "template", "hearth", filepath.Join(dir, "chart.tgz"), "--values", filepath.Join(dir, "values.yaml"),
		"--namespace", given.TargetNamespace, "--include-crds", "--kube-version", "1.36.3")
	var stderr strings.Builder
	render.Stderr = &stderr
	manifest, err := render.Output()
	if err != nil {
		t.Fatalf("%v: %s", err, stderr.String())
	}
	head := fmt.Sprintf("apiVersion: v1\nkind: Namespace\nmetadata: {name: %s}\n---\n", given.TargetNamespace)
	if err := server.WriteFile("/var/lib/rancher/k3s/server/manifests/rendered.yaml", append([]byte(head), manifest...), 0o600); err != nil {
		t.Fatal(err)
	}
	defer func() {
		if t.Failed() {
			pods, _ := kube.CoreV1().Pods(given.TargetNamespace).List(context.WithoutCancel(t.Context()), metav1.ListOptions{})
			for _, p := range pods.Items {
				t.Logf("%s on %s: %+v", p.Name, p.Spec.NodeName, p.Status)
			}
		}
	}()
	waitFor(t, server, "all nodes to lose the startup taint", func(context.Context) (bool, error) {
		for _, n := range nodes(t, kube) {
			if slices.ContainsFunc(n.Spec.Taints, func(t corev1.Taint) bool { return t.Key == v1alpha1.TaintNotReady }) {
				return false, nil
			}
		}
		return true, nil
	})
	n := nodes(t, kube)[worker.InstanceID]
	if n.Labels[v1alpha1.RuntimeLabelPrefix+"wasmtime"] != "true" {
		t.Errorf("the worker's labels are %v", n.Labels)
	}
	// A pod like anybody's, which the scheduler places.
	pod := &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Name: "ordinary"}, Spec: corev1.PodSpec{
		AutomountServiceAccountToken: new(bool), TerminationGracePeriodSeconds: new(int64),
		Containers: []corev1.Container{{Name: "pause", Image: k3s.PauseImage, ImagePullPolicy: corev1.PullIfNotPresent}},
	}}
	if _, err := kube.CoreV1().Pods(metav1.NamespaceDefault).Create(t.Context(), pod, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	waitPod(t, server, kube, pod.Name, true)
}

// helm is the program that `make packaging-tools` makes.
func helm(t *testing.T) string {
	t.Helper()
	path, err := filepath.Abs("../../bin/helm")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(path); err != nil {
		build := exec.CommandContext(t.Context(), "go", "build", "-trimpath", "-o", path, "helm.sh/helm/v4/cmd/helm")
		build.Dir, build.Env = "../../packaging/tools", append(os.Environ(), "CGO_ENABLED=0")
		if out, err := build.CombinedOutput(); err != nil {
			t.Fatalf("build helm: %v\n%s", err, out)
		}
	}
	return path
}

// starts is how often systemd has begun to start a unit since the machine booted.
func starts(t *testing.T, m *machine.Machine, unit string) int {
	t.Helper()
	out, err := m.Exec(t.Context(), "sh", "-c", "journalctl --boot --no-pager --quiet --output=cat MESSAGE_ID=7d4958e842da4a758f6c1cdc7b36dcc5 UNIT="+unit)
	if err != nil {
		t.Fatal(err)
	}
	return strings.Count(out, "\n")
}

// edit changes the NodeConfig in a machine's user-data, which goes before what
// its first boot made of it. It is given as it stands in a file.
func edit(t *testing.T, m *machine.Machine, replace ...string) {
	t.Helper()
	for i, lines := range replace {
		if lines != "" {
			replace[i] = indent(lines, "    ") + "\n"
		}
	}
	m.IMDS.Update(func(c *imdstest.Config) {
		changed := strings.NewReplacer(replace...).Replace(c.UserData)
		if changed == c.UserData {
			t.Errorf("there is nothing to replace in\n%s", changed)
		}
		c.UserData = changed
	})
}

// planned is `bootstrap plan` of a machine that runs from user-data, and what
// would change: paths, and what happens to units.
func (l *lab) planned(t *testing.T, m *machine.Machine) (paths, units []string) {
	t.Helper()
	out, err := m.Command(t.Context(), "env", "AWS_ENDPOINT_URL="+l.aws, "bootstrap", "plan", "-o", "json").Output()
	if err != nil {
		t.Fatalf("plan: %v: %s", err, out)
	}
	var p bootstrap.Plan
	if err := json.Unmarshal(out, &p); err != nil {
		t.Fatal(err)
	}
	for _, f := range p.Files {
		if f.Changed() {
			paths = append(paths, f.Path)
		}
	}
	for _, d := range p.Downloads {
		if d.State != artifact.StatePresent {
			paths = append(paths, d.Path)
		}
	}
	paths = append(paths, p.Retired...)
	for _, u := range p.Units {
		units = append(units, u.Action+" "+u.Name)
	}
	slices.Sort(paths)
	if p.Changes != (len(paths)+len(units) > 0) {
		t.Errorf("the plan says changes %t with %q and %q", p.Changes, paths, units)
	}
	return paths, units
}

// converges runs bootstrap and holds what happened to what was planned: these
// files and no others, and that many restarts of k3s.
func (l *lab) converges(t *testing.T, m *machine.Machine, unit string, restarts int, want ...string) bootstrap.Result {
	t.Helper()
	slices.Sort(want)
	paths, units := l.planned(t, m)
	wantUnits := slices.Repeat([]string{"restart " + unit}, restarts)
	if !slices.Equal(paths, want) || !slices.Equal(units, wantUnits) {
		t.Errorf("the plan changes %q and does %q, not %q and %q", paths, units, want, wantUnits)
	}
	all := func() files {
		on := tree(t, m, "/etc")
		maps.Copy(on, tree(t, m, "/usr/local"))
		// k3s writes the administrator's anew at each start.
		maps.DeleteFunc(on, func(path, what string) bool { return strings.HasPrefix(what, "d") || path == k3s.Kubeconfig })
		for _, path := range want {
			on[path] = ""
			if sum, err := digest(m.Path(path)); err == nil {
				on[path] = sum
			}
		}
		return on
	}
	before, began := all(), starts(t, m, unit)
	if out, err := m.Exec(t.Context(), "systemctl", "restart", "hearth-bootstrap"); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	r, err := result(t.Context(), m)
	if err != nil || r.Outcome != bootstrap.OutcomeSucceeded || !r.Changed {
		t.Errorf("the run: %v, %+v", err, r)
	}
	t.Logf("the run took %d ms: %s; %q", r.DurationMS, phases(r), r.Warnings)
	after := all()
	for _, path := range want {
		if before[path] == after[path] {
			t.Errorf("%s is what it was", path)
		}
		delete(before, path)
		delete(after, path)
		delete(after, path+".edited") // what somebody made of it is kept
	}
	before.compare(t, after)
	if n := starts(t, m, unit) - began; n != restarts {
		t.Errorf("%s was started %d times, not %d", unit, n, restarts)
	}
	if paths, units := l.planned(t, m); len(paths)+len(units) > 0 {
		t.Errorf("a plan after the run still changes %q and does %q", paths, units)
	}
	return r
}

// followsItsConfiguration changes a label, a mirror and the digest of a shim at
// once: one restart is enough for all. Then a label goes again.
func (l *lab) followsItsConfiguration(t *testing.T, kube kubernetes.Interface, worker *machine.Machine) {
	wasm, err := shims.Compile(t.Context(), os.Stderr)
	if err != nil {
		t.Fatal(err)
	}
	shim, err := os.ReadFile(wasm.Wasmtime)
	if err != nil {
		t.Fatal(err)
	}
	shim = append(shim, "another release\n"...) // what is behind its end, no program minds
	entry := l.publishFile(t, "containerd-shim-wasmtime-v1", l.name+"-shim", shim)
	edit(t, worker,
		"  shims:\n", "  node:\n    labels: {team: red}\n  registries:\n    mirrors:\n      docker.io: {endpoints: [\"http://mirror.hearth.test\"]}\n  shims:\n",
		"    files:\n", "    files:\n    - "+entry+"\n")
	r := l.converges(t, worker, "k3s-agent.service", 1, installed.HearthConfig, "/etc/rancher/k3s/registries.yaml", shimPath)
	if !slices.Equal(r.Node.Proven, []string{"wasmtime"}) {
		t.Errorf("after the change it proved %q", r.Node.Proven)
	}
	if sum, err := digest(worker.Path(shimPath)); err != nil || sum != fmt.Sprintf("%x", sha256.Sum256(shim)) {
		t.Errorf("the shim is %s: %v", sum, err)
	}
	n := nodes(t, kube)[worker.InstanceID]
	if !ready(n) || n.Labels["team"] != "red" || n.Labels["hearth.sh/pool"] != "wasm" {
		t.Errorf("ready %t, labels %v", ready(n), n.Labels)
	}
	var mirrors struct{ Mirrors map[string]any }
	content, err := os.ReadFile(worker.Path("/etc/rancher/k3s/registries.yaml"))
	if err != nil || yaml.Unmarshal(content, &mirrors) != nil || mirrors.Mirrors["docker.io"] == nil {
		t.Errorf("the mirrors are %s: %v", content, err)
	}

	edit(t, worker, "  node:\n    labels: {team: red}\n", "")
	l.converges(t, worker, "k3s-agent.service", 1, installed.HearthConfig)
	if team, still := nodes(t, kube)[worker.InstanceID].Labels["team"]; still {
		t.Errorf("the label that went is %q", team)
	}
}

// putsBackWhatWasEdited edits a file that k3s was started from and one of the
// kernel's: both come back, and nothing has to be restarted for it. The machine's
// console is a terminal here, which it has to be for journald to write to it.
func (l *lab) putsBackWhatWasEdited(t *testing.T, worker *machine.Machine) {
	const unit, said = "/etc/systemd/system/k3s-agent.service", "/var/tmp/console"
	ctx, cancel := context.WithCancel(t.Context())
	terminal := worker.Command(ctx, "script", "--quiet", "--flush", "--command", `touch /dev/console && mount --bind "$(tty)" /dev/console && exec sleep infinity`, said)
	if err := terminal.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() {
		cancel()
		_ = terminal.Wait() // killed
		if out, err := worker.Exec(t.Context(), "sh", "-c", "umount /dev/console && rm /dev/console"); err != nil {
			t.Errorf("%v: %s", err, out)
		}
	}()
	waitFor(t, worker, "the console to be a terminal", func(ctx context.Context) (bool, error) {
		_, err := worker.Exec(ctx, "sh", "-c", "test -t 0 </dev/console")
		return err == nil, nil
	})
	content, err := os.ReadFile(worker.Path(unit))
	if err != nil {
		t.Fatal(err)
	}
	if err := worker.WriteFile(unit, append(content, "# somebody was here\n"...), 0o644); err != nil {
		t.Fatal(err)
	}
	r := l.converges(t, worker, "k3s-agent.service", 0, unit)
	if kept, err := os.ReadFile(worker.Path(unit + ".edited")); err != nil || !bytes.HasSuffix(kept, []byte("was here\n")) {
		t.Errorf("what was edited is not kept: %v", err)
	}
	waitFor(t, worker, "the end of the run to be on the console", func(context.Context) (bool, error) {
		out, err := os.ReadFile(worker.Path(said))
		return err == nil && strings.Contains(string(out), "hearth done in "), nil
	})
	out, err := os.ReadFile(worker.Path(said))
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("the console says\n%s", out)
	for _, p := range r.Phases {
		if !strings.Contains(string(out), " "+string(p.Name)) {
			t.Errorf("phase %s is not on the console", p.Name)
		}
	}
}

// dropsAnAddon switches our addon off on the server: the manifest goes, k3s runs
// on, and bootstrap says what stays in the cluster.
func (l *lab) dropsAnAddon(t *testing.T, server *machine.Machine) {
	edit(t, server, "  shims:\n", "  addons: {hearth: {enabled: false}}\n  shims:\n")
	// The startup taint goes from its configuration, too, which k3s reads when it starts.
	r := l.converges(t, server, "k3s.service", 1, addonManifest, installed.HearthConfig)
	if !slices.ContainsFunc(r.Warnings, func(w string) bool { return strings.Contains(w, "kubectl -n kube-system delete helmchart hearth") }) {
		t.Errorf("nothing is said of what stays: %q", r.Warnings)
	}
}
