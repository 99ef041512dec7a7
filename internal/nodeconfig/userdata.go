package nodeconfig

import (
	"bytes"
	"compress/gzip"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"mime"
	"mime/multipart"
	"mime/quotedprintable"
	"net/mail"
	"path"
	"regexp"
	"strings"
	"unicode/utf8"

	"github.com/hearth-sh/hearth/api/v1alpha1"
)

// MediaType is the type of the MIME part of user-data that holds NodeConfig
// documents. cloud-init logs a warning about each part of a type it does
// not know; a part of type text/cloud-config whose write_files writes a file
// /etc/hearth/NAME.yaml is read as well and causes none.
const MediaType = "application/vnd.hearth.nodeconfig+yaml"

// ConfigDir is where configuration files lie.
const ConfigDir = "/etc/hearth"

const (
	userDataSource = "user-data"
	// maxParts bounds the MIME parts of user-data, nested ones included.
	maxParts = 64
	// maxMIMEDepth bounds how deep multipart messages nest.
	maxMIMEDepth = 4
)

// userData reads user-data and returns its NodeConfig documents. User-data
// that is for somebody else is a note; what cannot be decoded is a problem,
// because it may have been meant for us.
func userData(raw []byte, ps *problems) []*node {
	r := userDataReader{ps: ps, left: 4 * MaxDocumentBytes}
	if len(bytes.TrimSpace(raw)) == 0 {
		ps.notes = append(ps.notes, "there is no user-data")
		return nil
	}
	if len(raw) > MaxUserDataBytes {
		r.malformed(Origin{Source: userDataSource}, "it has %d bytes; EC2 allows at most %d", len(raw), MaxUserDataBytes)
		return nil
	}
	out := r.whole(raw, Origin{Source: userDataSource})
	if len(out) == 0 && len(ps.list) == 0 {
		note := "no NodeConfig in user-data"
		if len(r.seen) > 0 {
			note += ": it is " + strings.Join(r.seen, ", ")
		}
		ps.notes = append(ps.notes, note)
	}
	return out
}

type userDataReader struct {
	ps    *problems
	left  int // bytes that may still be made by decompressing and decoding
	parts int
	seen  []string // what it is instead
}

func (r *userDataReader) malformed(o Origin, format string, args ...any) {
	r.ps.add(Problem{Origin: o, Message: fmt.Sprintf(format, args...), code: CodeUserData})
}

func (r *userDataReader) foreign(what string) {
	if len(r.seen) < 8 {
		r.seen = append(r.seen, what)
	}
}

var gzipMagic = []byte{0x1f, 0x8b}

// whole undoes base64 and gzip around everything: tools encode once more than
// they need to, and EC2 takes the outermost base64 away itself.
func (r *userDataReader) whole(text []byte, o Origin) []*node {
	text, ok := r.decompress(text, o)
	if !ok {
		return nil
	}
	if looksLikeBase64(text) {
		decoded, err := decodeBase64(text)
		if err != nil {
			r.malformed(o, "it looks like base64 and is not: %v", err)
			return nil
		}
		if text, ok = r.decompress(decoded, o); !ok {
			return nil
		}
		if !utf8.Valid(text) || bytes.IndexByte(text, 0) >= 0 {
			r.malformed(o, "it looks like base64, but what that stands for is neither text nor gzip")
			return nil
		}
	}
	if !utf8.Valid(text) || bytes.IndexByte(text, 0) >= 0 {
		r.malformed(o, "it is neither UTF-8 text nor gzip")
		return nil
	}
	if isMIME(text) {
		return r.message(text, o, 0)
	}
	return r.body(text, "", o, true)
}

func (r *userDataReader) decompress(text []byte, o Origin) ([]byte, bool) {
	if !bytes.HasPrefix(text, gzipMagic) {
		return text, true
	}
	zr, err := gzip.NewReader(bytes.NewReader(text))
	if err != nil {
		r.malformed(o, "it begins like gzip and is not: %v", err)
		return nil, false
	}
	most := min(MaxDocumentBytes, r.left)
	out, err := io.ReadAll(io.LimitReader(zr, int64(most)+1))
	switch {
	case err != nil:
		r.malformed(o, "its gzip data is damaged or cut off: %v", err)
		return nil, false
	case len(out) > most:
		r.malformed(o, "it has more than %d bytes when decompressed", most)
		return nil, false
	}
	r.left -= len(out)
	return out, true
}

