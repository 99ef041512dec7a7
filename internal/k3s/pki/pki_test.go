package pki

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/hex"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"log/slog"
	"math/big"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

var begin = time.Date(2026, 7, 1, 12, 0, 0, 0, time.UTC)

func generate(t testing.TB) *Authorities {
	t.Helper()
	a, err := Generate(begin)
	if err != nil {
		t.Fatal(err)
	}
	return a
}

func files(t testing.TB, a *Authorities) map[string]File {
	t.Helper()
	list, err := a.Files()
	if err != nil {
		t.Fatal(err)
	}
	byPath := make(map[string]File)
	for _, f := range list {
		byPath[f.Path] = f
	}
	return byPath
}

func TestFilesAreThoseThatK3sReadsBeforeItsFirstStart(t *testing.T) {
	got := map[string]string{}
	for path, f := range files(t, generate(t)) {
		got[path] = fmt.Sprintf("%o", f.Mode)
	}
	want := map[string]string{
		"server-ca.crt": "644", "server-ca.key": "600",
		"client-ca.crt": "644", "client-ca.key": "600",
		"request-header-ca.crt": "644", "request-header-ca.key": "600",
		"etcd/server-ca.crt": "644", "etcd/server-ca.key": "600",
		"etcd/peer-ca.crt": "644", "etcd/peer-ca.key": "600",
		"service.key": "600",
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
}

func TestEachAuthoritySignsWithItsOwnKey(t *testing.T) {
	all := files(t, generate(t))
	seen := map[string]string{}
	for path, f := range all {
		if !strings.HasSuffix(path, ".crt") {
			continue
		}
		key := all[strings.TrimSuffix(path, ".crt")+".key"]
		p, err := tls.X509KeyPair(f.Data, key.Data)
		if err != nil {
			t.Fatalf("%s: %v", path, err)
		}
		if other, ok := seen[string(key.Data)]; ok {
			t.Errorf("%s and %s share a key", path, other)
		}
		seen[string(key.Data)] = path
		c := p.Leaf
		if got, want := c.NotBefore, begin.Add(-Backdate); !got.Equal(want) {
			t.Errorf("%s begins %s, want %s", path, got, want)
		}
		if got := c.NotAfter.Sub(c.NotBefore); got != Validity {
			t.Errorf("%s lasts %s, want %s", path, got, Validity)
		}
		// k3s renews what an authority signed when its authority key id is not
		// the authority's subject key id, at every start.
		if len(c.SubjectKeyId) == 0 {
			t.Errorf("%s has no subject key id", path)
		}
		if want := fmt.Sprintf("-ca@%d", begin.Unix()); !strings.HasSuffix(c.Subject.CommonName, want) {
			t.Errorf("%s is named %q, want it to end in %q", path, c.Subject.CommonName, want)
		}
	}
}

func TestPublishedAuthoritiesGiveTheSameFilesElsewhere(t *testing.T) {
	a := generate(t)
	b, err := a.Encode()
	if err != nil {
		t.Fatal(err)
	}
	// With two tokens beside it, it must fit a parameter of 4096 bytes.
	if len(b) > 3600 {
		t.Errorf("published authorities take %d bytes, want at most 3600", len(b))
	}
	again, err := Decode(b)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(files(t, a), files(t, again)); diff != "" {
		t.Error(diff)
	}
}

func TestDecodeRefusesAnIncompleteOrMixedSet(t *testing.T) {
	a, other := generate(t), generate(t)
	change := func(f func(p *published)) []byte {
		b, err := a.Encode()
		if err != nil {
			t.Fatal(err)
		}
		var p published
		if err := json.Unmarshal(b, &p); err != nil {
			t.Fatal(err)
		}
		f(&p)
		if b, err = json.Marshal(p); err != nil {
			t.Fatal(err)
		}
		return b
	}
	leaf := signedLeaf(t, a)
	for name, in := range map[string][]byte{
		"nothing":            nil,
		"not JSON":           []byte("<html>"),
		"unknown field":      []byte(`{"authorities":{},"x":1}`),
		"too large":          bytes.Repeat([]byte(" "), maxPublishedBytes+1),
		"an authority fewer": change(func(p *published) { delete(p.Authorities, "etcd/peer-ca") }),
		"a stranger":         change(func(p *published) { p.Authorities["x"] = p.Authorities[serverCA]; delete(p.Authorities, serverCA) }),
		"another's key": change(func(p *published) {
			p.Authorities[serverCA] = publishedPair{p.Authorities[serverCA].Certificate, p.Authorities["client-ca"].Key}
		}),
		"another's server CA": change(func(p *published) {
			scalar, _ := other.pairs[serverCA].key.Bytes()
			p.Authorities[serverCA] = publishedPair{other.pairs[serverCA].certificate.Raw, scalar}
		}),
		"not an authority": change(func(p *published) {
			p.Authorities["client-ca"] = leaf
		}),
		"no service key": change(func(p *published) { p.ServiceKey = nil }),
		"zero key":       change(func(p *published) { p.ServiceKey = make([]byte, 32) }),
	} {
		t.Run(name, func(t *testing.T) {
			if _, err := Decode(in); !errors.Is(err, ErrMalformed) {
				t.Errorf("got %v, want ErrMalformed", err)
			}
		})
	}
}

func signedLeaf(t testing.TB, a *Authorities) publishedPair {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	ca := a.pairs["client-ca"]
	der, err := x509.CreateCertificate(rand.Reader, &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "leaf"}, NotBefore: begin, NotAfter: begin.Add(time.Hour)}, ca.certificate, key.Public(), ca.key)
	if err != nil {
		t.Fatal(err)
	}
	scalar, err := key.Bytes()
	if err != nil {
		t.Fatal(err)
	}
	return publishedPair{der, scalar}
}

