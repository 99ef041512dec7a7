package artifact

import (
	"crypto/ed25519"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"strings"

	"github.com/hearth-sh/hearth/api/v1alpha1"
	"github.com/hearth-sh/hearth/internal/bootstrap/fault"
)

const (
	// SignaturesKind is the kind of the document that Signatures is.
	SignaturesKind = "ArtifactManifestSignatures"
	// SignatureSuffix is added to a manifest's URL or path to get that of its
	// signatures.
	SignatureSuffix = ".sig"
	// MaxSignatures bounds the signatures of one manifest and the keys of a
	// Trust, and with them the work that a stranger can cause.
	MaxSignatures = 16

	maxSignaturesBytes = 16 << 10
	publicKeyPrefix    = "ed25519:"
	// signedPrefix goes before the manifest's bytes when they are signed, so
	// that a signature made with the same key for anything else does not fit.
	signedPrefix = v1alpha1.APIVersion + " " + ManifestKind + "\n"
)

// PublicKey verifies manifests; its text form is "ed25519:" and the key's 32
// bytes in standard base64.
type PublicKey struct{ key [ed25519.PublicKeySize]byte }

// ParsePublicKey reads the text form of a key.
func ParsePublicKey(s string) (PublicKey, error) {
	var k PublicKey
	return k, k.UnmarshalText([]byte(s))
}

// ID names the key in signatures: the first 16 hexadecimal digits of its
// SHA-256 sum. It is a hint about which key to try and proves nothing.
func (k PublicKey) ID() string {
	sum := sha256.Sum256(k.key[:])
	return hex.EncodeToString(sum[:8])
}

// String returns the text form.
func (k PublicKey) String() string {
	return publicKeyPrefix + base64.StdEncoding.EncodeToString(k.key[:])
}

// MarshalText returns the text form.
func (k PublicKey) MarshalText() ([]byte, error) { return []byte(k.String()), nil }

// UnmarshalText accepts exactly the text form.
func (k *PublicKey) UnmarshalText(b []byte) error {
	text, ok := strings.CutPrefix(string(b), publicKeyPrefix)
	raw, err := base64.StdEncoding.Strict().DecodeString(text)
	if !ok || err != nil || len(raw) != len(k.key) || base64.StdEncoding.EncodeToString(raw) != text {
		return fmt.Errorf("%.80q is no public key: it needs \"%s\" and 32 bytes in base64", b, publicKeyPrefix)
	}
	k.key = [ed25519.PublicKeySize]byte(raw)
	if k.key == ([ed25519.PublicKeySize]byte{}) {
		// It encodes a point of small order, for which anybody can make signatures.
		return errors.New("a public key of zeros is no key")
	}
	return nil
}

// PrivateKey signs manifests. It prints as its public key's ID only.
type PrivateKey struct{ key ed25519.PrivateKey }

// GenerateKey makes a key from the system's randomness.
func GenerateKey() (PrivateKey, error) {
	_, key, err := ed25519.GenerateKey(rand.Reader)
	return PrivateKey{key}, err
}

// ParsePrivateKey reads a key in PEM-armoured PKCS #8 (RFC 8410), which is
// also what `openssl genpkey -algorithm ed25519` writes.
func ParsePrivateKey(text []byte) (PrivateKey, error) {
	block, rest := pem.Decode(text)
	if block == nil || block.Type != "PRIVATE KEY" || strings.TrimSpace(string(rest)) != "" {
		return PrivateKey{}, errors.New("this is no private key: it needs one PEM block of type PRIVATE KEY")
	}
	parsed, err := x509.ParsePKCS8PrivateKey(block.Bytes)
	if err != nil {
		return PrivateKey{}, fmt.Errorf("this is no private key: %w", err)
	}
	key, ok := parsed.(ed25519.PrivateKey)
	if !ok {
		return PrivateKey{}, fmt.Errorf("this is a %T: manifests are signed with ed25519", parsed)
	}
	return PrivateKey{key}, nil
}

// Encode returns the form that ParsePrivateKey reads. Keep it in a file of mode 0600.
func (k PrivateKey) Encode() ([]byte, error) {
	der, err := x509.MarshalPKCS8PrivateKey(k.key)
	if err != nil {
		return nil, err
	}
	return pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der}), nil
}

// Public returns the key that verifies what this one signs.
func (k PrivateKey) Public() PublicKey {
	return PublicKey{[ed25519.PublicKeySize]byte(k.key.Public().(ed25519.PublicKey))}
}

// String keeps the key out of logs.
func (k PrivateKey) String() string { return "ed25519 private key of " + k.Public().ID() }

// GoString keeps the key out of logs.
func (k PrivateKey) GoString() string { return k.String() }

// Signatures is the document beside a manifest. A signature is Ed25519 (RFC
// 8032) over the line "hearth.sh/v1alpha1 ArtifactManifest\n" followed by the
// bytes of the manifest file as they are.
type Signatures struct {
	APIVersion string      `json:"apiVersion"`
	Kind       string      `json:"kind"`
	Signatures []Signature `json:"signatures"`
}

