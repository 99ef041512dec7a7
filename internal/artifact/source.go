package artifact

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"mime"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"os"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/service/s3"
	"github.com/aws/smithy-go"
	smithyhttp "github.com/aws/smithy-go/transport/http"
	"golang.org/x/sys/unix"
)

const (
	dialTimeout      = 10 * time.Second
	handshakeTimeout = 10 * time.Second
	idleTimeout      = 30 * time.Second
	maxRedirects     = 5
	// maxHeaderBytes bounds what a server says before its file.
	maxHeaderBytes = 64 << 10
	// connectionBuffer is what is read from a connection at once.
	connectionBuffer = 64 << 10
	// maxRetryAfter is the longest wait a mirror may ask for, else it is given up.
	maxRetryAfter = time.Minute
	// maxValidatorLength bounds what is remembered of a mirror's word.
	maxValidatorLength = 1 << 10
)

// ObjectGetter is the part of *s3.Client that is needed. Its region is
// overridden for URLs that name one.
type ObjectGetter interface {
	GetObject(ctx context.Context, in *s3.GetObjectInput, opts ...func(*s3.Options)) (*s3.GetObjectOutput, error)
}

var _ ObjectGetter = (*s3.Client)(nil)

// kind says how a mirror failed.
type kind int

const (
	// kindUnreachable, kindBroken and kindBusy may pass.
	kindUnreachable kind = iota // no connection, no name, no answer
	kindBroken                  // the transfer broke off or stalled
	kindBusy                    // the mirror says so
	// The others do not.
	kindNotFound // the mirror does not have it or keeps it from us
	kindRefused  // we refuse the mirror: certificate, redirect
	kindWrong    // the mirror serves something else
)

func (k kind) passing() bool { return k <= kindBusy }

// mirrorError is why a mirror did not do.
type mirrorError struct {
	kind kind
	// after is how long the mirror asked to be left alone.
	after time.Duration
	err   error
}

func (e *mirrorError) Error() string { return e.err.Error() }
func (e *mirrorError) Unwrap() error { return e.err }

func mirrorErrorf(k kind, format string, args ...any) *mirrorError {
	return &mirrorError{kind: k, err: fmt.Errorf(format, args...)}
}

var (
	errStalled = errors.New("it stalled")
	// errRange says that a mirror has no such range of the same version.
	errRange = errors.New("it does not continue what was begun")
	errPlain = errors.New("http:// is for this machine only unless allowed")
	errLocal = errors.New("link-local addresses serve instance metadata, not artifacts")
)

// validator is a mirror's name for one version of a file.
type validator struct {
	ETag         string `json:"etag,omitempty"`
	LastModified string `json:"lastModified,omitempty"`
}

// ifRange is the validator in the form of RFC 9110, section 13.1.5, or "".
func (v validator) ifRange() string {
	if strings.HasPrefix(v.ETag, `"`) { // a weak one may not be used
		return v.ETag
	}
	if v.ETag == "" {
		return v.LastModified
	}
	return ""
}

// reply is a mirror's answer.
type reply struct {
	body io.ReadCloser
	// offset is where the body starts in the file.
	offset int64
	// total is the size of the whole file, -1 when the mirror did not say.
	total     int64
	validator validator
	// page says that it calls itself a web page.
	page bool
}

// open asks a mirror for the file from an offset on. The reply may start at 0
// instead. Errors are *mirrorError, or errRange when there is nothing at that
// offset.
func (f *Fetcher) open(ctx context.Context, l location, offset int64, v validator) (*reply, error) {
	switch l.url.Scheme {
	case "s3":
		return f.openS3(ctx, l, offset, v)
	case "file":
		return openFile(l.url.Path, offset)
	}
	return f.openHTTP(ctx, l, offset, v)
}

