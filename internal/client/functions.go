package client

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"mime"
	"mime/multipart"
	"net/http"
	"net/textproto"
	"net/url"
	"strings"
	"time"

	"github.com/hearth-sh/hearth/api/v1alpha1"
)

// Settings are changes of a function's settings; what is nil or not named
// stays as it is (defaults for a new function). It carries secret values: it
// must not be printed.
type Settings struct {
	MemoryMiB   *int `json:"memoryMiB,omitempty"`
	TimeoutMS   *int `json:"timeoutMs,omitempty"`
	Concurrency *int `json:"concurrency,omitempty"`
	// Runtime, Host and Routes are known to a cluster's API only. An empty
	// Host or an empty list of Routes removes what was there.
	Runtime *v1alpha1.FunctionRuntime `json:"runtime,omitempty"`
	Host    *string                   `json:"host,omitempty"`
	Routes  *[]string                 `json:"routes,omitempty"`
	// NodeSelector are labels of the nodes that run it, by name; a nil value
	// removes the label. AnyNode removes all that were there before.
	NodeSelector map[string]*string `json:"-"`
	AnyNode      bool               `json:"-"`
	// Autoscaling changes what is not nil; FixedSize removes all of it before.
	Autoscaling Autoscaling `json:"-"`
	FixedSize   bool        `json:"-"`
	// Env and Secrets by name; a nil value removes the variable.
	Env     map[string]*string `json:"env,omitempty"`
	Secrets map[string]*string `json:"secrets,omitempty"`
}

// Autoscaling says how many pods a spin function has. What is nil stays; 0 and ""
// are the default.
type Autoscaling struct {
	Autoscaler       *v1alpha1.Autoscaler `json:"autoscaler,omitempty"`
	MinReplicas      *int                 `json:"minReplicas,omitempty"`
	MaxReplicas      *int                 `json:"maxReplicas,omitempty"`
	TargetCPUPercent *int                 `json:"targetCPUPercent,omitempty"`
}

// MarshalJSON writes the merge patch that the API takes. One cannot remove a
// group and set a part of it at once: what is removed is removed.
func (s Settings) MarshalJSON() ([]byte, error) {
	type plain Settings
	document := struct {
		plain
		Placement   any `json:"placement,omitempty"`
		Autoscaling any `json:"autoscaling,omitempty"`
	}{plain: plain(s)}
	null := json.RawMessage("null")
	switch {
	case s.AnyNode:
		document.Placement = null
	case len(s.NodeSelector) > 0:
		document.Placement = map[string]any{"nodeSelector": s.NodeSelector}
	}
	switch {
	case s.FixedSize:
		document.Autoscaling = null
	case s.Autoscaling != (Autoscaling{}):
		document.Autoscaling = s.Autoscaling
	}
	return json.Marshal(document)
}

// String keeps secret values out of logs and errors.
func (s Settings) String() string { return "settings" }

// Empty says whether nothing would change.
func (s Settings) Empty() bool {
	return s.MemoryMiB == nil && s.TimeoutMS == nil && s.Concurrency == nil && len(s.Env) == 0 && len(s.Secrets) == 0 &&
		s.Runtime == nil && s.Host == nil && s.Routes == nil &&
		len(s.NodeSelector) == 0 && !s.AnyNode && s.Autoscaling == (Autoscaling{}) && !s.FixedSize
}

// Source is what a function is made of: exactly one of Module and Image.
type Source struct {
	// Module opens the Wasm module; it is opened again for each attempt.
	Module func() (io.ReadCloser, error)
	// Size of the module in bytes.
	Size int64
	// Image is an OCI reference, by digest or tag.
	Image string
}

// Change says how a changing call is to be done.
type Change struct {
	// Settings to change along with it.
	Settings Settings
	// Tenant of a new function; "" for the default.
	Tenant string
	// Wait is how long the answer may take until the function is ready; 0
	// answers as soon as the change is durable. At most 5 minutes.
	Wait time.Duration
	// IfMatch makes the call fail unless the function has this ETag; IfNew
	// makes it fail if the function exists.
	IfMatch string
	IfNew   bool
	// Progress is told how many of the body's bytes were sent, from the
	// goroutine that sends. It starts again at 0 with each attempt. May be nil.
	Progress func(sent, total int64)
}