var base64Text = regexp.MustCompile(`^[A-Za-z0-9+/_-]{16,}={0,2}$`)

// looksLikeBase64 says whether text can only have been meant as base64: one
// long word when line ends are taken out. No other format of user-data is.
func looksLikeBase64(text []byte) bool {
	return base64Text.Match(withoutLineEnds(text))
}

func withoutLineEnds(text []byte) []byte {
	return bytes.Map(func(r rune) rune {
		if r == '\n' || r == '\r' || r == '\t' || r == ' ' {
			return -1
		}
		return r
	}, text)
}

// decodeBase64 accepts both alphabets, with and without padding.
func decodeBase64(text []byte) ([]byte, error) {
	word := strings.TrimRight(string(withoutLineEnds(text)), "=")
	encoding := base64.RawStdEncoding
	if strings.ContainsAny(word, "-_") {
		encoding = base64.RawURLEncoding
	}
	return encoding.DecodeString(word)
}

// A message begins with header lines; one of the two is always among them.
// Some tools put mbox's "From " line before.
var messageHead = regexp.MustCompile(`(?i)^\s*(?:From [^\n]*\n)?(?:[a-z][a-z0-9-]*:[^\n]*\n(?:[ \t][^\n]*\n)*)*(?:content-type|mime-version):`)

func isMIME(text []byte) bool { return messageHead.Match(text) }

var mboxLine = regexp.MustCompile(`^From [^\n]*\n`)

func (r *userDataReader) message(text []byte, o Origin, depth int) []*node {
	text = bytes.TrimLeft(text, " \t\r\n")
	text = text[len(mboxLine.Find(text)):]
	m, err := mail.ReadMessage(bytes.NewReader(text))
	if err != nil {
		r.malformed(o, "the header of its MIME message is damaged: %s", shorten(Redact(err.Error())))
		return nil
	}
	return r.entity(m.Header.Get, m.Body, o, depth)
}

// entity reads one MIME entity: a multipart container or a leaf.
func (r *userDataReader) entity(header func(string) string, content io.Reader, o Origin, depth int) []*node {
	mediaType, params := "text/plain", map[string]string(nil)
	if declared := header("Content-Type"); declared != "" {
		var err error
		if mediaType, params, err = mime.ParseMediaType(declared); err != nil {
			r.malformed(o, "a Content-Type of its MIME message is damaged: %s", shorten(Redact(err.Error())))
			return nil
		}
	}
	if !strings.HasPrefix(mediaType, "multipart/") {
		return r.leaf(mediaType, header("Content-Transfer-Encoding"), content, o)
	}
	switch {
	case depth >= maxMIMEDepth:
		r.malformed(o, "its MIME message nests deeper than %d levels", maxMIMEDepth)
		return nil
	case params["boundary"] == "":
		r.malformed(o, "its MIME message is multipart and names no boundary")
		return nil
	}
	var out []*node
	reader := multipart.NewReader(content, params["boundary"])
	for {
		part, err := reader.NextRawPart()
		if errors.Is(err, io.EOF) {
			return out
		}
		if err != nil {
			r.malformed(o, "its MIME message is damaged or cut off: %s", shorten(Redact(err.Error())))
			return out
		}
		at := o
		if !strings.HasPrefix(strings.ToLower(strings.TrimSpace(part.Header.Get("Content-Type"))), "multipart/") {
			if r.parts++; r.parts > maxParts {
				r.malformed(o, "its MIME message has more than %d parts", maxParts)
				return out
			}
			at.Part = r.parts
		}
		out = append(out, r.entity(part.Header.Get, part, at, depth+1)...)
	}
}

func (r *userDataReader) leaf(mediaType, encoding string, content io.Reader, o Origin) []*node {
	most := min(MaxDocumentBytes, r.left)
	body, err := io.ReadAll(io.LimitReader(content, int64(most)+1))
	switch {
	case err != nil:
		r.malformed(o, "its MIME message is damaged or cut off: %s", shorten(Redact(err.Error())))
		return nil
	case len(body) > most:
		r.malformed(o, "its MIME message has more than %d bytes", most)
		return nil
	}
	switch encoding = strings.ToLower(strings.TrimSpace(encoding)); encoding {
	case "", "7bit", "8bit", "binary":
	case "base64":
		body, err = decodeBase64(body)
	case "quoted-printable":
		body, err = io.ReadAll(quotedprintable.NewReader(bytes.NewReader(body)))
	default:
		err = fmt.Errorf("%s is not known", quote(encoding))
	}
	if err != nil {
		r.malformed(o, "its Content-Transfer-Encoding does not decode: %s", shorten(Redact(err.Error())))
		return nil
	}
	r.left -= len(body)
	body, ok := r.decompress(body, o)
	if !ok {
		return nil
	}
	return r.body(body, mediaType, o, false)
}

