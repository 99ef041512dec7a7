package artifact

import (
	"bytes"
	"encoding/json"
	"fmt"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/hearth-sh/hearth/internal/bootstrap/fault"
	"github.com/hearth-sh/hearth/test/needs"
)

func testManifest(serial int64) *Manifest {
	return &Manifest{
		APIVersion: "hearth.sh/v1alpha1", Kind: "ArtifactManifest", Name: "hearth", Serial: serial,
		Issued: time.Date(2026, 11, 1, 12, 0, 0, 0, time.UTC),
		Artifacts: []Artifact{
			{Name: "k3s", Version: "v1.36.2+k3s1", OS: "linux", Arch: "arm64", URLs: []string{"https://mirror.example/k3s-arm64"}, SHA256: digestOf([]byte("arm")), Size: 3},
			{Name: "k3s", Version: "v1.36.2+k3s1", OS: "linux", Arch: "amd64", URLs: []string{"https://mirror.example/k3s"}, SHA256: digestOf([]byte("amd")), Size: 3, Mode: 0o755},
			{Name: "k3s", Version: "v1.35.9+k3s1", OS: "linux", Arch: "arm64", URLs: []string{"https://mirror.example/old"}, SHA256: digestOf([]byte("old"))},
			{Name: "spin-shim", Version: "v0.22.0", OS: "linux", Arch: "arm64", URLs: []string{"s3://bucket/shim.tar.gz?region=eu-west-1"}, SHA256: digestOf([]byte("tgz")), Format: FormatTarGzip, Member: "containerd-shim-spin-v2", InstalledSHA256: digestOf([]byte("shim"))},
			{Name: "calico", Version: "v3.30", URLs: []string{"https://mirror.example/calico.yaml"}, SHA256: digestOf([]byte("yaml"))},
		},
	}
}

func encoded(t testing.TB, m *Manifest) []byte {
	t.Helper()
	b, err := m.Encode()
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func newKey(t testing.TB) PrivateKey {
	t.Helper()
	k, err := GenerateKey()
	if err != nil {
		t.Fatal(err)
	}
	return k
}

func signedBy(t testing.TB, manifest []byte, keys ...PrivateKey) []byte {
	t.Helper()
	s, err := Sign(manifest, keys...)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func TestManifestSurvivesEncoding(t *testing.T) {
	m := testManifest(7)
	got, err := ParseManifest(encoded(t, m))
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(m, got); diff != "" {
		t.Error(diff)
	}
}

func TestManifestIsParsedStrictly(t *testing.T) {
	good := string(encoded(t, testManifest(1)))
	digest := digestOf([]byte("arm")).String()
	tests := []struct{ name, old, new, says string }{
		{"unknown member", `"serial": 1`, `"serial": 1, "seriall": 2`, "unknown field"},
		{"repeated member", `"serial": 1`, `"serial": 1, "serial": 2`, "duplicate field"},
		{"wrong case", `"serial"`, `"Serial"`, `unknown field "Serial"`},
		{"another kind", `"ArtifactManifest"`, `"ConfigMap"`, `"ConfigMap"`},
		{"another version", `hearth.sh/v1alpha1`, `hearth.sh/v9`, `v9`},
		{"serial zero", `"serial": 1`, `"serial": 0`, "start with 1"},
		{"fractional serial", `"serial": 1`, `"serial": 1.5`, "serial"},
		{"short digest", digest, digest[:62], "64 lower-case"},
		{"upper-case digest", digest, strings.ToUpper(digest), "64 lower-case"},
		{"no digest", `"sha256": "` + digest + `",`, ``, "sha256 is missing"},
		{"mode with set-id", `"0755"`, `"4755"`, "permission bits"},
		{"the same artifact twice", `"arch": "amd64"`, `"arch": "arm64"`, "there twice"},
		{"credentials in a URL", `https://mirror.example/old`, `https://user:hunter2@mirror.example/old`, "carries credentials"},
		{"ftp", `https://mirror.example/old`, `ftp://mirror.example/old`, "use https"},
		{"a member that climbs", `"containerd-shim-spin-v2"`, `"../shim"`, "relative path"},
		{"not UTF-8", `calico.yaml`, "calico\xff.yaml", "UTF-8"},
		{"something after it", "]\n}\n", "]\n}\n{}", "after top-level value"},
		{"truncated", "]\n}\n", "", "unexpected end"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			bad := strings.Replace(good, tt.old, tt.new, 1)
			if bad == good {
				t.Fatalf("%q is not in the manifest", tt.old)
			}
			_, err := ParseManifest([]byte(bad))
			wantCode(t, err, CodeManifestInvalid, tt.says)
			if strings.Contains(err.Error(), "hunter2") {
				t.Errorf("error %v tells a password", err)
			}
		})
	}
	_, err := ParseManifest(bytes.Repeat([]byte(" "), MaxManifestBytes+1))
	wantCode(t, err, CodeManifestInvalid, "at most 1048576")
}

func TestFind(t *testing.T) {
	m := testManifest(3)
	tests := []struct {
		name, artifact, version, arch, url, says string
	}{
		{"by platform", "k3s", "v1.36.2+k3s1", "amd64", "https://mirror.example/k3s", ""},
		{"an older version", "k3s", "v1.35.9+k3s1", "arm64", "https://mirror.example/old", ""},
		{"the only version of a platform", "k3s", "", "amd64", "https://mirror.example/k3s", ""},
		{"for any platform", "calico", "", "riscv64", "https://mirror.example/calico.yaml", ""},
		{"ambiguous", "k3s", "", "arm64", "", "several versions"},
		{"another platform only", "spin-shim", "v0.22.0", "amd64", "", "but has v0.22.0 linux/arm64"},
		{"unknown", "doom", "", "arm64", "", "has no doom"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			a, err := m.Find(tt.artifact, tt.version, "linux", tt.arch)
			if tt.says != "" {
				wantCode(t, err, CodeManifestNoEntry, tt.says)
				return
			}
			if err != nil || a.URLs[0] != tt.url {
				t.Errorf("got %v, %v", a.URLs, err)
			}
		})
	}
}