// openFile opens a file of this machine, which an image may have brought.
func openFile(path string, offset int64) (*reply, error) {
	file, err := os.OpenFile(path, os.O_RDONLY|unix.O_NONBLOCK, 0)
	if err != nil {
		k := kindUnreachable // it may be on a disk that is not there yet, say
		if errors.Is(err, fs.ErrNotExist) || errors.Is(err, fs.ErrPermission) {
			k = kindNotFound
		}
		return nil, &mirrorError{kind: k, err: err}
	}
	info, err := file.Stat()
	if err == nil && !info.Mode().IsRegular() {
		err = errors.New("it is not a regular file")
	}
	if err == nil && offset > info.Size() {
		err = errRange
	}
	if err == nil {
		_, err = file.Seek(offset, io.SeekStart)
	}
	if errors.Is(err, errRange) {
		_ = file.Close()
		return nil, errRange
	}
	if err != nil {
		_ = file.Close()
		return nil, &mirrorError{kind: kindNotFound, err: err}
	}
	return &reply{body: file, offset: offset, total: info.Size(), validator: validator{LastModified: info.ModTime().UTC().Format(time.RFC3339Nano)}}, nil
}

func (f *Fetcher) openHTTP(ctx context.Context, l location, offset int64, v validator) (*reply, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, l.url.String(), nil)
	if err != nil {
		return nil, mirrorErrorf(kindRefused, "it cannot be asked: %w", withoutURL(err))
	}
	// The digest is that of the file as it is, not of some encoding of it.
	req.Header.Set("Accept-Encoding", "identity")
	if f.o.UserAgent != "" {
		req.Header.Set("User-Agent", f.o.UserAgent)
	}
	if offset > 0 {
		req.Header.Set("Range", "bytes="+strconv.FormatInt(offset, 10)+"-")
		if ir := v.ifRange(); ir != "" {
			req.Header.Set("If-Range", ir)
		}
	}
	resp, err := f.client.Do(req)
	if err != nil {
		return nil, connectionError(ctx, withoutURL(err))
	}
	r := &reply{body: resp.Body, total: -1, validator: validator{
		ETag:         bounded(resp.Header.Get("ETag")),
		LastModified: bounded(resp.Header.Get("Last-Modified")),
	}}
	media, _, _ := mime.ParseMediaType(resp.Header.Get("Content-Type"))
	r.page = media == "text/html" || media == "application/xhtml+xml"
	switch resp.StatusCode {
	case http.StatusOK:
		r.total = resp.ContentLength
		return r, nil
	case http.StatusPartialContent:
		start, total, ok := parseContentRange(resp.Header.Get("Content-Range"))
		if ok && offset > 0 && start == offset {
			r.offset, r.total = start, total
			if total < 0 && resp.ContentLength >= 0 {
				r.total = start + resp.ContentLength
			}
			return r, nil
		}
		_ = resp.Body.Close()
		if offset == 0 {
			return nil, mirrorErrorf(kindWrong, "it answered with a part of the file that was not asked for")
		}
		return nil, errRange
	case http.StatusRequestedRangeNotSatisfiable:
		_ = resp.Body.Close()
		// That the offset is the end needs no more bytes.
		if rest, ok := strings.CutPrefix(resp.Header.Get("Content-Range"), "bytes */"); ok && offset > 0 && rest == strconv.FormatInt(offset, 10) {
			r.body, r.offset, r.total, r.page = http.NoBody, offset, offset, false
			return r, nil
		}
		if offset == 0 {
			return nil, mirrorErrorf(kindWrong, "it answered %s though the whole file was asked for", resp.Status)
		}
		return nil, errRange
	}
	_ = resp.Body.Close()
	return nil, statusError(resp.StatusCode, resp.Header.Get("Retry-After"), time.Now())
}

// statusError classifies an answer that is not the file.
func statusError(status int, retryAfter string, now time.Time) *mirrorError {
	e := &mirrorError{err: fmt.Errorf("it answered %d %s", status, http.StatusText(status))}
	switch {
	case status == http.StatusTooManyRequests, status == http.StatusServiceUnavailable:
		e.kind = kindBusy
		if seconds, err := strconv.ParseUint(retryAfter, 10, 31); err == nil {
			e.after = time.Duration(seconds) * time.Second
		} else if at, err := http.ParseTime(retryAfter); err == nil {
			e.after = at.Sub(now)
		}
		if e.after > maxRetryAfter {
			e.kind, e.err = kindNotFound, fmt.Errorf("%w and asked to be left alone for %v", e.err, e.after.Round(time.Second))
		}
	case status >= 500, status == http.StatusRequestTimeout, status == http.StatusTooEarly:
		e.kind = kindBusy
	case status == http.StatusProxyAuthRequired, status == http.StatusNetworkAuthenticationRequired:
		e.kind, e.err = kindRefused, fmt.Errorf("%w: a proxy or portal asks for a login", e.err)
	default:
		e.kind = kindNotFound
	}
	return e
}

