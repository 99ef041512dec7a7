package packaging_test

import (
	"archive/tar"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/layout"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/types"
	"github.com/google/go-containerregistry/pkg/v1/validate"
)

// standIns are directories of binaries that are none: what the image holds
// does not matter to how it is made.
func standIns(t *testing.T) map[string]string {
	t.Helper()
	dirs := map[string]string{}
	for _, arch := range []string{"arm64", "amd64"} {
		dir := filepath.Join(t.TempDir(), arch)
		for _, name := range []string{"bootstrap", "nodeagent"} {
			write(t, filepath.Join(dir, name), "#!/bin/sh\necho "+arch+" "+name+"\n", 0o755)
		}
		dirs["linux/"+arch] = dir
	}
	return dirs
}

func write(t *testing.T, path, content string, mode os.FileMode) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(content), mode); err != nil {
		t.Fatal(err)
	}
}

func imageBuilder(t *testing.T) string {
	t.Helper()
	builder := filepath.Join(t.TempDir(), "image")
	must(t, root, []string{"CGO_ENABLED=0"}, "go", "build", "-o", builder, "./packaging/image")
	return builder
}

// buildImage returns the layout and the archive.
func buildImage(t *testing.T, builder string, platforms map[string]string) (dir, archive string) {
	t.Helper()
	out := t.TempDir()
	dir, archive = filepath.Join(out, "image"), filepath.Join(out, "image.tar")
	digest := must(t, "", nil, builder, "-version", "1.2.3", "-name", "reg.example/hearth/nodeagent:1.2.3", "-output", dir, "-archive", archive,
		"linux/arm64="+platforms["linux/arm64"], "linux/amd64="+platforms["linux/amd64"])
	if !strings.HasPrefix(digest, "sha256:") {
		t.Errorf("the builder printed %q", digest)
	}
	return dir, archive
}

func TestTheImageIsValidForBothProcessors(t *testing.T) {
	platforms := standIns(t)
	dir, _ := buildImage(t, imageBuilder(t), platforms)
	top, err := layout.ImageIndexFromPath(dir)
	if err != nil {
		t.Fatal(err)
	}
	manifest, err := top.IndexManifest()
	if err != nil {
		t.Fatal(err)
	}
	if len(manifest.Manifests) != 1 || manifest.Manifests[0].MediaType != types.OCIImageIndex {
		t.Fatalf("the layout holds %+v", manifest.Manifests)
	}
	if name := manifest.Manifests[0].Annotations["io.containerd.image.name"]; name != "reg.example/hearth/nodeagent:1.2.3" {
		t.Errorf("containerd would call it %q", name)
	}
	index, err := top.ImageIndex(manifest.Manifests[0].Digest)
	if err != nil {
		t.Fatal(err)
	}
	if err := validate.Index(index); err != nil {
		t.Error(err)
	}
	if manifest, err = index.IndexManifest(); err != nil {
		t.Fatal(err)
	}
	seen := map[string]bool{}
	for _, m := range manifest.Manifests {
		seen[m.Platform.String()] = true
		image, err := index.Image(m.Digest)
		if err != nil {
			t.Fatal(err)
		}
		checkImage(t, image, *m.Platform, platforms[m.Platform.String()])
	}
	if diff := cmp.Diff(map[string]bool{"linux/arm64": true, "linux/amd64": true}, seen); diff != "" {
		t.Error(diff)
	}
}