func (ch Change) query() url.Values {
	q := url.Values{"wait": {min(ch.Wait, MaxServerWait).String()}}
	if ch.Tenant != "" {
		q.Set("tenant", ch.Tenant)
	}
	return q
}

func (ch Change) header() http.Header {
	h := http.Header{}
	if ch.IfMatch != "" {
		h.Set("If-Match", ch.IfMatch)
	}
	if ch.IfNew {
		h.Set("If-None-Match", "*")
	}
	return h
}

// Put creates the function or gives it a new revision. The answer's State
// says whether it is ready yet. Errors are *ProblemError for a refusal,
// *UnreachableError, or the module's own read error.
func (c *Client) Put(ctx context.Context, name string, src Source, ch Change) (v1alpha1.Function, error) {
	var f v1alpha1.Function
	k := call{
		method: http.MethodPut, path: functionPath(name),
		query: ch.query(), header: ch.header(), patience: ch.Wait,
	}
	switch {
	case src.Image != "":
		document := struct {
			Image    string    `json:"image"`
			Settings *Settings `json:"settings,omitempty"`
		}{Image: src.Image}
		if !ch.Settings.Empty() {
			document.Settings = &ch.Settings
		}
		var err error
		if k.body, k.size, err = jsonBody(document); err != nil {
			return f, err
		}
		k.header.Set("Content-Type", "application/json")
		k.timeout = ch.Wait + uploadAllowance // the server fetches the module
	default:
		if src.Size > v1alpha1.MaxModuleBytes {
			return f, fmt.Errorf("the module is %d bytes, more than the %d MiB a function may have", src.Size, v1alpha1.MaxModuleBytes>>20)
		}
		if err := moduleBody(&k, src, ch); err != nil {
			return f, err
		}
		k.timeout = ch.Wait + uploadAllowance
	}
	_, _, err := c.answer(ctx, k, &f)
	return f, err
}

// moduleBody sends the module as it is, or, with settings, as a form whose
// first part they are: the server can then refuse them before the upload.
func moduleBody(k *call, src Source, ch Change) error {
	var head, tail []byte
	k.header.Set("Content-Type", "application/wasm")
	if !ch.Settings.Empty() {
		var form bytes.Buffer
		w := multipart.NewWriter(&form)
		part, err := w.CreatePart(textproto.MIMEHeader{
			"Content-Disposition": {`form-data; name="settings"`}, "Content-Type": {"application/json"},
		})
		if err != nil {
			return err
		}
		if err := json.NewEncoder(part).Encode(ch.Settings); err != nil {
			return err
		}
		if _, err := w.CreatePart(textproto.MIMEHeader{
			"Content-Disposition": {`form-data; name="module"; filename="module.wasm"`}, "Content-Type": {"application/wasm"},
		}); err != nil {
			return err
		}
		head = bytes.Clone(form.Bytes())
		form.Reset()
		if err := w.Close(); err != nil {
			return err
		}
		tail = bytes.Clone(form.Bytes())
		k.header.Set("Content-Type", w.FormDataContentType())
	}
	k.size = int64(len(head)) + src.Size + int64(len(tail))
	k.body = func() (io.ReadCloser, error) {
		module, err := src.Module()
		if err != nil {
			return nil, err
		}
		return &upload{
			Reader:   io.MultiReader(bytes.NewReader(head), module, bytes.NewReader(tail)),
			closer:   module,
			total:    k.size,
			progress: ch.Progress,
		}, nil
	}
	return nil
}

// upload counts what is read from it.
type upload struct {
	io.Reader
	closer   io.Closer
	sent     int64
	total    int64
	progress func(sent, total int64)
}

