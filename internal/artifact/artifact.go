package artifact

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"net/url"
	"path"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
)

const (
	// MaxURLs bounds the mirrors of one artifact.
	MaxURLs = 16
	// DefaultMaxSize bounds downloads and installed files whose size was not
	// given, in bytes. The largest file a node needs today, k3s's images
	// uncompressed, has less than 1 GiB.
	DefaultMaxSize = 4 << 30

	maxURLLength  = 2048
	maxPathLength = 4096
)

// Digest is a SHA-256 sum; its text form is 64 lower-case hexadecimal digits.
type Digest [sha256.Size]byte

// ParseDigest reads the text form of a digest.
func ParseDigest(s string) (Digest, error) {
	var d Digest
	return d, d.UnmarshalText([]byte(s))
}

// IsZero says whether no digest was given.
func (d Digest) IsZero() bool { return d == Digest{} }

// String returns the text form, or "" when no digest was given.
func (d Digest) String() string {
	if d.IsZero() {
		return ""
	}
	return hex.EncodeToString(d[:])
}

// MarshalText returns the text form.
func (d Digest) MarshalText() ([]byte, error) { return []byte(d.String()), nil }

// UnmarshalText accepts exactly the text form.
func (d *Digest) UnmarshalText(b []byte) error {
	var sum Digest
	if len(b) != 2*len(sum) || strings.ContainsAny(string(b), "ABCDEF") {
		return fmt.Errorf("%.80q is no SHA-256 digest: it needs 64 lower-case hexadecimal digits", b)
	}
	if _, err := hex.Decode(sum[:], b); err != nil {
		return fmt.Errorf("%.80q is no SHA-256 digest: it needs 64 lower-case hexadecimal digits", b)
	}
	*d = sum
	return nil
}

// Mode holds the permission bits of an installed file; its text form is octal,
// such as "0755".
type Mode fs.FileMode

// String returns the text form.
func (m Mode) String() string { return fmt.Sprintf("%04o", uint32(m)) }

// MarshalText returns the text form.
func (m Mode) MarshalText() ([]byte, error) { return []byte(m.String()), nil }

// UnmarshalText accepts octal permission bits without set-id and sticky bits.
func (m *Mode) UnmarshalText(b []byte) error {
	v, err := strconv.ParseUint(string(b), 8, 32)
	if err != nil || v > 0o777 {
		return fmt.Errorf("%.20q is no file mode: it needs octal permission bits such as \"0755\"", b)
	}
	*m = Mode(v)
	return nil
}

// Format says what a download is and so what is installed of it.
type Format string

// The formats. Of a tar archive one member is installed, a regular file.
const (
	// FormatRaw is installed as it is; it is what "" means.
	FormatRaw     Format = "raw"
	FormatGzip    Format = "gzip"
	FormatZstd    Format = "zstd"
	FormatTar     Format = "tar"
	FormatTarGzip Format = "tar+gzip"
	FormatTarZstd Format = "tar+zstd"
)

func (f Format) raw() bool { return f == FormatRaw || f == "" }

func (f Format) tar() bool {
	return f == FormatTar || f == FormatTarGzip || f == FormatTarZstd
}

func (f Format) zstd() bool { return f == FormatZstd || f == FormatTarZstd }

func (f Format) known() bool {
	switch f {
	case "", FormatRaw, FormatGzip, FormatZstd, FormatTar, FormatTarGzip, FormatTarZstd:
		return true
	}
	return false
}

// Artifact is one file to install, pinned by digest.
type Artifact struct {
	// Name and Version are for people and for Manifest.Find, such as "k3s" and
	// "v1.36.2+k3s1".
	Name    string `json:"name"`
	Version string `json:"version,omitempty"`
	// OS and Arch are what the file runs on, in Go's terms ("linux", "arm64");
	// empty means anything.
	OS   string `json:"os,omitempty"`
	Arch string `json:"arch,omitempty"`

	// URLs are where the same bytes can be had, the preferred one first:
	// https://…, http://… (loopback only unless Options.AllowHTTP),
	// s3://BUCKET/KEY?region=REGION, where the region may be left out to mean
	// that of the S3 client, or file:///PATH.
	URLs []string `json:"urls"`
	// SHA256 is the digest of the download.
	SHA256 Digest `json:"sha256,omitzero"`
	// Size is the exact size of the download in bytes; 0 means unknown.
	Size int64 `json:"size,omitempty"`

	// Format is what the download is; empty means raw.
	Format Format `json:"format,omitempty"`
	// Member is the path of the file inside a tar archive.
	Member string `json:"member,omitempty"`
	// InstalledSHA256 is the digest of the installed file. Every format but
	// raw needs it: without it nothing on disk could be recognised.
	InstalledSHA256 Digest `json:"installedSHA256,omitzero"`
	// InstalledSize is the exact size of the installed file in bytes where
	// that is not Size; 0 means unknown.
	InstalledSize int64 `json:"installedSize,omitempty"`

	// Path is where to install it, absolute.
	Path string `json:"path,omitempty"`
	// Mode has the permission bits of the installed file; 0 means 0644.
	Mode Mode `json:"mode,omitzero"`
}

