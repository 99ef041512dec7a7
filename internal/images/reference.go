package images

import (
	"fmt"
	"strings"

	"github.com/distribution/reference"
)

// maxReferenceBytes bounds an image reference: 255 for the name, and room for
// a tag (128) and a digest (71).
const maxReferenceBytes = 512

// Reference is an image's name in canonical form, as containerd's CRI plugin
// stores it: with registry host, and with either a tag or a digest.
type Reference struct {
	// Name is the whole reference.
	Name string
	// Repository is Name without tag and digest.
	Repository string
	// Host is the registry's host, with its port if it has one.
	Host string
	// Digest is "sha256:<hex>", empty if Name has a tag.
	Digest string
}

// ParseReference makes an image name canonical by the rules that containerd
// and kubelet use: docker.io and library/ are filled in, :latest too, and of
// a tag and a digest the digest counts. Errors are *[Error] with
// [CodeInvalidReference].
func ParseReference(s string) (Reference, error) {
	bad := func(reason string) (Reference, error) {
		return Reference{}, &Error{Code: CodeInvalidReference,
			Detail: fmt.Sprintf("%.100q is not an image reference: %s", s, reason)}
	}
	if len(s) > maxReferenceBytes {
		return bad(fmt.Sprintf("it has more than %d bytes", maxReferenceBytes))
	}
	named, err := reference.ParseDockerRef(s)
	if err != nil {
		return bad(err.Error())
	}
	r := Reference{Name: named.String(), Repository: named.Name(), Host: reference.Domain(named)}
	if d, ok := named.(reference.Digested); ok {
		if r.Digest = d.Digest().String(); !strings.HasPrefix(r.Digest, "sha256:") {
			return bad("only sha256 digests are supported")
		}
	}
	return r, nil
}

// ByDigest is the canonical reference of the same repository with digest.
func (r Reference) ByDigest(digest string) string { return r.Repository + "@" + digest }