// Signature is that of one key.
type Signature struct {
	// KeyID is PublicKey.ID of the key.
	KeyID string `json:"keyID"`
	// Signature has 64 bytes, in base64 when encoded.
	Signature []byte `json:"signature"`
}

// Sign returns the signatures document for the bytes of a manifest, which must
// be valid. During the rotation of a key it is called with the old and the new
// one.
func Sign(manifest []byte, keys ...PrivateKey) ([]byte, error) {
	if _, err := ParseManifest(manifest); err != nil {
		return nil, err
	}
	if len(keys) == 0 || len(keys) > MaxSignatures {
		return nil, fmt.Errorf("sign manifest: %d keys were given, between 1 and %d are allowed", len(keys), MaxSignatures)
	}
	s := Signatures{APIVersion: v1alpha1.APIVersion, Kind: SignaturesKind}
	for _, k := range keys {
		s.Signatures = append(s.Signatures, Signature{KeyID: k.Public().ID(), Signature: ed25519.Sign(k.key, signed(manifest))})
	}
	b, err := json.MarshalIndent(s, "", "  ")
	return append(b, '\n'), err
}

func signed(manifest []byte) []byte {
	return append([]byte(signedPrefix), manifest...)
}

// ParseSignatures reads a signatures document strictly; it verifies nothing.
func ParseSignatures(raw []byte) (*Signatures, error) {
	s := new(Signatures)
	if err := parseStrict(raw, maxSignaturesBytes, s); err != nil {
		return nil, err
	}
	switch {
	case s.APIVersion != v1alpha1.APIVersion || s.Kind != SignaturesKind:
		return nil, fmt.Errorf("it is %.60q %.60q, not %q %q", s.APIVersion, s.Kind, v1alpha1.APIVersion, SignaturesKind)
	case len(s.Signatures) == 0 || len(s.Signatures) > MaxSignatures:
		return nil, fmt.Errorf("it has %d signatures: between 1 and %d are allowed", len(s.Signatures), MaxSignatures)
	}
	for _, one := range s.Signatures {
		if len(one.Signature) != ed25519.SignatureSize {
			return nil, fmt.Errorf("a signature has %d bytes instead of %d", len(one.Signature), ed25519.SignatureSize)
		}
	}
	return s, nil
}

// Trust says whose manifests are believed.
type Trust struct {
	// Keys are trusted equally: two while one replaces the other.
	Keys []PublicKey
	// Threshold is how many different keys must have signed; 0 means 1.
	Threshold int
}

// Validate says what is wrong with the trust.
func (t Trust) Validate() error {
	seen := make(map[PublicKey]bool, len(t.Keys))
	for _, k := range t.Keys {
		if k == (PublicKey{}) || seen[k] {
			return errors.New("a trusted key is empty or there twice")
		}
		seen[k] = true
	}
	switch need := max(t.Threshold, 1); {
	case len(t.Keys) == 0:
		return errors.New("no key is trusted: name the public keys that sign artifact manifests")
	case len(t.Keys) > MaxSignatures:
		return fmt.Errorf("%d keys are trusted: at most %d are allowed", len(t.Keys), MaxSignatures)
	case t.Threshold < 0 || need > len(t.Keys):
		return fmt.Errorf("%d signatures are asked for but %d keys are trusted", t.Threshold, len(t.Keys))
	}
	return nil
}

// OpenManifest verifies the signatures and only then reads the manifest. Use
// Fetcher.Manifest to be safe from replayed manifests as well.
func OpenManifest(manifest, signatures []byte, t Trust) (*Manifest, error) {
	untrusted := func(err error, format string, args ...any) error {
		return fault.New(CodeManifestUntrusted, err, "sign the manifest with a trusted key, or add its key to the trusted ones", format, args...)
	}
	if err := t.Validate(); err != nil {
		return nil, untrusted(err, "no manifest can be trusted")
	}
	if len(manifest) > MaxManifestBytes {
		return nil, manifestInvalid(fmt.Errorf("it has more than %d bytes", MaxManifestBytes))
	}
	s, err := ParseSignatures(signatures)
	if err != nil {
		return nil, untrusted(err, "the signatures of the artifact manifest cannot be read")
	}
	message := signed(manifest)
	good := make(map[PublicKey]bool)
	var ids []string
	for _, one := range s.Signatures {
		for _, k := range t.Keys {
			if !good[k] && k.ID() == one.KeyID && ed25519.Verify(k.key[:], message, one.Signature) {
				good[k] = true
			}
		}
		ids = append(ids, fmt.Sprintf("%.16q", one.KeyID))
	}
	if need := max(t.Threshold, 1); len(good) < need {
		return nil, untrusted(nil, "the artifact manifest has %d valid signatures of trusted keys and needs %d (it names the keys %s)", len(good), need, strings.Join(ids, ", "))
	}
	return ParseManifest(manifest)
}