// String names the artifact in messages.
func (a *Artifact) String() string {
	if a.Version == "" {
		return a.Name
	}
	return a.Name + " " + a.Version
}

// installedSHA256 is the digest of what lies at Path when all is well.
func (a *Artifact) installedSHA256() Digest {
	if a.Format.raw() {
		return a.SHA256
	}
	return a.InstalledSHA256
}

// installedSize is the size of what lies at Path, or 0 when it is unknown.
func (a *Artifact) installedSize() int64 {
	if a.Format.raw() {
		return a.Size
	}
	return a.InstalledSize
}

func (a *Artifact) mode() fs.FileMode {
	if a.Mode == 0 {
		return 0o644
	}
	return fs.FileMode(a.Mode)
}

var (
	nameSyntax     = regexp.MustCompile(`^[a-z0-9]([a-z0-9._-]{0,98}[a-z0-9])?$`)
	versionSyntax  = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9.+_~-]{0,99}$`)
	platformSyntax = regexp.MustCompile(`^[a-z0-9]{1,20}$`)
)

// Validate says what is wrong with the artifact as it would be installed, one
// sentence for every mistake. Whether http:// URLs may be used is for
// Options.AllowHTTP to say.
func (a *Artifact) Validate() error {
	errs := a.validate()
	switch {
	case a.Path == "":
		errs = append(errs, errors.New("path is missing: say where to install it"))
	case !filepath.IsAbs(a.Path) || filepath.Clean(a.Path) != a.Path || a.Path == "/" || len(a.Path) > maxPathLength || strings.ContainsRune(a.Path, 0):
		errs = append(errs, fmt.Errorf("path %.100q is not a clean absolute path of a file", a.Path))
	}
	return joined(a.Name, errs)
}

// validate checks what an entry of a manifest must have as well.
func (a *Artifact) validate() []error {
	var errs []error
	bad := func(format string, args ...any) { errs = append(errs, fmt.Errorf(format, args...)) }
	if !nameSyntax.MatchString(a.Name) {
		bad("name %.120q must have lower-case letters, digits, '.', '_' and '-' only, at most 100", a.Name)
	}
	if a.Version != "" && !versionSyntax.MatchString(a.Version) {
		bad("version %.120q has characters that versions do not have", a.Version)
	}
	for _, p := range []string{a.OS, a.Arch} {
		if p != "" && !platformSyntax.MatchString(p) {
			bad("%.40q names no platform: use Go's names such as \"linux\" and \"arm64\"", p)
		}
	}
	if len(a.URLs) == 0 {
		bad("urls is empty: name at least one place to download it from")
	}
	if len(a.URLs) > MaxURLs {
		bad("urls has %d entries: at most %d are allowed", len(a.URLs), MaxURLs)
	}
	for _, u := range a.URLs[:min(len(a.URLs), MaxURLs)] {
		if _, err := parseLocation(u); err != nil {
			bad("%w", err)
		}
	}
	if a.SHA256.IsZero() {
		bad("sha256 is missing: the digest of the download must be known beforehand")
	}
	if a.Size < 0 || a.InstalledSize < 0 {
		bad("size and installedSize cannot be negative")
	}
	if !a.Format.known() {
		bad("format %.40q is unknown: it may be raw, gzip, zstd, tar, tar+gzip or tar+zstd", string(a.Format))
	}
	switch {
	case a.Format.tar() && a.Member == "":
		bad("member is missing: say which file of the archive to install")
	case a.Format.tar() && (!fs.ValidPath(a.Member) || a.Member == "." || len(a.Member) > maxPathLength):
		bad("member %.100q is not a relative path of a file", a.Member)
	case !a.Format.tar() && a.Member != "":
		bad("member is for tar archives only")
	}
	switch {
	case !a.Format.raw() && a.InstalledSHA256.IsZero():
		bad("installedSHA256 is missing: format %s needs the digest of the unpacked file", a.Format)
	case a.Format.raw() && !a.InstalledSHA256.IsZero() && a.InstalledSHA256 != a.SHA256:
		bad("installedSHA256 differs from sha256, which cannot be for a file installed as it is")
	case a.Format.raw() && a.InstalledSize != 0 && a.Size != 0 && a.InstalledSize != a.Size:
		bad("installedSize differs from size, which cannot be for a file installed as it is")
	}
	if a.Mode > 0o777 {
		bad("mode has more than permission bits")
	}
	return errs
}

func joined(name string, errs []error) error {
	if len(errs) == 0 {
		return nil
	}
	return fmt.Errorf("artifact %.120q: %w", name, errors.Join(errs...))
}

// location is a parsed URL of an artifact.
type location struct {
	url *url.URL
	// bucket, key and region are for s3 only.
	bucket, key, region string
}

var (
	// bucketSyntax is that of S3's bucket names, dots included.
	bucketSyntax = regexp.MustCompile(`^[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]$`)
	regionSyntax = regexp.MustCompile(`^[a-z0-9-]{1,40}$`)
)

func parseLocation(s string) (location, error) {
	if len(s) > maxURLLength {
		return location{}, fmt.Errorf("a URL has %d bytes: at most %d are allowed", len(s), maxURLLength)
	}
	u, err := url.Parse(s)
	if err != nil {
		return location{}, fmt.Errorf("%.100q is no URL", s) // url.Parse would quote all of it, secrets included
	}
	l := location{url: u}
	switch {
	case u.User != nil:
		return location{}, fmt.Errorf("URL %s carries credentials: artifacts are public to the node, use s3:// with the node's role instead", l)
	case u.Fragment != "":
		return location{}, fmt.Errorf("URL %s has a fragment, which no server sees", l)
	case u.Scheme == "file":
		if u.Host != "" || u.RawQuery != "" || u.Path == "/" || !filepath.IsAbs(u.Path) || filepath.Clean(u.Path) != u.Path || strings.ContainsRune(u.Path, 0) {
			return location{}, fmt.Errorf("URL %s names no file of this machine: it needs file:///PATH", l)
		}
		return l, nil
	case u.Host == "":
		return location{}, fmt.Errorf("URL %.100q names no host", s)
	}
	switch u.Scheme {
	case "https", "http":
		if u.Hostname() == "" {
			return location{}, fmt.Errorf("URL %.100q names no host", s)
		}
		return l, nil
	case "s3":
		q := u.Query()
		l.bucket, l.key, l.region = u.Host, strings.TrimPrefix(u.Path, "/"), q.Get("region")
		q.Del("region")
		switch {
		case !bucketSyntax.MatchString(l.bucket):
			return location{}, fmt.Errorf("URL %s names no S3 bucket", l)
		case l.key == "" || len(l.key) > 1024:
			return location{}, fmt.Errorf("URL %s needs the key of an object, of at most 1024 bytes", l)
		case l.region != "" && !regionSyntax.MatchString(l.region), len(q) > 0:
			return location{}, fmt.Errorf("URL %s may have ?region=REGION and nothing else", l)
		}
		return l, nil
	}
	return location{}, fmt.Errorf("URL %s has scheme %q: use https, s3, file, or http to this machine", l, u.Scheme)
}

// String returns the URL without what may be secret in it: user, password and
// query, where presigned URLs carry their signature.
func (l location) String() string {
	u := *l.url
	u.User, u.RawQuery, u.Fragment = nil, "", ""
	if l.url.Scheme == "s3" && l.region != "" {
		u.RawQuery = "region=" + l.region
	}
	return u.String()
}

// isLoopback says whether a URL's host is this machine.
func isLoopback(host string) bool {
	if host == "localhost" || strings.HasSuffix(host, ".localhost") {
		return true
	}
	a, err := netip.ParseAddr(host)
	return err == nil && a.Unmap().IsLoopback()
}

// imdsIPv6 is EC2's metadata service, an address that is not link-local.
var imdsIPv6 = netip.MustParseAddr("fd00:ec2::254")

// isLinkLocal says whether a URL's host is on this link only, where instance
// metadata and credentials are served.
func isLinkLocal(host string) bool {
	a, err := netip.ParseAddr(host)
	if err != nil {
		return false
	}
	a = a.Unmap()
	return a.IsLinkLocalUnicast() || a.WithZone("") == imdsIPv6
}

// cleanMember is how names of archive members are compared: "./a" is "a".
func cleanMember(s string) string { return strings.TrimPrefix(path.Clean("/"+s), "/") }