func TestOpenManifestNeedsTrustedSignatures(t *testing.T) {
	old, current, stranger := newKey(t), newKey(t), newKey(t)
	manifest := encoded(t, testManifest(1))
	changed := bytes.Replace(manifest, []byte("mirror"), []byte("evil01"), 1)
	trust := func(threshold int, keys ...PrivateKey) Trust {
		var out Trust
		for _, k := range keys {
			out.Keys = append(out.Keys, k.Public())
		}
		out.Threshold = threshold
		return out
	}
	// renamed claims another key's ID for a signature.
	renamed := func(by, as PrivateKey) []byte {
		return bytes.ReplaceAll(signedBy(t, manifest, by), []byte(by.Public().ID()), []byte(as.Public().ID()))
	}
	bare, _ := json.Marshal(Signatures{APIVersion: "hearth.sh/v1alpha1", Kind: SignaturesKind, Signatures: []Signature{{KeyID: current.Public().ID(), Signature: current.key[:64]}}})
	tests := []struct {
		name       string
		manifest   []byte
		signatures []byte
		trust      Trust
		says       string // "" means that it opens
	}{
		{"the trusted key", manifest, signedBy(t, manifest, current), trust(0, current), ""},
		{"while a key is replaced", manifest, signedBy(t, manifest, old, current), trust(0, old), ""},
		{"after it was replaced", manifest, signedBy(t, manifest, old, current), trust(0, current), ""},
		{"both of two", manifest, signedBy(t, manifest, old, current), trust(2, old, current), ""},
		{"one of two is too few", manifest, signedBy(t, manifest, old), trust(2, old, current), "has 1 valid signatures of trusted keys and needs 2"},
		{"the same key twice is one", manifest, signedBy(t, manifest, old, old), trust(2, old, current), "has 1 valid"},
		{"a stranger", manifest, signedBy(t, manifest, stranger), trust(0, current), "has 0 valid"},
		{"a stranger who claims to be trusted", manifest, renamed(stranger, current), trust(0, current), "has 0 valid"},
		{"a changed manifest", changed, signedBy(t, manifest, current), trust(0, current), "has 0 valid"},
		{"no signature", manifest, []byte(`{"apiVersion":"hearth.sh/v1alpha1","kind":"ArtifactManifestSignatures","signatures":[]}`), trust(0, current), "between 1 and 16"},
		{"a signature of something", manifest, bare, trust(0, current), "has 0 valid"},
		{"no trusted key", manifest, signedBy(t, manifest, current), Trust{}, "no key is trusted"},
		{"an empty trusted key", manifest, signedBy(t, manifest, current), Trust{Keys: []PublicKey{{}}}, "empty"},
		{"a web page", manifest, []byte("<html>"), trust(0, current), "cannot be read"},
		{"bytes after the manifest", append(bytes.Clone(manifest), ' '), signedBy(t, manifest, current), trust(0, current), "has 0 valid"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			m, err := OpenManifest(tt.manifest, tt.signatures, tt.trust)
			if tt.says == "" {
				if err != nil || m.Serial != 1 {
					t.Errorf("got %v, %v", m, err)
				}
				return
			}
			wantCode(t, err, CodeManifestUntrusted, tt.says)
			if m != nil {
				t.Error("a manifest came with the error")
			}
		})
	}
}

