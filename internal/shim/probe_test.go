package shim

import (
	"bytes"
	"context"
	"encoding/json"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/hearth-sh/hearth/test/needs"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/tetratelabs/wazero"
	"github.com/tetratelabs/wazero/imports/wasi_snapshot_preview1"
)

// runProbe executes a probe module on an engine that is not under test.
func runProbe(t *testing.T, module []byte, args ...string) (string, error) {
	t.Helper()
	ctx := t.Context()
	engine := wazero.NewRuntimeWithConfig(ctx, wazero.NewRuntimeConfigInterpreter())
	defer engine.Close(ctx)
	if _, err := wasi_snapshot_preview1.Instantiate(ctx, engine); err != nil {
		t.Fatal(err)
	}
	var output bytes.Buffer
	_, err := engine.InstantiateWithConfig(ctx, module, wazero.NewModuleConfig().WithArgs(args...).WithStdout(&output))
	return output.String(), err
}

func TestProbeModuleAnswers(t *testing.T) {
	if len(probeModule) > 2048 {
		t.Errorf("the probe has %d bytes", len(probeModule))
	}
	// Lengths around the block size of SHA-256, where padding goes wrong.
	nonces := []string{"", "x", NewNonce()}
	for _, n := range []int{36, 37, 44, 45, 46, 100, 1000} {
		nonces = append(nonces, strings.Repeat("n", n))
	}
	for _, nonce := range nonces {
		output, err := runProbe(t, probeModule, "/probe.wasm", nonce)
		if err != nil {
			t.Fatalf("nonce of %d bytes: %v", len(nonce), err)
		}
		if !answered([]byte(output), nonce) || len(output) != answerSize {
			t.Errorf("nonce of %d bytes: %q, want %s", len(nonce), output, Answer(nonce))
		}
	}
	if _, err := runProbe(t, probeModule, "/probe.wasm", strings.Repeat("n", 5000)); err == nil {
		t.Error("arguments larger than the probe's buffer were accepted")
	}
}

func TestProbeSourceStillCompiles(t *testing.T) {
	clang := needs.Program(t, "clang")
	output := filepath.Join(t.TempDir(), "probe.wasm")
	source, err := os.ReadFile("probe.go")
	if err != nil {
		t.Fatal(err)
	}
	_, directive, _ := strings.Cut(string(source), "//go:generate clang ")
	directive, _, _ = strings.Cut(directive, "\n")
	args := strings.Fields(strings.Replace(directive, "-o probe/probe.wasm", "-o "+output, 1))
	if out, err := exec.CommandContext(t.Context(), clang, args...).CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	module, err := os.ReadFile(output)
	if err != nil {
		t.Fatal(err)
	}
	// Compilers differ; what comes out must not.
	if text, err := runProbe(t, module, "/probe.wasm", "nonce"); err != nil || !answered([]byte(text), "nonce") {
		t.Errorf("probe.c no longer answers: %q, %v", text, err)
	}
}

func TestAnswered(t *testing.T) {
	right := Answer("nonce") + "\n"
	for output, want := range map[string]bool{
		right: true, "content-type: text/plain\n\n" + right: true,
		"": false, "nonce\n": false, Answer("other") + "\n": false, right + right: false, strings.TrimSpace(right): false,
	} {
		if got := answered([]byte(output), "nonce"); got != want {
			t.Errorf("answered(%q) = %t", output, got)
		}
	}
	if first, second := NewNonce(), NewNonce(); first == second || len(first) != 32 {
		t.Error("nonces repeat, or are short")
	}
}

func TestProbeImages(t *testing.T) {
	for _, kind := range []Kind{KindCommand, KindFile, KindSpin} {
		t.Run(string(kind), func(t *testing.T) {
			image, err := newProbeImage(kind)
			if err != nil {
				t.Fatal(err)
			}
			var manifest ocispec.Manifest
			var config ocispec.Image
			if err := json.Unmarshal(image.manifest.data, &manifest); err != nil {
				t.Fatal(err)
			}
			if err := json.Unmarshal(image.config.data, &config); err != nil {
				t.Fatal(err)
			}
			if manifest.Config.Digest != digest.FromBytes(image.config.data) || len(manifest.Layers) != len(image.layers) {
				t.Errorf("the manifest names other blobs: %+v", manifest)
			}
			for i, layer := range manifest.Layers {
				if layer.Digest != digest.FromBytes(image.layers[i].data) || layer.Size != int64(len(image.layers[i].data)) {
					t.Errorf("layer %d is described wrongly: %+v", i, layer)
				}
			}
			// runwasi takes an image for Wasm by its architecture alone.
			if wasm := config.Architecture == "wasm"; wasm == (kind == KindFile) {
				t.Errorf("architecture %q", config.Architecture)
			}
		})
	}
	if _, err := newProbeImage(KindUnproven); err == nil {
		t.Error("there is an image for a kind without a probe")
	}
}