// foreignBeginnings are what cloud-init and others recognise text by.
var foreignBeginnings = []struct{ begins, what string }{
	{"#!", "a script"},
	{"#include", "a list of URLs for cloud-init"},
	{"#cloud-boothook", "a boot hook for cloud-init"},
	{"#part-handler", "a part handler for cloud-init"},
	{"#upstart-job", "an upstart job"},
	{"## template:", "a template for cloud-init"},
	{"<powershell", "a PowerShell script"},
	{"<script", "a script"},
}

var mentionsUs = regexp.MustCompile(`(?mi)^[ \t]*["']?kind["']?:[ \t]*["']?NodeConfig\b|^[ \t]*["']?apiVersion["']?:[ \t]*["']?hearth\.sh/`)

// body reads what is neither encoded nor a message. Alone says that nothing
// else is in user-data, so that it is for somebody.
func (r *userDataReader) body(text []byte, mediaType string, o Origin, alone bool) []*node {
	text = bytes.TrimPrefix(text, []byte("\ufeff"))
	begins := func(s string) bool { return bytes.HasPrefix(text, []byte(s)) }
	switch {
	case mediaType == MediaType:
		if isText(text) {
			return accept(parseYAML(text, o, r.ps), r.ps, true)
		}
		r.malformed(o, "a part of type %s is not UTF-8 text", MediaType)
		return nil
	case !isText(text):
		r.foreign("binary data")
		return nil
	case begins("#cloud-config-archive") || mediaType == "text/cloud-config-archive":
		return r.archive(text, o)
	case begins("#cloud-config") || mediaType == "text/cloud-config":
		return r.cloudConfig(text, o)
	}
	for _, f := range foreignBeginnings {
		if begins(f.begins) {
			r.foreign(f.what)
			return nil
		}
	}
	switch mediaType {
	case "text/x-shellscript", "text/cloud-boothook", "text/part-handler", "text/x-include-url", "text/x-include-once-url", "text/jinja2", "text/upstart-job":
		r.foreign("a part of type " + mediaType)
		return nil
	}
	var unsaid problems
	documents := parseYAML(text, o, &unsaid)
	ours := len(unsaid.list) > 0 && mentionsUs.Match(text)
	anyMap := false
	for _, d := range documents {
		ours = ours || isOurs(d)
		anyMap = anyMap || d.kind == mapping
	}
	switch {
	case ours:
		for _, p := range unsaid.list {
			r.ps.add(p)
		}
		return accept(documents, r.ps, false)
	case alone && (len(unsaid.list) > 0 || !anyMap) && len(bytes.TrimSpace(text)) > 0:
		why := "it is plain text"
		if len(unsaid.list) > 0 {
			why = unsaid.list[0].Message
		}
		r.malformed(o, "it is nothing that this or cloud-init understands (%s)", why)
	case anyMap:
		r.foreign("YAML or JSON of another kind")
	default:
		r.foreign("text")
	}
	return nil
}

func isText(text []byte) bool { return utf8.Valid(text) && bytes.IndexByte(text, 0) < 0 }

// archive reads cloud-init's list of parts in YAML.
func (r *userDataReader) archive(text []byte, o Origin) []*node {
	var unsaid problems
	var out []*node
	for _, d := range parseYAML(text, o, &unsaid) {
		for _, item := range d.items {
			at := o
			if r.parts++; r.parts > maxParts {
				r.malformed(o, "its archive has more than %d parts", maxParts)
				return out
			}
			at.Part = r.parts
			content, mediaType := item.get("content").text(), item.get("type").text()
			if item.kind == scalar {
				content = item.text()
			}
			if strings.HasPrefix(content, "#cloud-config-archive") {
				continue // cloud-init does not nest them either
			}
			out = append(out, r.body([]byte(content), mediaType, at, false)...)
		}
	}
	if len(unsaid.list) > 0 && bytes.Contains(text, []byte("NodeConfig")) {
		r.malformed(o, "its cloud-config-archive is damaged: %s", unsaid.list[0])
	}
	r.foreign("a #cloud-config-archive")
	return out
}