func TestCAHashIsWhatK3sComputes(t *testing.T) {
	sum := func(b []byte) string { s := sha256.Sum256(b); return hex.EncodeToString(s[:]) }
	a := generate(t)
	root := a.pairs[serverCA]
	single := a.ServerCA()
	// A chain as k3s's generate-custom-ca-certs.sh makes: leaf CA, root.
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	der, err := x509.CreateCertificate(rand.Reader, &x509.Certificate{SerialNumber: big.NewInt(7), Subject: pkix.Name{CommonName: "intermediate"},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour), IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign},
		root.certificate, key.Public(), root.key)
	if err != nil {
		t.Fatal(err)
	}
	intermediate := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})
	stranger := generate(t).ServerCA()
	for name, c := range map[string]struct {
		bundle []byte
		want   string
	}{
		"one certificate: its bytes":            {single, sum(single)},
		"one with a remark: the remark as well": {append([]byte("# ours\n"), single...), sum(append([]byte("# ours\n"), single...))},
		"a chain: the root's DER":               {append(bytes.Clone(intermediate), single...), sum(root.certificate.Raw)},
		"no chain: the bytes":                   {append(bytes.Clone(intermediate), stranger...), sum(append(bytes.Clone(intermediate), stranger...))},
	} {
		t.Run(name, func(t *testing.T) {
			got, err := CAHash(c.bundle)
			if err != nil {
				t.Fatal(err)
			}
			if got != c.want {
				t.Errorf("got %s, want %s", got, c.want)
			}
		})
	}
	for name, bundle := range map[string][]byte{"empty": nil, "HTML": []byte("<html>"), "a key": files(t, a)["server-ca.key"].Data, "huge": make([]byte, MaxCABytes+1)} {
		if _, err := CAHash(bundle); !errors.Is(err, ErrMalformed) {
			t.Errorf("%s: got %v, want ErrMalformed", name, err)
		}
	}
}

func TestTokenVerifiesItsOwnAuthorityOnly(t *testing.T) {
	a, other := generate(t), generate(t)
	token, err := NewToken(UserServer, a.ServerCA())
	if err != nil {
		t.Fatal(err)
	}
	if err := token.VerifyCA(a.ServerCA()); err != nil {
		t.Error(err)
	}
	if err := token.VerifyCA(other.ServerCA()); !errors.Is(err, ErrCAMismatch) {
		t.Errorf("another's CA: got %v, want ErrCAMismatch", err)
	}
	again, err := ParseToken(token.Reveal() + "\n")
	if err != nil {
		t.Fatal(err)
	}
	if !again.Equal(token) || again.User() != UserServer {
		t.Errorf("read back as %v", again)
	}
	node, err := NewToken(UserNode, a.ServerCA())
	if err != nil {
		t.Fatal(err)
	}
	if node.Equal(token) || node.Secret() == token.Secret() {
		t.Error("an agent's token gives away the server's")
	}
}