func checkImage(t *testing.T, image v1.Image, platform v1.Platform, binaries string) {
	t.Helper()
	config, err := image.ConfigFile()
	if err != nil {
		t.Fatal(err)
	}
	if config.OS != platform.OS || config.Architecture != platform.Architecture {
		t.Errorf("the image for %s says %s/%s", platform, config.OS, config.Architecture)
	}
	if diff := cmp.Diff([]string{"/usr/bin/nodeagent"}, config.Config.Entrypoint); diff != "" {
		t.Errorf("entrypoint: %s", diff)
	}
	if config.Config.User != "65532:65532" || len(config.Config.Cmd) != 0 {
		t.Errorf("user %q, command %q", config.Config.User, config.Config.Cmd)
	}
	if v := config.Config.Labels["org.opencontainers.image.version"]; v != "1.2.3" {
		t.Errorf("version %q", v)
	}
	content := mutate.Extract(image)
	defer content.Close()
	files := map[string]string{}
	for r := tar.NewReader(content); ; {
		header, err := r.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		if header.Uid != 0 || header.Gid != 0 || header.ModTime.Year() != 1980 {
			t.Errorf("%s belongs to %d:%d, time %v", header.Name, header.Uid, header.Gid, header.ModTime)
		}
		data, err := io.ReadAll(r)
		if err != nil {
			t.Fatal(err)
		}
		files[header.FileInfo().Mode().String()+" "+header.Name] = string(data)
	}
	const roots = "-rw-r--r-- etc/ssl/certs/ca-certificates.crt"
	trusted(t, []byte(files[roots]))
	delete(files, roots)
	want := map[string]string{
		"drwxr-xr-x etc": "", "drwxr-xr-x etc/ssl": "", "drwxr-xr-x etc/ssl/certs": "", "dtrwxrwxrwx tmp": "", "drwxr-xr-x usr/bin": "",
		"-rw-r--r-- etc/passwd": "root:x:0:0:root:/:/sbin/nologin\nhearth:x:65532:65532:hearth:/:/sbin/nologin\n",
	}
	for _, name := range []string{"bootstrap", "nodeagent"} {
		data, err := os.ReadFile(filepath.Join(binaries, name))
		if err != nil {
			t.Fatal(err)
		}
		want["-rwxr-xr-x usr/bin/"+name] = string(data)
	}
	if diff := cmp.Diff(want, files); diff != "" {
		t.Errorf("files: %s", diff)
	}
}

// trusted checks the authorities without which nothing in the image could speak
// to ECR: those of Amazon's own certificates are among them.
func trusted(t *testing.T, roots []byte) {
	t.Helper()
	amazon := false
	n := 0
	for block, rest := pem.Decode(roots); block != nil; block, rest = pem.Decode(rest) {
		certificate, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			t.Fatal(err)
		}
		n++
		amazon = amazon || certificate.Subject.CommonName == "Amazon Root CA 1"
	}
	if n < 50 || !amazon {
		t.Errorf("the image trusts %d authorities, Amazon's among them: %t", n, amazon)
	}
}

func TestTheImageIsTheSameByteForByte(t *testing.T) {
	builder, platforms := imageBuilder(t), standIns(t)
	_, first := buildImage(t, builder, platforms)
	// Another place and other times of the same files.
	_, second := buildImage(t, builder, standIns(t))
	a, err := os.ReadFile(first)
	if err != nil {
		t.Fatal(err)
	}
	b, err := os.ReadFile(second)
	if err != nil {
		t.Fatal(err)
	}
	if string(a) != string(b) {
		t.Errorf("two builds of the same files differ (%d and %d bytes)", len(a), len(b))
	}
}

func TestTheImageBuilderSaysWhatIsMissing(t *testing.T) {
	builder, empty := imageBuilder(t), t.TempDir()
	for name, tt := range map[string]struct {
		args []string
		want string
	}{
		"no platform":          {nil, "say which platforms"},
		"no directory":         {[]string{"linux/arm64="}, "PLATFORM=DIRECTORY"},
		"no architecture":      {[]string{"linux=" + empty}, "not a platform"},
		"nothing built":        {[]string{"linux/arm64=" + empty}, "build it first"},
		"a name without a tag": {[]string{"-name", "reg.example:5000/x", "linux/arm64=" + standIns(t)["linux/arm64"]}, "no tag"},
	} {
		t.Run(name, func(t *testing.T) {
			out := filepath.Join(t.TempDir(), "image")
			_, err := output(t, "", nil, builder, append([]string{"-output", out}, tt.args...)...)
			if err == nil || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("got %v", err)
			}
			if entries, err := filepath.Glob(filepath.Join(filepath.Dir(out), "*")); err != nil || len(entries) != 0 {
				t.Errorf("left behind: %v %v", entries, err)
			}
			if entries, err := filepath.Glob(filepath.Join(filepath.Dir(out), ".image-*")); err != nil || len(entries) != 0 {
				t.Errorf("left behind: %v %v", entries, err)
			}
		})
	}
}