func (u *upload) Read(p []byte) (int, error) {
	n, err := u.Reader.Read(p)
	u.sent += int64(n)
	if u.progress != nil && n > 0 {
		u.progress(u.sent, u.total)
	}
	return n, err
}

func (u *upload) Close() error { return u.closer.Close() }

// Patch gives the function a new revision with changed settings and the same module.
func (c *Client) Patch(ctx context.Context, name string, ch Change) (v1alpha1.Function, error) {
	var f v1alpha1.Function
	body, size, err := jsonBody(ch.Settings)
	if err != nil {
		return f, err
	}
	k := call{
		method: http.MethodPatch, path: functionPath(name), query: ch.query(), header: ch.header(),
		body: body, size: size, timeout: ch.Wait + readyAllowance, patience: ch.Wait,
	}
	k.query.Del("tenant") // a function keeps its tenant
	k.header.Set("Content-Type", "application/merge-patch+json")
	_, _, err = c.answer(ctx, k, &f)
	return f, err
}

// Rollback makes an older revision the wanted one; 0 means the one that
// answered before the present one.
func (c *Client) Rollback(ctx context.Context, name string, revision int, ch Change) (v1alpha1.Function, error) {
	var f v1alpha1.Function
	k := call{
		method: http.MethodPost, path: functionPath(name, "rollback"), query: ch.query(), header: ch.header(),
		timeout: ch.Wait + readyAllowance, patience: ch.Wait,
	}
	k.query.Del("tenant")
	if revision > 0 {
		var err error
		if k.body, k.size, err = jsonBody(map[string]int{"revision": revision}); err != nil {
			return f, err
		}
		k.header.Set("Content-Type", "application/json")
	}
	_, _, err := c.answer(ctx, k, &f)
	return f, err
}

// Delete removes the function with all its revisions. ifMatch may be empty.
func (c *Client) Delete(ctx context.Context, name, ifMatch string) error {
	k := call{method: http.MethodDelete, path: functionPath(name), header: Change{IfMatch: ifMatch}.header()}
	_, _, err := c.answer(ctx, k, nil)
	return err
}

// Get returns one function and its ETag.
func (c *Client) Get(ctx context.Context, name string) (v1alpha1.Function, string, error) {
	var f v1alpha1.Function
	header, _, err := c.answer(ctx, call{method: http.MethodGet, path: functionPath(name)}, &f)
	return f, header.Get("ETag"), err
}

// List returns all functions, of one tenant unless it is "".
func (c *Client) List(ctx context.Context, tenant string) (v1alpha1.FunctionList, error) {
	q := url.Values{}
	if tenant != "" {
		q.Set("tenant", tenant)
	}
	all := v1alpha1.FunctionList{APIVersion: v1alpha1.APIVersion, Kind: "FunctionList", Items: []v1alpha1.Function{}}
	for {
		var page v1alpha1.FunctionList
		if _, _, err := c.answer(ctx, call{method: http.MethodGet, path: []string{"v1", "functions"}, query: q}, &page); err != nil {
			return all, err
		}
		all.Items = append(all.Items, page.Items...)
		if page.Continue == "" || page.Continue == q.Get("continue") {
			return all, nil
		}
		q.Set("continue", page.Continue)
	}
}

// Revisions returns a function's revisions, newest first.
func (c *Client) Revisions(ctx context.Context, name string) (v1alpha1.RevisionList, error) {
	var list v1alpha1.RevisionList
	_, _, err := c.answer(ctx, call{method: http.MethodGet, path: functionPath(name, "revisions")}, &list)
	return list, err
}

const (
	// pollFirst and pollMax space the questions of Wait: short at first,
	// since most functions are ready within a second.
	pollFirst = 100 * time.Millisecond
	pollMax   = time.Second
)