func TestParseTokenRefuses(t *testing.T) {
	hash := strings.Repeat("ab", 32)
	for name, in := range map[string]string{
		"nothing":            "",
		"the short format":   "secret",
		"a kubeadm token":    "K10" + hash + "::abcdef.0123456789abcdef",
		"no hash":            "K10::server:secret",
		"a short hash":       "K10abcd::server:secret",
		"upper-case digits":  "K10" + strings.ToUpper(hash) + "::server:secret",
		"an unknown user":    "K10" + hash + "::admin:secret",
		"no secret":          "K10" + hash + "::server:",
		"two lines":          "K10" + hash + "::server:sec\nret",
		"a quote":            "K10" + hash + `::server:sec"ret`,
		"a comma":            "K10" + hash + "::server:sec,ret",
		"more than a secret": "K10" + hash + "::server:" + strings.Repeat("x", maxSecretBytes+1),
		"far too much":       strings.Repeat("x", 1<<20),
	} {
		t.Run(name, func(t *testing.T) {
			_, err := ParseToken(in)
			if !errors.Is(err, ErrToken) {
				t.Fatalf("got %v, want ErrToken", err)
			}
			if strings.Contains(err.Error(), "secret:") || strings.Contains(err.Error(), "sec,ret") {
				t.Errorf("the error gives the input away: %v", err)
			}
		})
	}
}

func TestNothingPrintsASecret(t *testing.T) {
	a := generate(t)
	token, err := NewToken(UserNode, a.ServerCA())
	if err != nil {
		t.Fatal(err)
	}
	key := files(t, a)["server-ca.key"].Data
	scalar, err := a.pairs[serverCA].key.Bytes()
	if err != nil {
		t.Fatal(err)
	}
	secrets := []string{token.Secret(), string(key), hex.EncodeToString(scalar), fmt.Sprint(scalar), a.pairs[serverCA].key.D.String()} //nolint:staticcheck // the test looks for exactly what must not be printed
	var out bytes.Buffer
	holder := struct {
		Token       Token
		Pointer     *Token
		Authorities *Authorities
	}{token, &token, a}
	for _, verb := range []string{"%v", "%+v", "%#v", "%s", "%q", "%x", "%d"} {
		_, _ = fmt.Fprintf(&out, verb+verb+verb+verb, token, &token, a, holder)
	}
	for _, h := range []slog.Handler{slog.NewTextHandler(&out, nil), slog.NewJSONHandler(&out, nil)} {
		slog.New(h).Info("x", "token", token, "pointer", &token, "authorities", a, "holder", holder, "list", []Token{token})
	}
	if _, err := json.Marshal(holder); err == nil {
		t.Error("secrets were marshalled without anybody asking for them by name")
	}
	for _, s := range secrets {
		if strings.Contains(out.String(), s) {
			t.Fatalf("a secret is in %s", out.String())
		}
	}
	if !strings.Contains(out.String(), token.CAHash()[:12]) {
		t.Error("which authority a token names is not shown")
	}
}

func FuzzParseToken(f *testing.F) {
	f.Add("K10" + strings.Repeat("ab", 32) + "::server:secret")
	f.Add("K10:::x")
	f.Fuzz(func(t *testing.T, s string) {
		token, err := ParseToken(s)
		if err != nil {
			if !errors.Is(err, ErrToken) {
				t.Fatalf("unclassified: %v", err)
			}
			return
		}
		if token.Reveal() != strings.TrimSpace(s) {
			t.Fatalf("%q read back as %q", s, token.Reveal())
		}
		if len(token.Secret()) > 8 && strings.Contains(token.String(), token.Secret()) {
			t.Fatal("printed")
		}
	})
}

func FuzzDecode(f *testing.F) {
	b, err := generate(f).Encode()
	if err != nil {
		f.Fatal(err)
	}
	f.Add(b)
	f.Add([]byte("{}"))
	f.Fuzz(func(t *testing.T, b []byte) {
		a, err := Decode(b)
		if err != nil {
			if !errors.Is(err, ErrMalformed) {
				t.Fatalf("unclassified: %v", err)
			}
			return
		}
		if _, err := a.Files(); err != nil {
			t.Fatal(err)
		}
	})
}

func FuzzCAHash(f *testing.F) {
	f.Add(generate(f).ServerCA())
	f.Fuzz(func(t *testing.T, b []byte) {
		if hash, err := CAHash(b); err == nil && len(hash) != hashLength || err != nil && !errors.Is(err, ErrMalformed) {
			t.Fatalf("%q, %v", hash, err)
		}
	})
}