// cloudConfig reads the files that cloud-init would write to ConfigDir, which
// may not have happened yet.
func (r *userDataReader) cloudConfig(text []byte, o Origin) []*node {
	var unsaid problems
	var out []*node
	found := false
	for _, d := range parseYAML(text, o, &unsaid) {
		files := d.get("write_files")
		if files == nil {
			continue
		}
		for _, f := range files.items {
			name := f.get("path").text()
			if path.Dir(path.Clean(name)) != ConfigDir || path.Ext(name) != ".yaml" {
				continue
			}
			found = true
			at := o
			at.File = path.Clean(name)
			content, ok := r.fileContent(f, at)
			if !ok {
				continue
			}
			out = append(out, accept(parseYAML(content, at, r.ps), r.ps, true)...)
		}
	}
	switch {
	case len(unsaid.list) > 0 && !found && bytes.Contains(text, []byte(ConfigDir+"/")):
		r.malformed(o, "its cloud-config is damaged: %s", unsaid.list[0])
	case !found:
		r.foreign("a #cloud-config without ours")
	}
	return out
}

// fileContent decodes an entry of write_files.
func (r *userDataReader) fileContent(f *node, o Origin) ([]byte, bool) {
	if added := f.get("append"); added != nil && added.value == true {
		r.malformed(o, "append is not understood; write the file as a whole")
		return nil, false
	}
	content := f.get("content")
	if content == nil || content.kind != scalar {
		r.malformed(o, "it has no content; write it there")
		return nil, false
	}
	text := []byte(content.text())
	encoding := strings.ToLower(f.get("encoding").text())
	switch encoding {
	case "", "text/plain":
		return text, true
	case "b64", "base64", "gz+base64", "gzip+base64", "gz+b64", "gzip+b64":
		var err error
		if text, err = decodeBase64(text); err != nil {
			r.malformed(o, "its base64 does not decode: %v", err)
			return nil, false
		}
	case "gz", "gzip":
	default:
		r.malformed(o, "its encoding %s is not known", quote(encoding))
		return nil, false
	}
	if strings.HasPrefix(encoding, "gz") {
		if !bytes.HasPrefix(text, gzipMagic) {
			r.malformed(o, "it is not gzip as its encoding says")
			return nil, false
		}
		var ok bool
		if text, ok = r.decompress(text, o); !ok {
			return nil, false
		}
	}
	if !isText(text) {
		r.malformed(o, "it is not UTF-8 text")
		return nil, false
	}
	return text, true
}

// isOurs says whether a document was meant to be a NodeConfig of ours, however
// badly it is put.
func isOurs(n *node) bool {
	kind, version := n.get("kind").text(), n.get("apiVersion").text()
	if strings.HasPrefix(version, v1alpha1.Group+"/") {
		return true
	}
	if strings.HasPrefix(version, "node.eks.aws/") {
		return false // nodeadm's has the same kind
	}
	return nearest(kind, []string{v1alpha1.KindNodeConfig}) != ""
}

// accept checks what a document says it is, and holds it to the types. Strange
// ones are problems where all must be ours, and passed over elsewhere.
func accept(documents []*node, ps *problems, all bool) []*node {
	var out []*node
	for _, d := range documents {
		if d.kind != mapping {
			if all {
				ps.addf(d.origin, "", "a document must be a map of apiVersion, kind and spec, not %s", d.describe())
			}
			continue
		}
		if !all && !isOurs(d) {
			continue
		}
		checked := strict(d, ps)
		if checked == nil || !identified(d, ps) {
			continue
		}
		out = append(out, checked)
	}
	return out
}

func identified(d *node, ps *problems) bool {
	good := true
	for _, want := range [][2]string{{"apiVersion", v1alpha1.APIVersion}, {"kind", v1alpha1.KindNodeConfig}} {
		switch said := d.get(want[0]); {
		case said == nil:
			ps.addf(d.origin, want[0], "is missing; write %s: %s", want[0], want[1])
			good = false
		case said.kind == scalar && said.text() == "":
			good = false // strict has said it
		case said.text() != want[1]:
			ps.addf(said.origin, want[0], "is %s; this version of bootstrap understands %s", said.describe(), want[1])
			good = false
		}
	}
	if good && d.get("spec") == nil {
		ps.addf(d.origin, "spec", "is missing; write what the machine is to be below spec")
		good = false
	}
	return good
}
