package bootstrap_test

import (
	"crypto/sha256"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"sigs.k8s.io/yaml"

	"github.com/hearth-sh/hearth/packaging/chart"
	"github.com/hearth-sh/hearth/test/cluster"
	"github.com/hearth-sh/hearth/test/machine"
)

// pulls is what makes userData's nodes pull the image of our chart's pods.
const pulls = "  addons:\n    hearth: {values: {image: {repository: hearth.sh/nodeagent}}}\n"

// withImage is userData for nodes that get the image as an artifact: one that
// `make image` would make for both processors and this bootstrap, with programs
// that do nothing.
func (l *lab) withImage(pool string) string {
	l.t.Helper()
	out := l.t.TempDir()
	archive := filepath.Join(out, "image.tar")
	argv := []string{"run", "./packaging/image", "-name", "hearth.sh/nodeagent:" + chart.ImageTag(l.version()), "-output", filepath.Join(out, "layout"), "-archive", archive}
	for _, arch := range []string{"arm64", "amd64"} {
		dir := filepath.Join(out, arch)
		if err := os.Mkdir(dir, 0o755); err != nil {
			l.t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(dir, "nodeagent"), []byte("#!/bin/sh\n"), 0o755); err != nil {
			l.t.Fatal(err)
		}
		argv = append(argv, "linux/"+arch+"="+dir)
	}
	build := exec.CommandContext(l.t.Context(), "go", argv...)
	build.Dir, build.Env = "../..", append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		l.t.Fatalf("%v: %s", err, out)
	}
	content, err := os.ReadFile(archive)
	if err != nil {
		l.t.Fatal(err)
	}
	if err := l.put(l.t.Context(), filesBucket, l.name+"-image.tar", content); err != nil {
		l.t.Fatal(err)
	}
	pulled := l.userData(pool, "")
	const list = "\n        manifest: "
	files := fmt.Sprintf("\n        files: [{name: hearth-image, urls: [s3://%s/%s-image.tar], sha256: %x}]", filesBucket, l.name, sha256.Sum256(content))
	given := strings.Replace(strings.Replace(pulled, strings.TrimRight(indent(pulls, "    "), "\n")+"\n", "", 1), list, files+list, 1)
	if len(given) != len(pulled)+len(files)-len(indent(pulls, "    "))-1 {
		l.t.Fatalf("the user-data has no place for it:\n%s", pulled)
	}
	return given
}

// version is what this lab's bootstrap says of itself.
func (l *lab) version() string {
	l.t.Helper()
	binary, err := cluster.GoBinary(l.t.Context(), "./cmd/bootstrap")
	if err != nil {
		l.t.Fatal(err)
	}
	out, err := exec.CommandContext(l.t.Context(), binary, "--version").Output()
	if err != nil {
		l.t.Fatal(err)
	}
	words := strings.Fields(string(out))
	return words[len(words)-1]
}

// hasTheChartsImage compares what containerd has with what the chart, as
// bootstrap gave it to k3s, will run: else nodes would stay tainted for ever.
func hasTheChartsImage(t *testing.T, m *machine.Machine) {
	t.Helper()
	manifest, err := os.ReadFile(m.Path("/var/lib/rancher/k3s/server/manifests/hearth-addon.yaml"))
	if err != nil {
		t.Fatal(err)
	}
	var object struct {
		Spec struct {
			ValuesContent string `json:"valuesContent"`
		} `json:"spec"`
	}
	var given, defaults struct {
		Image struct {
			Repository string `json:"repository"`
			Tag        string `json:"tag"`
		} `json:"image"`
	}
	if err := yaml.Unmarshal(manifest, &object); err != nil {
		t.Fatal(err)
	}
	if err := yaml.Unmarshal([]byte(object.Spec.ValuesContent), &given); err != nil {
		t.Fatal(err)
	}
	values, err := os.ReadFile("../../packaging/chart/hearth/values.yaml")
	if err != nil {
		t.Fatal(err)
	}
	if err := yaml.Unmarshal(values, &defaults); err != nil {
		t.Fatal(err)
	}
	want := defaults.Image.Repository + ":" + given.Image.Tag
	images, err := m.Exec(t.Context(), "k3s", "ctr", "--namespace", "k8s.io", "images", "ls", "-q")
	if err != nil || given.Image.Tag == "" || !strings.Contains("\n"+images+"\n", "\n"+want+"\n") {
		t.Errorf("the chart runs %s, and there are %q: %v", want, images, err)
	}
}
