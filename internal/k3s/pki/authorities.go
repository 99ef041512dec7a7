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
	"io/fs"
	"log/slog"
	"math/big"
	"time"
)

const (
	// Validity of an authority, as k3s gives its own.
	Validity = 10 * 365 * 24 * time.Hour
	// Backdate is how long before its making an authority becomes valid.
	// Certificates that k3s issues begin when their authority does, so a node
	// whose clock is behind the founder's would refuse the cluster until its
	// own clock had passed that moment.
	Backdate = 24 * time.Hour

	// clientBackdate lets a server whose clock is behind accept a certificate.
	clientBackdate = 5 * time.Minute

	// maxPublishedBytes bounds what Decode reads; five authorities take 3 KiB.
	maxPublishedBytes = 16 << 10
	// maxCertificateBytes bounds one certificate in it.
	maxCertificateBytes = 2 << 10
	// MaxCABytes bounds a bundle of CA certificates that is hashed or parsed.
	MaxCABytes = 64 << 10
)

// ErrMalformed says that published authorities, or a CA bundle, are not what
// this package makes or k3s serves.
var ErrMalformed = errors.New("malformed authorities")

// authority is one signing certificate of a cluster.
type authority struct {
	// path is the file name below server/tls, without .crt or .key.
	path string
	// commonName precedes "-ca@<seconds since 1970>", as k3s names them.
	commonName string
}

// authorities returns every authority that k3s reads before its first start,
// in the order they are published.
func authorities() []authority {
	return []authority{
		{"server-ca", "k3s-server"},
		{"client-ca", "k3s-client"},
		{"request-header-ca", "k3s-request-header"},
		{"etcd/server-ca", "etcd-server"},
		{"etcd/peer-ca", "etcd-peer"},
	}
}

const (
	serverCA   = "server-ca"
	clientCA   = "client-ca"
	serviceKey = "service.key"
)

// File is one file of k3s's server/tls directory.
type File struct {
	// Path is relative to server/tls, with slashes.
	Path string
	// Mode is 0644 for certificates and 0600 for keys.
	Mode fs.FileMode
	// Data is PEM. It is secret where Mode is 0600.
	Data []byte
}

// Authorities are the certificate authorities of one generation of a cluster,
// with their keys, and the key that signs service account tokens.
type Authorities struct {
	pairs   map[string]pair
	service *ecdsa.PrivateKey
}

type pair struct {
	certificate *x509.Certificate
	key         *ecdsa.PrivateKey
}

// Generate makes new authorities, valid from Backdate before now for Validity
// in all. Every key is ECDSA on P-256.
func Generate(now time.Time) (*Authorities, error) {
	a := &Authorities{pairs: make(map[string]pair)}
	for _, spec := range authorities() {
		key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
		if err != nil {
			return nil, fmt.Errorf("make the key of %s: %w", spec.path, err)
		}
		serial, err := rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 127))
		if err != nil {
			return nil, fmt.Errorf("make the serial number of %s: %w", spec.path, err)
		}
		begin := now.Add(-Backdate).UTC().Truncate(time.Second)
		template := &x509.Certificate{
			SerialNumber:          serial.Add(serial, big.NewInt(1)),
			Subject:               pkix.Name{CommonName: fmt.Sprintf("%s-ca@%d", spec.commonName, now.Unix())},
			NotBefore:             begin,
			NotAfter:              begin.Add(Validity),
			KeyUsage:              x509.KeyUsageKeyEncipherment | x509.KeyUsageDigitalSignature | x509.KeyUsageCertSign,
			BasicConstraintsValid: true,
			IsCA:                  true,
		}
		der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
		if err != nil {
			return nil, fmt.Errorf("sign %s: %w", spec.path, err)
		}
		certificate, err := x509.ParseCertificate(der)
		if err != nil {
			return nil, fmt.Errorf("read back %s: %w", spec.path, err)
		}
		a.pairs[spec.path] = pair{certificate, key}
	}
	service, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, fmt.Errorf("make the service account key: %w", err)
	}
	a.service = service
	return a, nil
}

// ServerCA returns the certificate that signs what servers show to nodes: the
// exact bytes of server-ca.crt, which k3s serves as /cacerts and hashes.
func (a *Authorities) ServerCA() []byte { return encodeCertificate(a.pairs[serverCA].certificate) }

// Files returns the files to place in server/tls before k3s first starts,
// ordered. The same authorities give the same bytes every time.
func (a *Authorities) Files() ([]File, error) {
	var files []File
	for _, spec := range authorities() {
		p := a.pairs[spec.path]
		key, err := encodeKey(p.key)
		if err != nil {
			return nil, fmt.Errorf("encode the key of %s: %w", spec.path, err)
		}
		files = append(files,
			File{Path: spec.path + ".crt", Mode: 0o644, Data: encodeCertificate(p.certificate)},
			File{Path: spec.path + ".key", Mode: 0o600, Data: key})
	}
	key, err := encodeKey(a.service)
	if err != nil {
		return nil, fmt.Errorf("encode the service account key: %w", err)
	}
	return append(files, File{Path: serviceKey, Mode: 0o600, Data: key}), nil
}

