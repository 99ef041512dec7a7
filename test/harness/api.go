package harness

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"mime/multipart"
	"net/http"
	"net/textproto"
	"net/url"
	"strings"
	"time"

	"github.com/hearth-sh/hearth/api/v1alpha1"
)

// answerBound is how much of an answer is read: more than any function may
// send.
const answerBound = v1alpha1.MaxResponseBytes + 1<<20

// callTimeout bounds one call. A submit waits up to a minute for ready.
const callTimeout = 90 * time.Second

// Answer is one HTTP answer, read whole.
type Answer struct {
	Status int
	Header http.Header
	Body   []byte
	// Took is from before the request was sent until the body was read.
	Took time.Duration
}

func (a *Answer) String() string {
	body := a.Body
	if len(body) > 2000 {
		body = append(bytes.Clone(body[:2000]), "…"...)
	}
	return fmt.Sprintf("%d %v\n%s", a.Status, a.Header, body)
}

// Problem decodes an RFC 9457 document and returns its code, the last segment
// of its type.
func (a *Answer) Problem() (v1alpha1.Problem, string, error) {
	var p v1alpha1.Problem
	if ct := a.Header.Get("Content-Type"); !strings.HasPrefix(ct, "application/problem+json") {
		return p, "", fmt.Errorf("content type %q is no problem document: %s", ct, a)
	}
	if err := json.Unmarshal(a.Body, &p); err != nil {
		return p, "", fmt.Errorf("decoding a problem: %w: %s", err, a)
	}
	if p.Status != a.Status {
		return p, "", fmt.Errorf("the problem says status %d, the answer %d", p.Status, a.Status)
	}
	return p, p.Type[strings.LastIndexByte(p.Type, '/')+1:], nil
}

// Function decodes the answer of a call that returns a function.
func (a *Answer) Function() (v1alpha1.Function, error) {
	var f v1alpha1.Function
	if a.Status/100 != 2 {
		return f, fmt.Errorf("status %s", a)
	}
	if err := json.Unmarshal(a.Body, &f); err != nil {
		return f, fmt.Errorf("decoding a function: %w: %s", err, a)
	}
	return f, nil
}

// Do sends one request to the public listener. target is a path, sent with
// the listener's own address as host, or a whole URL whose host is sent as it
// is. header values replace defaults.
func (d *Dev) Do(ctx context.Context, method, target string, body io.Reader, header http.Header) (*Answer, error) {
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	return d.do(ctx, method, target, body, header)
}

func (d *Dev) do(ctx context.Context, method, target string, body io.Reader, header http.Header) (*Answer, error) {
	if strings.HasPrefix(target, "/") {
		target = d.URL + target
	}
	req, err := http.NewRequestWithContext(ctx, method, target, body)
	if err != nil {
		return nil, err
	}
	for k, v := range header {
		req.Header[http.CanonicalHeaderKey(k)] = v
	}
	start := time.Now()
	resp, err := d.HTTP.Do(req)
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	content, err := io.ReadAll(io.LimitReader(resp.Body, answerBound))
	answer := &Answer{Status: resp.StatusCode, Header: resp.Header, Body: content, Took: time.Since(start)}
	if err != nil {
		return answer, fmt.Errorf("reading an answer of status %d: %w", resp.StatusCode, err)
	}
	return answer, nil
}

// HostURL is the URL of a function in host form, as a browser would open it.
func (d *Dev) HostURL(function, path string) string {
	_, port, _ := strings.Cut(d.Address, ":")
	return "http://" + function + ".localhost:" + port + path
}

// PathURL is the URL of a function in path form.
func (d *Dev) PathURL(function, path string) string { return d.URL + "/f/" + function + path }

// Settings are what a submit may say of a function; zero members are left out.
type Settings struct {
	MemoryMiB   int               `json:"memoryMiB,omitempty"`
	TimeoutMS   int               `json:"timeoutMs,omitempty"`
	Concurrency int               `json:"concurrency,omitempty"`
	Env         map[string]string `json:"env,omitempty"`
	Secrets     map[string]string `json:"secrets,omitempty"`
}

// Submit puts a raw module. query is "" or "?…".
func (d *Dev) Submit(ctx context.Context, name string, module []byte, query string, header http.Header) (*Answer, error) {
	h := http.Header{"Content-Type": {"application/wasm"}}
	for k, v := range header {
		h[http.CanonicalHeaderKey(k)] = v
	}
	return d.Do(ctx, http.MethodPut, "/v1/functions/"+url.PathEscape(name)+query, bytes.NewReader(module), h)
}

// SubmitWith puts a module together with its settings, as multipart/form-data.
func (d *Dev) SubmitWith(ctx context.Context, name string, module []byte, settings Settings, query string) (*Answer, error) {
	encoded, err := json.Marshal(settings)
	if err != nil {
		return nil, err
	}
	var body bytes.Buffer
	form := multipart.NewWriter(&body)
	for _, part := range []struct {
		name, contentType string
		content           []byte
	}{{"settings", "application/json", encoded}, {"module", "application/wasm", module}} {
		header := textproto.MIMEHeader{
			"Content-Disposition": {`form-data; name="` + part.name + `"`},
			"Content-Type":        {part.contentType},
		}
		w, err := form.CreatePart(header)
		if err != nil {
			return nil, err
		}
		if _, err := w.Write(part.content); err != nil {
			return nil, err
		}
	}
	if err := form.Close(); err != nil {
		return nil, err
	}
	return d.Do(ctx, http.MethodPut, "/v1/functions/"+url.PathEscape(name)+query, &body,
		http.Header{"Content-Type": {form.FormDataContentType()}})
}

// JSON sends a JSON document, with the given content type, and reads the answer.
func (d *Dev) JSON(ctx context.Context, method, path, contentType string, document any, header http.Header) (*Answer, error) {
	encoded, err := json.Marshal(document)
	if err != nil {
		return nil, err
	}
	h := http.Header{"Content-Type": {contentType}}
	for k, v := range header {
		h[http.CanonicalHeaderKey(k)] = v
	}
	return d.Do(ctx, method, path, bytes.NewReader(encoded), h)
}