// Wait asks until the function is no longer pending, or ctx ends. seen, if not
// nil, gets every answer.
func (c *Client) Wait(ctx context.Context, name string, seen func(v1alpha1.Function)) (v1alpha1.Function, error) {
	for delay := pollFirst; ; delay = min(delay*3/2, pollMax) {
		f, _, err := c.Get(ctx, name)
		if err != nil {
			return f, err
		}
		if seen != nil {
			seen(f)
		}
		if f.State != v1alpha1.StatePending {
			return f, nil
		}
		if err := c.o.Sleep(ctx, delay); err != nil {
			return f, err
		}
	}
}

// Ready asks the server's /readyz. nil means that it is ready.
func (c *Client) Ready(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, shortCall)
	defer cancel()
	resp, err := c.send(ctx, call{method: http.MethodGet, path: []string{"readyz"}}, "", "") //nolint:bodyclose // drain closes it
	if err != nil {
		return err
	}
	drain(resp.Body)
	return nil
}

// Invoke sends a request to the function through the gateway by its path,
// which needs no name resolution. The caller closes the answer's body,
// whatever its status. It is sent once: only the caller knows whether the
// function may be called twice.
func (c *Client) Invoke(ctx context.Context, req *http.Request, name, path string) (*http.Response, error) {
	// Joined as text: JoinPath would clean the path, and a function may well
	// tell // from /.
	target, err := url.Parse(c.base.JoinPath("f", url.PathEscape(name)).String() + path)
	if err != nil {
		return nil, fmt.Errorf("the path is not valid: %w", err)
	}
	return c.invoke(ctx, c.http, req, target, c.o.Name)
}

// InvokeURL is Invoke at the function's own URL, which begins with base: the
// way to a function of a cluster, whose API is no gateway. The server is not
// the API, and gets neither its token nor trust in its authority.
func (c *Client) InvokeURL(ctx context.Context, req *http.Request, base, path string) (*http.Response, error) {
	target, err := url.Parse(strings.TrimRight(base, "/") + path)
	if err != nil {
		return nil, fmt.Errorf("the path is not valid: %w", err)
	}
	if target.Scheme != "http" && target.Scheme != "https" || target.Host == "" {
		return nil, fmt.Errorf("the function's URL %q is not one that can be called", base)
	}
	return c.invoke(ctx, c.functions, req, target, base)
}

func (c *Client) invoke(ctx context.Context, via *http.Client, req *http.Request, target *url.URL, name string) (*http.Response, error) {
	target.Fragment = ""
	out := req.Clone(ctx)
	out.URL, out.Host = target, req.Host
	if out.Header.Get("User-Agent") == "" && c.o.UserAgent != "" {
		out.Header.Set("User-Agent", c.o.UserAgent)
	}
	resp, err := via.Do(out)
	if err != nil {
		if ctx.Err() != nil {
			return nil, contextError(ctx, name)
		}
		return nil, &UnreachableError{URL: name, Err: err}
	}
	return resp, nil
}

// ProblemOf returns the problem an answer of Invoke carries: the gateway's own
// word on why the function did not answer. A function's own problem documents
// have other types; they, and everything else, are left to be read from the body.
func ProblemOf(resp *http.Response) (*ProblemError, bool) {
	mediaType, _, _ := mime.ParseMediaType(resp.Header.Get("Content-Type"))
	if resp.StatusCode < 400 || mediaType != "application/problem+json" {
		return nil, false
	}
	data, err := io.ReadAll(io.LimitReader(resp.Body, maxProblem))
	p := parseProblem(resp.StatusCode, mediaType, data)
	if err == nil && strings.HasPrefix(p.Type, problemTypes) {
		p.RetryAfter = parseRetryAfter(resp.Header.Get("Retry-After"), time.Now())
		return p, true
	}
	resp.Body = &restored{Reader: io.MultiReader(bytes.NewReader(data), resp.Body), Closer: resp.Body}
	return nil, false
}

// problemTypes begins the types of all of Hearth's problems.
const problemTypes = "https://" + v1alpha1.Group + "/problems/"

// restored is a body whose beginning has been read before.
type restored struct {
	io.Reader
	io.Closer
}

func functionPath(name string, more ...string) []string {
	return append([]string{"v1", "functions", url.PathEscape(name)}, more...)
}