// parseContentRange reads "bytes FIRST-LAST/TOTAL"; total is -1 for "*".
func parseContentRange(s string) (first, total int64, ok bool) {
	s, found := strings.CutPrefix(s, "bytes ")
	span, all, cut := strings.Cut(s, "/")
	from, to, dash := strings.Cut(span, "-")
	if !found || !cut || !dash || len(s) > 80 {
		return 0, 0, false
	}
	begin, err1 := strconv.ParseUint(from, 10, 63)
	end, err2 := strconv.ParseUint(to, 10, 63)
	total = -1
	if all != "*" {
		n, err := strconv.ParseUint(all, 10, 63)
		if err != nil || end >= n {
			return 0, 0, false
		}
		total = int64(n)
	}
	if err1 != nil || err2 != nil || end < begin {
		return 0, 0, false
	}
	return int64(begin), total, true
}

func (f *Fetcher) openS3(ctx context.Context, l location, offset int64, v validator) (*reply, error) {
	if f.o.S3 == nil {
		return nil, mirrorErrorf(kindRefused, "no S3 client is configured")
	}
	in := &s3.GetObjectInput{Bucket: &l.bucket, Key: &l.key}
	if offset > 0 {
		in.Range = aws.String("bytes=" + strconv.FormatInt(offset, 10) + "-")
		if v.ETag != "" {
			in.IfMatch = &v.ETag
		}
	}
	out, err := f.o.S3.GetObject(ctx, in, func(o *s3.Options) {
		if l.region != "" {
			o.Region = l.region
		}
		// Attempts are counted here; the second one is for a signature that a
		// wrong clock made invalid, which the SDK corrects by itself.
		o.RetryMaxAttempts = 2
		// Our digest covers what S3's checksums would.
		o.ResponseChecksumValidation = aws.ResponseChecksumValidationWhenRequired
	})
	if err != nil {
		return nil, s3Error(ctx, err, offset)
	}
	r := &reply{body: out.Body, total: -1, validator: validator{ETag: bounded(aws.ToString(out.ETag))}}
	if out.ContentRange == nil {
		if out.ContentLength != nil {
			r.total = *out.ContentLength
		}
		return r, nil
	}
	start, total, ok := parseContentRange(*out.ContentRange)
	if !ok || start != offset {
		_ = out.Body.Close()
		if offset == 0 {
			return nil, mirrorErrorf(kindWrong, "it answered with a part of the object that was not asked for")
		}
		return nil, errRange
	}
	r.offset, r.total = start, total
	return r, nil
}

// uncredentialed says whether a request was not sent for want of credentials to
// sign it with, for which the SDK has no type. Such an error may hold an answer
// of instance metadata, which is none of S3's.
func uncredentialed(err error) bool {
	return strings.Contains(err.Error(), "get identity: get credentials: ")
}

func s3Error(ctx context.Context, err error, offset int64) error {
	if uncredentialed(err) {
		return connectionError(ctx, fmt.Errorf("the instance has no credentials of a role: %w", withoutOperation(err)))
	}
	var answer *smithyhttp.ResponseError
	if !errors.As(err, &answer) || answer.Response == nil {
		// No answer of S3: a connection, or credentials that are not there yet.
		return connectionError(ctx, withoutOperation(err))
	}
	status := answer.HTTPStatusCode()
	if offset > 0 && (status == http.StatusPreconditionFailed || status == http.StatusRequestedRangeNotSatisfiable) {
		return errRange
	}
	e := statusError(status, answer.Response.Header.Get("Retry-After"), time.Now())
	var api smithy.APIError
	if errors.As(err, &api) && api.ErrorCode() != "" {
		e.err = fmt.Errorf("it answered %d %.60s: %.200s", status, api.ErrorCode(), api.ErrorMessage())
	}
	if status == http.StatusForbidden {
		// The policy of a role takes seconds to be known everywhere, and an
		// instance asks within seconds of its making.
		e.kind, e.err = kindBusy, fmt.Errorf("%w (may the instance's role read it?)", e.err)
	}
	return e
}