func TestKeysSurviveTheirTextForms(t *testing.T) {
	k := newKey(t)
	text, err := k.Encode()
	if err != nil {
		t.Fatal(err)
	}
	again, err := ParsePrivateKey(text)
	if err != nil || again.Public() != k.Public() {
		t.Errorf("got %v, %v", again, err)
	}
	public, err := ParsePublicKey(k.Public().String())
	if err != nil || public != k.Public() {
		t.Errorf("got %v, %v", public, err)
	}
	for _, shown := range []string{fmt.Sprint(k), fmt.Sprintf("%v %+v %#v %s", k, k, k, k)} {
		if strings.Contains(shown, string(k.key)) || !strings.Contains(shown, k.Public().ID()) || strings.Contains(shown, "0x") {
			t.Errorf("a private key prints as %s", shown)
		}
	}
	for _, bad := range []string{"", "ed25519:", "ed25519:AAAA", k.Public().String() + " ", strings.TrimPrefix(k.Public().String(), "ed25519:"), "ed25519:" + strings.Repeat("A", 43) + "="} {
		if _, err := ParsePublicKey(bad); err == nil {
			t.Errorf("%q was taken for a key", bad)
		}
	}
}

// TestOpenSSLAgrees verifies a signature of ours and makes a key with OpenSSL:
// others can check a release without Hearth.
func TestOpenSSLAgrees(t *testing.T) {
	openssl, err := exec.LookPath("openssl")
	if err != nil {
		needs.Missing(t, "no openssl here: %v", err)
	}
	dir := t.TempDir()
	path := func(name string) string { return filepath.Join(dir, name) }
	run := func(args ...string) {
		t.Helper()
		if out, err := exec.CommandContext(t.Context(), openssl, args...).CombinedOutput(); err != nil {
			t.Fatalf("openssl %v: %v: %s", args, err, out)
		}
	}
	run("genpkey", "-algorithm", "ed25519", "-out", path("key"))
	run("pkey", "-in", path("key"), "-pubout", "-out", path("public"))
	text, err := os.ReadFile(path("key"))
	if err != nil {
		t.Fatal(err)
	}
	k, err := ParsePrivateKey(text)
	if err != nil {
		t.Fatal(err)
	}
	manifest := encoded(t, testManifest(1))
	s, err := ParseSignatures(signedBy(t, manifest, k))
	if err != nil {
		t.Fatal(err)
	}
	for name, b := range map[string][]byte{"message": append([]byte("hearth.sh/v1alpha1 ArtifactManifest\n"), manifest...), "signature": s.Signatures[0].Signature} {
		if err := os.WriteFile(path(name), b, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	run("pkeyutl", "-verify", "-pubin", "-inkey", path("public"), "-rawin", "-in", path("message"), "-sigfile", path("signature"))
}

// manifestServer serves one manifest and its signatures.
type manifestServer struct {
	*httptest.Server
	manifest, signatures atomic.Pointer[[]byte]
	asked                atomic.Int64
}

func newManifestServer(t testing.TB) *manifestServer {
	s := new(manifestServer)
	s.Server = httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		s.asked.Add(1)
		b := s.manifest.Load()
		if strings.HasSuffix(r.URL.Path, SignatureSuffix) {
			b = s.signatures.Load()
		}
		if b == nil {
			w.WriteHeader(http.StatusNotFound)
			return
		}
		_, _ = w.Write(*b)
	}))
	t.Cleanup(s.Close)
	return s
}

func (s *manifestServer) set(manifest, signatures []byte) {
	s.manifest.Store(&manifest)
	s.signatures.Store(&signatures)
}

