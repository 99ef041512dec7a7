package packaging_test

import (
	"os"
	"os/exec"
	"strings"
	"testing"

	"sigs.k8s.io/yaml"

	embedded "github.com/hearth-sh/hearth/packaging/chart"
	"github.com/hearth-sh/hearth/test/needs"
)

// TestTheImageHasTheNameThatBootstrapAsksFor: the chart's repository with the tag
// that bootstrap of the same version sets, or pods would wait for an image that
// nobody made.
func TestTheImageHasTheNameThatBootstrapAsksFor(t *testing.T) {
	if _, err := exec.LookPath("make"); err != nil {
		needs.Missing(t, "%v", err)
	}
	const version = "v1.2.3-4-gabcdef0+k3s1"
	// make's own variables would have it say what it does as part of another make.
	commands, err := output(t, root, []string{"MAKEFLAGS=", "MAKELEVEL="}, "make", "-n", "image", "VERSION="+version)
	if err != nil {
		t.Fatal(err)
	}
	var values struct {
		Image struct{ Repository, Tag string }
	}
	content, err := os.ReadFile(chart + "/values.yaml")
	if err == nil {
		err = yaml.Unmarshal(content, &values)
	}
	if err != nil {
		t.Fatal(err)
	}
	if want := " -name " + values.Image.Repository + ":" + embedded.ImageTag(version) + " "; !strings.Contains(commands, want) {
		t.Errorf("%q is not in\n%s", want, commands)
	}
}
