package registry

import (
	"encoding/json"
	"errors"
	"flag"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-containerregistry/pkg/v1/validate"

	"github.com/hearth-sh/hearth/api/v1alpha1"
)

var update = flag.Bool("update", false, "rewrite golden files")

func TestSpinArtifactHasTheDocumentedBytes(t *testing.T) {
	m := moduleFile(t, wasmBytes(64, 1))
	img, err := BuildSpin(m, SpinOptions{Name: "user1", Version: "1.0.0"})
	if err != nil {
		t.Fatal(err)
	}
	greeting := "hello {{ not a template }}"
	configured, err := BuildSpin(m, SpinOptions{
		Name: "user1", Version: "1.0.0", Env: map[string]string{"GREETING": greeting, "_LEVEL": "<1>"},
		Variables: map[string]SpinVariable{"greeting": {Default: &greeting}, "token": {Secret: true}},
	})
	if err != nil {
		t.Fatal(err)
	}
	for name, got := range map[string][]byte{
		"config.json": img.config, "manifest.json": img.manifest, "locked-app.json": img.LockedApp(),
		"configured-manifest.json": configured.manifest, "configured-locked-app.json": configured.LockedApp(),
	} {
		golden := filepath.Join("testdata", "spin", name)
		if *update {
			if err := os.MkdirAll(filepath.Dir(golden), 0o755); err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(golden, append(got, '\n'), 0o644); err != nil {
				t.Fatal(err)
			}
		}
		want, err := os.ReadFile(golden)
		if err != nil {
			t.Fatal(err)
		}
		if strings.TrimSpace(string(want)) != string(got) {
			t.Errorf("%s changed: an artifact that was published would get another digest\n got %s\nwant %s", name, got, want)
		}
	}
	if err := validate.Image(img, validate.Fast); err != nil {
		// Fast checks digests, sizes and the manifest's consistency; the
		// empty diff IDs are Spin's format and the only objection.
		if !strings.Contains(err.Error(), "diff") && !strings.Contains(err.Error(), "mismatched") {
			t.Errorf("not a consistent image: %v", err)
		}
	}
	var app struct {
		Triggers []struct {
			Config struct {
				Executor struct {
					Type string `json:"type"`
				} `json:"executor"`
			} `json:"trigger_config"`
		} `json:"triggers"`
	}
	if err := json.Unmarshal(img.LockedApp(), &app); err != nil || app.Triggers[0].Config.Executor.Type != "wagi" {
		t.Errorf("a core module needs the wagi executor: %+v, %v", app, err)
	}
}

func TestSameModuleGivesTheSameDigestAndAnyDifferenceAnother(t *testing.T) {
	data := wasmBytes(100, 1)
	build := func(m Module, o SpinOptions) string {
		t.Helper()
		img, err := BuildSpin(m, o)
		if err != nil {
			t.Fatal(err)
		}
		d, _ := img.Digest()
		return d.String()
	}
	base := SpinOptions{Name: "a", Version: "1"}
	first := build(moduleFile(t, data), base)
	if again := build(Module{Path: moduleFile(t, data).Path}, base); again != first {
		t.Errorf("same input, digests %s and %s", first, again)
	}
	for name, d := range map[string]string{
		"module":   build(moduleFile(t, wasmBytes(100, 2)), base),
		"name":     build(moduleFile(t, data), SpinOptions{Name: "b", Version: "1"}),
		"version":  build(moduleFile(t, data), SpinOptions{Name: "a", Version: "2"}),
		"executor": build(moduleFile(t, data), SpinOptions{Name: "a", Version: "1", Executor: ExecutorHTTP}),
		"created":  build(moduleFile(t, data), SpinOptions{Name: "a", Version: "1", Created: time.Unix(1, 0)}),
	} {
		if d == first {
			t.Errorf("another %s gives the same digest", name)
		}
	}
}

func TestBuildRefusesWhatIsNoModule(t *testing.T) {
	big := filepath.Join(t.TempDir(), "big")
	if err := os.WriteFile(big, []byte("\x00asm"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(big, v1alpha1.MaxModuleBytes+1); err != nil {
		t.Fatal(err)
	}
	good := moduleFile(t, wasmBytes(20, 1))
	for name, c := range map[string]struct {
		m    Module
		o    SpinOptions
		want error
	}{
		"ELF":             {moduleFile(t, []byte("\x7fELF....")), SpinOptions{Name: "a"}, ErrNotWasm},
		"empty":           {moduleFile(t, nil), SpinOptions{Name: "a"}, ErrNotWasm},
		"too large":       {Module{Path: big}, SpinOptions{Name: "a"}, ErrTooLarge},
		"missing":         {Module{Path: big + "x"}, SpinOptions{Name: "a"}, os.ErrNotExist},
		"bad name":        {good, SpinOptions{Name: "A_b"}, ErrInvalidReference},
		"bad digest":      {Module{Path: good.Path, Digest: "sha256:xyz"}, SpinOptions{Name: "a"}, ErrInvalidReference},
		"directory":       {Module{Path: t.TempDir()}, SpinOptions{Name: "a"}, nil},
		"other executor":  {good, SpinOptions{Name: "a", Executor: "cgi"}, nil},
		"other size":      {Module{Path: good.Path, Size: 3}, SpinOptions{Name: "a"}, nil},
		"sha512":          {Module{Path: good.Path, Digest: "sha512:" + strings.Repeat("a", 128)}, SpinOptions{Name: "a"}, ErrInvalidReference},
		"uppercase digit": {Module{Path: good.Path, Digest: "sha256:" + strings.Repeat("A", 64)}, SpinOptions{Name: "a"}, ErrInvalidReference},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := BuildSpin(c.m, c.o)
			if err == nil || (c.want != nil && !errors.Is(err, c.want)) {
				t.Errorf("got %v, want %v", err, c.want)
			}
		})
	}
}