func TestManifestIsFetchedVerifiedAndRemembered(t *testing.T) {
	k, stranger := newKey(t), newKey(t)
	one, two, three := encoded(t, testManifest(1)), encoded(t, testManifest(2)), encoded(t, testManifest(3))
	forged := testManifest(2)
	forged.Artifacts = forged.Artifacts[:1]
	otherTwo := encoded(t, forged)
	first, second := newManifestServer(t), newManifestServer(t)
	f := newFetcher(t)
	src := ManifestSource{Name: "hearth", URLs: []string{first.URL + "/m.json?X-Amz-Signature=hunter2", second.URL + "/m.json"}, Trust: Trust{Keys: []PublicKey{k.Public()}}}
	want := func(src ManifestSource, serial int64) {
		t.Helper()
		m, err := f.Manifest(t.Context(), src)
		if err != nil || m.Serial != serial {
			t.Fatalf("got %+v, %v, want serial %d", m, err, serial)
		}
	}
	wantError := func(src ManifestSource, code fault.Code, says ...string) {
		t.Helper()
		m, err := f.Manifest(t.Context(), src)
		wantCode(t, err, code, says...)
		if m != nil || strings.Contains(err.Error(), "hunter2") {
			t.Errorf("got %v with error %v", m, err)
		}
	}

	wantError(src, CodeManifestUnreachable, "404")
	second.set(one, signedBy(t, one, stranger))
	wantError(src, CodeManifestUntrusted, "404", "0 valid signatures")
	tooNew := src
	tooNew.MinSerial = 2
	second.set(one, signedBy(t, one, k))
	wantError(tooNew, CodeManifestRollback, "at least 2")
	want(src, 1)

	// A mirror that lags behind or lies is passed over.
	first.set(two, signedBy(t, two, k))
	want(src, 2)
	first.set(one, signedBy(t, one, k))
	second.set(three, signedBy(t, three, stranger))
	wantError(src, CodeManifestUntrusted, "has accepted 2 before", "0 valid")
	second.set(otherTwo, signedBy(t, otherTwo, k))
	wantError(src, CodeManifestRollback, "same serial 2")
	second.set(two, signedBy(t, two, k))
	want(src, 2)

	// Another series with the same key is not a way around.
	foreign := testManifest(9)
	foreign.Name = "other"
	second.set(encoded(t, foreign), signedBy(t, encoded(t, foreign), k))
	wantError(src, CodeManifestInvalid, "series other instead of hearth")

	// What was accepted serves when it is pinned, or when nobody answers.
	pinned := src
	pinned.SHA256 = digestOf(two)
	before := first.asked.Load() + second.asked.Load()
	want(pinned, 2)
	if after := first.asked.Load() + second.asked.Load(); after != before {
		t.Errorf("mirrors were asked %d times for what is there", after-before)
	}
	first.Close()
	second.Close()
	want(src, 2)
	distrusted := src
	distrusted.Trust.Keys = []PublicKey{stranger.Public()}
	wantError(distrusted, CodeManifestUnreachable, "connection refused")

	// A local copy needs no mirror, but the same signatures and serial.
	path := filepath.Join(t.TempDir(), "manifest.json")
	local := src
	local.Files = []string{path + ".absent", path}
	for i, b := range [][]byte{one, three} {
		for name, content := range map[string][]byte{path: b, path + SignatureSuffix: signedBy(t, b, k)} {
			if err := os.WriteFile(name, content, 0o644); err != nil {
				t.Fatal(err)
			}
		}
		if i == 0 {
			wantError(local, CodeManifestRollback, "serial 1", "has accepted")
		} else {
			want(local, 3)
		}
	}

	// The memory of this is not silently lost.
	state := &stateDir{path: f.o.StateDir}
	if err := os.WriteFile(state.ledgerPath("hearth"), []byte(`{}`), 0o600); err != nil {
		t.Fatal(err)
	}
	wantError(local, CodeDisk, "cannot be read")
}

func TestInspectManifestTouchesNothing(t *testing.T) {
	k := newKey(t)
	two := encoded(t, testManifest(2))
	s := newManifestServer(t)
	s.set(two, signedBy(t, two, k))
	f := newFetcher(t)
	src := ManifestSource{Name: "hearth", URLs: []string{s.URL}, Trust: Trust{Keys: []PublicKey{k.Public()}}}
	if m, err := f.InspectManifest(t.Context(), src); err != nil || m.Serial != 2 {
		t.Errorf("got %v, %v", m, err)
	}
	wantAbsent(t, f.o.StateDir)
	// What was accepted before is held against it all the same.
	if _, err := f.Manifest(t.Context(), src); err != nil {
		t.Fatal(err)
	}
	one := encoded(t, testManifest(1))
	s.set(one, signedBy(t, one, k))
	_, err := f.InspectManifest(t.Context(), src)
	wantCode(t, err, CodeManifestRollback)
}

func TestTamperedCopyOfAManifestIsNotUsed(t *testing.T) {
	k := newKey(t)
	one := encoded(t, testManifest(1))
	s := newManifestServer(t)
	s.set(one, signedBy(t, one, k))
	f := newFetcher(t)
	src := ManifestSource{Name: "hearth", URLs: []string{s.URL}, SHA256: digestOf(one), Trust: Trust{Keys: []PublicKey{k.Public()}}}
	if _, err := f.Manifest(t.Context(), src); err != nil {
		t.Fatal(err)
	}
	path := (&stateDir{path: f.o.StateDir}).manifestPath("hearth", digestOf(one))
	if err := os.WriteFile(path, bytes.Replace(one, []byte("mirror"), []byte("evil01"), 1), 0o600); err != nil {
		t.Fatal(err)
	}
	before := s.asked.Load()
	m, err := f.Manifest(t.Context(), src)
	if err != nil || !strings.Contains(m.Artifacts[0].URLs[0], "mirror") {
		t.Errorf("got %v, %v", m, err)
	}
	if s.asked.Load() == before {
		t.Error("the tampered copy was used")
	}
	if got, _ := os.ReadFile(path); !bytes.Equal(got, one) {
		t.Error("the tampered copy was not replaced")
	}
}
