package submit

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"mime"
	"mime/multipart"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/hearth-sh/hearth/api/v1alpha1"
	"github.com/hearth-sh/hearth/internal/function"
)

const (
	// maxJSONBytes bounds JSON bodies: v1alpha1.MaxEnvBytes with every
	// character escaped, with room to spare.
	maxJSONBytes = 1 << 20
	// maxMultipartOverhead is what boundaries and the settings part may add to
	// a module.
	maxMultipartOverhead = maxJSONBytes + 64<<10
	// maxImageBytes bounds an OCI reference (255 for the name, 128 for a tag,
	// a host and a digest).
	maxImageBytes = 1024

	tempPattern = "module-*.part"
)

// errBodySize: the body is longer than what is accepted.
var errBodySize = errors.New("the body is too large")

// submission is what a PUT brought.
type submission struct {
	// path of the temporary file, removed by remove. For an image it is empty
	// until the image was fetched.
	path   string
	size   int64
	digest string // sha256:<hex> of the module

	image string // OCI reference instead of a module
	patch function.Patch
	// content identifies the body for the fingerprint of the request.
	content string
	// receive is how long the body took.
	receive time.Duration
}

func (b *submission) remove() {
	if b.path != "" {
		_ = os.Remove(b.path) // what stays is removed at the next start
	}
}

// bodyReader bounds a body in size and time. A stalled sender is noticed by a
// read deadline on the connection that moves with every read.
type bodyReader struct {
	body   io.Reader
	rc     *http.ResponseController
	left   int64
	stall  time.Duration
	finish time.Time
}

func (s *Server) body(w http.ResponseWriter, r *http.Request, max int64) *bodyReader {
	return &bodyReader{
		body: r.Body, rc: http.NewResponseController(w),
		left: max, stall: s.o.Limits.Stall, finish: time.Now().Add(s.o.Limits.Receive),
	}
}

func (b *bodyReader) Read(p []byte) (int, error) {
	deadline := time.Now().Add(b.stall)
	if deadline.After(b.finish) {
		deadline = b.finish
	}
	// Not supported by every ResponseWriter; the size bound remains then.
	_ = b.rc.SetReadDeadline(deadline)
	if int64(len(p)) > b.left+1 {
		p = p[:b.left+1]
	}
	n, err := b.body.Read(p)
	if b.left -= int64(n); b.left < 0 {
		return 0, errBodySize
	}
	return n, err
}

// done takes the deadline off the connection after a whole body: left there it
// would end the wait for the answer, which reads to notice that the client
// went away. After an error it stays: net/http reads what is left of a body
// before it answers, and would wait for a stalled sender forever.
func (b *bodyReader) done() { _ = b.rc.SetReadDeadline(time.Time{}) }

// bodyProblem answers an error of reading a body. tooLarge is the problem
// code for a body over its bound of max bytes.
func bodyProblem(err error, tooLarge string, max int64) error {
	var tm *http.MaxBytesError
	switch {
	case errors.Is(err, errBodySize), errors.As(err, &tm):
		p := newProblem(tooLarge, "At most %d bytes are accepted.", max)
		p.header = map[string]string{"Connection": "close"}
		return p
	case errors.Is(err, os.ErrDeadlineExceeded):
		p := newProblem("body-stalled", "The body stopped arriving. Nothing was recorded; send the request again.")
		p.header = map[string]string{"Connection": "close"}
		return p
	case errors.Is(err, io.ErrUnexpectedEOF), errors.Is(err, io.EOF):
		return newProblem("malformed-request", "The body ended before it was complete. Nothing was recorded.")
	}
	return err
}