// withoutOperation takes the SDK's account of its own layers off an error.
func withoutOperation(err error) error {
	var op *smithy.OperationError
	if errors.As(err, &op) {
		return op.Err
	}
	return err
}

// withoutURL takes the URL off an error: its query may be secret.
func withoutURL(err error) error {
	var u *url.Error
	for errors.As(err, &u) {
		err = u.Err
	}
	return err
}

// connectionError classifies an error of asking or reading.
func connectionError(ctx context.Context, err error) error {
	if cause := context.Cause(ctx); errors.Is(cause, errStalled) {
		return &mirrorError{kind: kindBroken, err: cause}
	}
	var certificate *tls.CertificateVerificationError
	if errors.As(err, &certificate) {
		var invalid x509.CertificateInvalidError
		if errors.As(err, &invalid) && invalid.Reason == x509.Expired {
			return mirrorErrorf(kindRefused, "%w (is this machine's clock right?)", err)
		}
		return &mirrorError{kind: kindRefused, err: err}
	}
	if errors.Is(err, errRedirect) || errors.Is(err, errPlain) || errors.Is(err, errLocal) {
		return &mirrorError{kind: kindRefused, err: err}
	}
	return &mirrorError{kind: kindUnreachable, err: err}
}

func bounded(s string) string {
	if len(s) > maxValidatorLength {
		return ""
	}
	return s
}

var errRedirect = errors.New("it redirects where it must not")

// permitted says whether a URL may be asked at all.
func (f *Fetcher) permitted(u *url.URL) error {
	switch {
	case isLinkLocal(u.Hostname()):
		return errLocal
	case u.Scheme == "http" && !f.o.AllowHTTP && !isLoopback(u.Hostname()):
		return errPlain
	}
	return nil
}

func (f *Fetcher) newHTTPClient() *http.Client {
	// One connection per download: HTTP/2 would put several on one, with
	// smaller windows and more copying.
	protocols := new(http.Protocols)
	protocols.SetHTTP1(true)
	dialer := &net.Dialer{
		Timeout: dialTimeout,
		// Names may resolve to anything, so addresses are looked at as well.
		Control: func(_, address string, _ syscall.RawConn) error {
			if to, err := netip.ParseAddrPort(address); err == nil && isLinkLocal(to.Addr().String()) {
				return errLocal
			}
			return nil
		},
	}
	return &http.Client{
		Transport: &http.Transport{
			Protocols: protocols,
			Proxy: func(r *http.Request) (*url.URL, error) {
				if isLinkLocal(r.URL.Hostname()) {
					return nil, nil
				}
				return f.o.Proxy(r.URL)
			},
			DialContext:         dialer.DialContext,
			TLSClientConfig:     &tls.Config{MinVersion: tls.VersionTLS12, RootCAs: f.o.RootCAs},
			TLSHandshakeTimeout: handshakeTimeout,
			// No ResponseHeaderTimeout: a watch covers asking and reading alike.
			MaxResponseHeaderBytes: maxHeaderBytes,
			MaxIdleConnsPerHost:    f.o.Parallel,
			IdleConnTimeout:        idleTimeout,
			ReadBufferSize:         connectionBuffer,
			DisableCompression:     true,
		},
		CheckRedirect: func(r *http.Request, via []*http.Request) error {
			r.Header.Del("Referer") // it would tell one server the query of another's URL
			to := location{url: r.URL}
			switch before := via[len(via)-1].URL; {
			case len(via) > maxRedirects:
				return fmt.Errorf("%w: more than %d times", errRedirect, maxRedirects)
			case r.URL.Scheme != "https" && r.URL.Scheme != "http":
				return fmt.Errorf("%w: to %s", errRedirect, to)
			case before.Scheme == "https" && r.URL.Scheme != "https":
				return fmt.Errorf("%w: from https to %s", errRedirect, to)
			}
			if err := f.permitted(r.URL); err != nil {
				return fmt.Errorf("%w: to %s: %w", errRedirect, to, err)
			}
			return nil
		},
	}
}