// published is the form in which authorities are stored: certificates as DER
// and keys as bare scalars, since the files themselves exceed the 4 KiB that a
// parameter of AWS Systems Manager holds.
type published struct {
	Authorities map[string]publishedPair `json:"authorities"`
	ServiceKey  []byte                   `json:"serviceKey"`
	// ServerCAHash is the hash that tokens carry; it shows that the files made
	// from this are byte for byte those of the founder.
	ServerCAHash string `json:"serverCAHash"`
}

type publishedPair struct {
	Certificate []byte `json:"cert"`
	Key         []byte `json:"key"`
}

// ClientCertificate returns a certificate with which a client is user name of the
// groups to the cluster's API server, valid from a few minutes ago for the time
// given. Whoever has the authorities may be anybody; keep it short and in memory.
func (a *Authorities) ClientCertificate(name string, groups []string, valid time.Duration) (tls.Certificate, error) {
	issuer := a.pairs[clientCA]
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return tls.Certificate{}, fmt.Errorf("make a key: %w", err)
	}
	serial, err := rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 126))
	if err != nil {
		return tls.Certificate{}, fmt.Errorf("make a serial number: %w", err)
	}
	now := time.Now()
	der, err := x509.CreateCertificate(rand.Reader, &x509.Certificate{
		SerialNumber: serial.Add(serial, big.NewInt(1)), Subject: pkix.Name{CommonName: name, Organization: groups},
		NotBefore: now.Add(-clientBackdate), NotAfter: now.Add(valid),
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth},
	}, issuer.certificate, key.Public(), issuer.key)
	if err != nil {
		return tls.Certificate{}, fmt.Errorf("sign a client certificate: %w", err)
	}
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}, nil
}

// Encode returns the authorities for publication, at most 3.5 KiB. The result
// is secret: whoever has it can impersonate anything in the cluster.
func (a *Authorities) Encode() ([]byte, error) {
	hash, err := CAHash(a.ServerCA())
	if err != nil {
		return nil, err
	}
	out := published{Authorities: make(map[string]publishedPair), ServerCAHash: hash}
	for path, p := range a.pairs {
		scalar, err := p.key.Bytes()
		if err != nil {
			return nil, fmt.Errorf("encode the key of %s: %w", path, err)
		}
		out.Authorities[path] = publishedPair{Certificate: p.certificate.Raw, Key: scalar}
	}
	if out.ServiceKey, err = a.service.Bytes(); err != nil {
		return nil, fmt.Errorf("encode the service account key: %w", err)
	}
	return json.Marshal(out)
}

// Decode reads what Encode made. It checks that every authority is there, may
// sign, signed itself and has its own key, so that k3s is never started with
// half a set; it does not check the time. Errors wrap ErrMalformed and contain
// nothing of the input.
func Decode(b []byte) (*Authorities, error) {
	if len(b) > maxPublishedBytes {
		return nil, fmt.Errorf("%w: %d bytes, more than %d", ErrMalformed, len(b), maxPublishedBytes)
	}
	var in published
	d := json.NewDecoder(bytes.NewReader(b))
	d.DisallowUnknownFields()
	if err := d.Decode(&in); err != nil {
		return nil, fmt.Errorf("%w: not the JSON that was published", ErrMalformed)
	}
	if len(in.Authorities) != len(authorities()) {
		return nil, fmt.Errorf("%w: %d authorities, want %d", ErrMalformed, len(in.Authorities), len(authorities()))
	}
	a := &Authorities{pairs: make(map[string]pair)}
	for _, spec := range authorities() {
		p, err := decodePair(in.Authorities[spec.path])
		if err != nil {
			return nil, fmt.Errorf("%w: %s: %w", ErrMalformed, spec.path, err)
		}
		a.pairs[spec.path] = p
	}
	var err error
	if a.service, err = ecdsa.ParseRawPrivateKey(elliptic.P256(), in.ServiceKey); err != nil {
		return nil, fmt.Errorf("%w: no usable service account key", ErrMalformed)
	}
	hash, err := CAHash(a.ServerCA())
	if err != nil {
		return nil, err
	}
	if hash != in.ServerCAHash {
		return nil, fmt.Errorf("%w: the server authority hashes to %s, its founder said %.64q", ErrMalformed, hash, in.ServerCAHash)
	}
	return a, nil
}