// receive reads the body of a PUT. media is its Content-Type.
func (s *Server) receive(w http.ResponseWriter, r *http.Request, media string, params map[string]string) (_ *submission, err error) {
	started := time.Now()
	b := &submission{}
	defer func() {
		if err != nil {
			b.remove()
		}
	}()
	limit := s.o.Limits.ModuleBytes
	switch media {
	case "application/json":
		data, err := s.readJSON(w, r)
		if err != nil {
			return nil, err
		}
		var doc struct {
			Image    string          `json:"image"`
			Settings json.RawMessage `json:"settings"`
		}
		if err := strictJSON(data, &doc); err != nil {
			return nil, err
		}
		if doc.Image == "" || len(doc.Image) > maxImageBytes || strings.ContainsFunc(doc.Image, func(c rune) bool { return c <= ' ' || c > '~' }) {
			return nil, newProblem("malformed-request", `The member "image" must be an OCI reference such as "registry.example/team/hello:1.0".`)
		}
		b.image = doc.Image
		if len(doc.Settings) > 0 && string(doc.Settings) != "null" {
			if b.patch, err = parsePatch(doc.Settings); err != nil {
				return nil, err
			}
		}
		b.content = hash(data)

	case "application/wasm":
		if r.ContentLength > limit {
			return nil, bodyProblem(errBodySize, "module-too-large", limit)
		}
		body := s.body(w, r, limit)
		if err := s.store(b, body); err != nil {
			return nil, bodyProblem(err, "module-too-large", limit)
		}
		body.done()
		b.content = b.digest

	case "multipart/form-data":
		if r.ContentLength > limit+maxMultipartOverhead {
			return nil, bodyProblem(errBodySize, "module-too-large", limit)
		}
		body := s.body(w, r, limit+maxMultipartOverhead)
		settings, err := s.receiveParts(b, multipart.NewReader(body, params["boundary"]))
		if err == nil {
			_, err = io.Copy(io.Discard, body) // what may follow the last boundary
		}
		if err != nil {
			return nil, bodyProblem(err, "module-too-large", limit)
		}
		body.done()
		b.content = hash([]byte(b.digest + "\n" + settings))
	}
	b.receive = time.Since(started)
	return b, nil
}

// receiveParts reads the parts "settings" (optional) and then "module".
func (s *Server) receiveParts(b *submission, mr *multipart.Reader) (settings string, err error) {
	seen := map[string]bool{}
	for {
		part, err := mr.NextPart()
		if err == io.EOF {
			break
		}
		if err != nil {
			if errors.Is(err, errBodySize) || errors.Is(err, os.ErrDeadlineExceeded) {
				return "", err
			}
			return "", newProblem("malformed-request", "The body is not well-formed multipart/form-data.").because(err)
		}
		name := part.FormName()
		if seen[name] || seen["module"] {
			return "", newProblem("malformed-request", "The part %.40q is one too many; send one part settings (optional), then one part module.", name)
		}
		seen[name] = true
		switch name {
		case "settings":
			data, err := io.ReadAll(io.LimitReader(part, maxJSONBytes+1))
			if err != nil {
				return "", err
			}
			if len(data) > maxJSONBytes {
				return "", newProblem("body-too-large", "The part settings may have at most %d bytes.", maxJSONBytes)
			}
			if b.patch, err = parsePatch(data); err != nil {
				return "", err
			}
			settings = hash(data)
		case "module":
			if err := s.store(b, part); err != nil {
				return "", err
			}
		default:
			return "", newProblem("malformed-request", "The part %.40q is not known; send one part settings (optional), then one part module.", name)
		}
	}
	if !seen["module"] {
		return "", newProblem("malformed-request", "There is no part module with the WebAssembly module.")
	}
	return settings, nil
}

// store writes a module to a temporary file.
func (s *Server) store(b *submission, from io.Reader) (err error) {
	f, err := os.CreateTemp(s.o.TempDir, tempPattern)
	if err != nil {
		return fmt.Errorf("create temporary file: %w", err)
	}
	b.path = f.Name()
	defer func() {
		if cerr := f.Close(); err == nil {
			err = cerr
		}
	}()
	h := sha256.New()
	// One byte more than allowed tells too long from just right.
	b.size, err = io.Copy(io.MultiWriter(f, h), io.LimitReader(from, s.o.Limits.ModuleBytes+1))
	if err != nil {
		return err
	}
	if b.size > s.o.Limits.ModuleBytes {
		return errBodySize
	}
	b.digest = "sha256:" + hex.EncodeToString(h.Sum(nil))
	return nil
}

// emptyTemp makes the temporary file that an image is fetched to.
func (s *Server) emptyTemp(b *submission) error {
	f, err := os.CreateTemp(s.o.TempDir, tempPattern)
	if err != nil {
		return fmt.Errorf("create temporary file: %w", err)
	}
	b.path = f.Name()
	return f.Close()
}