func TestSpinProbeImage(t *testing.T) {
	image, err := newProbeImage(KindSpin)
	if err != nil {
		t.Fatal(err)
	}
	var locked struct {
		Version  int `json:"spin_lock_version"`
		Triggers []struct {
			Type   string `json:"trigger_type"`
			Config struct {
				Component string            `json:"component"`
				Route     string            `json:"route"`
				Executor  map[string]string `json:"executor"`
			} `json:"trigger_config"`
		} `json:"triggers"`
		Components []struct {
			ID     string            `json:"id"`
			Source map[string]string `json:"source"`
		} `json:"components"`
	}
	last := image.layers[len(image.layers)-1]
	if err := json.Unmarshal(last.data, &locked); err != nil {
		t.Fatal(err)
	}
	if last.MediaType != "application/vnd.fermyon.spin.application.v1+config" || locked.Version != 0 || len(locked.Triggers) != 1 || len(locked.Components) != 1 {
		t.Fatalf("not a locked application: %s", last.data)
	}
	trigger, component := locked.Triggers[0], locked.Components[0]
	if trigger.Type != "http" || trigger.Config.Route != "/..." || trigger.Config.Executor["type"] != "wagi" || trigger.Config.Component != component.ID {
		t.Errorf("trigger %+v", trigger)
	}
	if component.Source["digest"] != image.layers[0].Digest.String() || image.layers[0].MediaType != mediaTypeSpinWasm {
		t.Errorf("component %+v", component)
	}
}

// A Spin that is slow to start, then runs the probe for every request as the
// wagi executor does: the path and the query's words are its arguments.
func TestAskWaitsForTheServer(t *testing.T) {
	address, err := freeAddress(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	server := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		output, err := runProbe(t, probeModule, r.URL.Path, r.URL.RawQuery)
		if err != nil {
			t.Error(err)
		}
		_, body, _ := strings.Cut(output, "\n\n")
		w.Write([]byte(body))
	}))
	defer server.Close()
	go func() {
		time.Sleep(300 * time.Millisecond)
		listener, err := net.Listen("tcp", address)
		if err != nil {
			t.Error(err)
			return
		}
		server.Listener.Close()
		server.Listener = listener
		server.Start()
	}()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	nonce := NewNonce()
	answer := ask(ctx, address, nonce)
	if answer.err != nil || answer.truncated || !answered(answer.body, nonce) {
		t.Errorf("%+v", answer)
	}
}

func TestAskFaults(t *testing.T) {
	t.Run("an error status is not asked again", func(t *testing.T) {
		server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusInternalServerError) }))
		defer server.Close()
		answer := ask(t.Context(), strings.TrimPrefix(server.URL, "http://"), "nonce")
		if answer.err == nil || !strings.Contains(answer.err.Error(), "status 500") {
			t.Errorf("%+v", answer)
		}
	})
	t.Run("a body without end is cut off", func(t *testing.T) {
		server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
			for {
				if _, err := w.Write(make([]byte, 4096)); err != nil {
					return
				}
			}
		}))
		defer server.Close()
		if answer := ask(t.Context(), strings.TrimPrefix(server.URL, "http://"), "nonce"); !answer.truncated || len(answer.body) != maxOutput {
			t.Errorf("truncated %t after %d bytes", answer.truncated, len(answer.body))
		}
	})
	t.Run("a server that never comes ends with the context", func(t *testing.T) {
		address, err := freeAddress(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithTimeout(t.Context(), 200*time.Millisecond)
		defer cancel()
		if answer := ask(ctx, address, "nonce"); answer.err == nil {
			t.Errorf("%+v", answer)
		}
	})
}