func decodePair(in publishedPair) (pair, error) {
	if len(in.Certificate) > maxCertificateBytes {
		return pair{}, fmt.Errorf("a certificate of %d bytes", len(in.Certificate))
	}
	certificate, err := x509.ParseCertificate(in.Certificate)
	if err != nil {
		return pair{}, errors.New("no usable certificate")
	}
	key, err := ecdsa.ParseRawPrivateKey(elliptic.P256(), in.Key)
	if err != nil {
		return pair{}, errors.New("no usable key")
	}
	switch public, ok := certificate.PublicKey.(*ecdsa.PublicKey); {
	case !ok || !public.Equal(key.Public()):
		return pair{}, errors.New("the key is not the certificate's")
	case !certificate.IsCA || certificate.KeyUsage&x509.KeyUsageCertSign == 0:
		return pair{}, errors.New("the certificate may not sign others")
	case certificate.CheckSignatureFrom(certificate) != nil:
		return pair{}, errors.New("the certificate did not sign itself")
	}
	return pair{certificate, key}, nil
}

// String names the authorities by the hash of the one that servers show.
func (a *Authorities) String() string {
	hash, err := CAHash(a.ServerCA())
	if err != nil {
		return "authorities (unusable)"
	}
	return "authorities of server CA " + hash[:12]
}

// Format prints String whatever the verb, since %#v would print keys.
func (a *Authorities) Format(f fmt.State, _ rune) { _, _ = f.Write([]byte(a.String())) }

// LogValue logs String.
func (a *Authorities) LogValue() slog.Value { return slog.StringValue(a.String()) }

// MarshalJSON always fails: authorities leave the process through Encode only.
func (a *Authorities) MarshalJSON() ([]byte, error) {
	return nil, errors.New("authorities are published with Encode, not as part of something else")
}

// CAHash returns the hash of a bundle of CA certificates that k3s puts into
// tokens and compares with what a server serves as /cacerts: lower-case hex
// SHA-256 of the bytes of a bundle of one certificate, else of the DER of the
// root to which the first certificate chains, or of the bytes where it chains
// to none (pkg/clientaccess/token.go of k3s). Errors wrap ErrMalformed.
func CAHash(bundle []byte) (string, error) {
	certificates, err := parseBundle(bundle)
	if err != nil {
		return "", err
	}
	hashed := bundle
	if len(certificates) > 1 {
		roots, intermediates := x509.NewCertPool(), x509.NewCertPool()
		for _, c := range certificates[1:] {
			if len(c.AuthorityKeyId) == 0 || bytes.Equal(c.AuthorityKeyId, c.SubjectKeyId) {
				roots.AddCert(c)
			} else {
				intermediates.AddCert(c)
			}
		}
		chains, err := certificates[0].Verify(x509.VerifyOptions{Roots: roots, Intermediates: intermediates})
		if err == nil {
			hashed = chains[0][len(chains[0])-1].Raw
		}
	}
	sum := sha256.Sum256(hashed)
	return hex.EncodeToString(sum[:]), nil
}

// Pool returns the certificates of a bundle as roots to verify servers with.
// Errors wrap ErrMalformed.
func Pool(bundle []byte) (*x509.CertPool, error) {
	certificates, err := parseBundle(bundle)
	if err != nil {
		return nil, err
	}
	pool := x509.NewCertPool()
	for _, c := range certificates {
		pool.AddCert(c)
	}
	return pool, nil
}

func parseBundle(bundle []byte) ([]*x509.Certificate, error) {
	if len(bundle) > MaxCABytes {
		return nil, fmt.Errorf("%w: a CA bundle of %d bytes, more than %d", ErrMalformed, len(bundle), MaxCABytes)
	}
	var certificates []*x509.Certificate
	for rest := bundle; ; {
		var block *pem.Block
		if block, rest = pem.Decode(rest); block == nil {
			break
		}
		if block.Type != "CERTIFICATE" || len(block.Headers) != 0 {
			continue
		}
		c, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			return nil, fmt.Errorf("%w: certificate %d of the CA bundle: %w", ErrMalformed, len(certificates)+1, err)
		}
		certificates = append(certificates, c)
	}
	if len(certificates) == 0 {
		return nil, fmt.Errorf("%w: no certificate in the CA bundle", ErrMalformed)
	}
	return certificates, nil
}

func encodeCertificate(c *x509.Certificate) []byte {
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: c.Raw})
}

// encodeKey writes a key as k3s writes its own.
func encodeKey(key *ecdsa.PrivateKey) ([]byte, error) {
	der, err := x509.MarshalECPrivateKey(key)
	if err != nil {
		return nil, err
	}
	return pem.EncodeToMemory(&pem.Block{Type: "EC PRIVATE KEY", Bytes: der}), nil
}