// measure fills in size and digest of what was fetched.
func (b *submission) measure() error {
	f, err := os.Open(b.path)
	if err != nil {
		return fmt.Errorf("open fetched module: %w", err)
	}
	defer func() { _ = f.Close() }()
	h := sha256.New()
	if b.size, err = io.Copy(h, f); err != nil {
		return fmt.Errorf("read fetched module: %w", err)
	}
	b.digest = "sha256:" + hex.EncodeToString(h.Sum(nil))
	return nil
}

// readJSON reads a bounded body.
func (s *Server) readJSON(w http.ResponseWriter, r *http.Request) ([]byte, error) {
	if r.ContentLength > maxJSONBytes {
		return nil, bodyProblem(errBodySize, "body-too-large", maxJSONBytes)
	}
	return s.readAll(w, r, maxJSONBytes)
}

// readAll reads a body of at most max bytes into memory.
func (s *Server) readAll(w http.ResponseWriter, r *http.Request, max int64) ([]byte, error) {
	body := s.body(w, r, max)
	data, err := io.ReadAll(body)
	if err != nil {
		return nil, bodyProblem(err, "body-too-large", max)
	}
	body.done()
	return data, nil
}

// strictJSON decodes one JSON document into v and names what it does not know.
func strictJSON(data []byte, v any) error {
	d := json.NewDecoder(strings.NewReader(string(data)))
	d.DisallowUnknownFields()
	if err := d.Decode(v); err != nil {
		var te *json.UnmarshalTypeError
		switch {
		case errors.As(err, &te):
			return newProblem("malformed-request", "The member %q must not be a JSON %s.", te.Field, te.Value)
		case strings.HasPrefix(err.Error(), "json: unknown field "):
			return newProblem("malformed-request", "The member %.80s is not known.", strings.TrimPrefix(err.Error(), "json: unknown field "))
		}
		return newProblem("malformed-request", "The body is not the JSON object that is expected here.").because(err)
	}
	if _, err := d.Token(); err != io.EOF {
		return newProblem("malformed-request", "There is something after the JSON object.")
	}
	return nil
}

// parsePatch parses a settings document; what is wrong with it is the
// sender's syntax, not yet a limit.
func parsePatch(data []byte) (function.Patch, error) {
	p, err := function.ParsePatch(data)
	var ve *function.ValidationError
	if errors.As(err, &ve) {
		return p, newProblem("malformed-request", "%s", sentence(ve.Error()))
	}
	return p, err
}

// mediaType returns the body's type, one of accepted, or 415.
func mediaType(r *http.Request, accepted ...string) (string, map[string]string, error) {
	media, params, err := mime.ParseMediaType(r.Header.Get("Content-Type"))
	if err == nil {
		for _, a := range accepted {
			if media == a && (a != "multipart/form-data" || params["boundary"] != "") {
				return media, params, nil
			}
		}
	}
	p := newProblem("unsupported-media-type", "Send the body with one of these content types: %s.", strings.Join(accepted, ", "))
	p.header = map[string]string{"Accept": strings.Join(accepted, ", ")}
	return "", nil, p
}

// clearTemp makes the temporary directory and removes what a crash left.
func clearTemp(dir string) error {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return fmt.Errorf("create temporary directory: %w", err)
	}
	old, err := os.ReadDir(dir)
	if err != nil {
		return fmt.Errorf("list temporary files: %w", err)
	}
	for _, f := range old {
		// Only what looks like ours: the directory is an option.
		if ok, _ := filepath.Match(tempPattern, f.Name()); !ok {
			continue
		}
		if err := os.Remove(filepath.Join(dir, f.Name())); err != nil {
			return fmt.Errorf("remove temporary file of an earlier run: %w", err)
		}
	}
	return nil
}

func hash(data []byte) string {
	sum := sha256.Sum256(data)
	return hex.EncodeToString(sum[:])
}

// overMemory is the problem of a module that cannot start within its limit.
func overMemory(pages uint32, memoryMiB int) error {
	const pagesPerMiB = 16
	if int64(pages) <= int64(memoryMiB)*pagesPerMiB {
		return nil
	}
	need := (int64(pages) + pagesPerMiB - 1) / pagesPerMiB
	hint := fmt.Sprintf("set memoryMiB to at least %d", need)
	if need > v1alpha1.MaxMemoryMiB {
		hint = fmt.Sprintf("no function gets more than %d MiB", v1alpha1.MaxMemoryMiB)
	}
	return newProblem("memory-over-limit", "The module starts with %d MiB of memory, its limit is %d MiB; %s.", need, memoryMiB, hint)
}
