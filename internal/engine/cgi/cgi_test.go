package cgi

import (
	"errors"
	"net/http"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestParseHeaderReadsWhatRFC3875Allows(t *testing.T) {
	tests := []struct {
		name, block string
		want        *Response
	}{
		{"content type alone", "Content-Type: text/plain\n\n", &Response{200, http.Header{"Content-Type": {"text/plain"}}, -1}},
		{"crlf", "content-type: a/b\r\nX-A: 1\r\nx-a: 2\r\n\r\n", &Response{200, http.Header{"Content-Type": {"a/b"}, "X-A": {"1", "2"}}, -1}},
		{"status with reason", "Status: 404 Not Found\n\n", &Response{404, http.Header{}, -1}},
		{"status alone", "Status:204\n\n", &Response{204, http.Header{}, -1}},
		{"redirect", "Location: https://example.org/\n\n", &Response{302, http.Header{"Location": {"https://example.org/"}}, -1}},
		{"redirect with status", "Location: /x\nStatus: 307 T\n\n", &Response{307, http.Header{"Location": {"/x"}}, -1}},
		{"length", "Status: 200\nContent-Length: 12\n\n", &Response{200, http.Header{}, 12}},
		{"fields of the connection", "Status: 200\nConnection: close, x-hop\nX-Hop: 1\nTransfer-Encoding: chunked\nDate: now\n\n", &Response{200, http.Header{}, -1}},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			var s HeaderScanner
			if end := s.End([]byte(test.block + "body\n\n")); end != len(test.block) {
				t.Errorf("the header ends at %d of %d", end, len(test.block))
			}
			got, err := ParseHeader([]byte(test.block))
			if err != nil {
				t.Fatal(err)
			}
			if d := cmp.Diff(test.want, got); d != "" {
				t.Error(d)
			}
		})
	}
}

func TestParseHeaderRefusesTheRest(t *testing.T) {
	for name, block := range map[string]string{
		"nothing":           "\n",
		"no CGI field":      "X-A: b\n\n",
		"no colon":          "hello\n\n",
		"folded line":       "Content-Type: a\n b\n\n",
		"space before":      "Content-Type : a\n\n",
		"control character": "Content-Type: a\x00b\n\n",
		"status 100":        "Status: 100\n\n",
		"status 600":        "Status: 600\n\n",
		"status text":       "Status: OK\n\n",
		"status four":       "Status: 2000\n\n",
		"two lengths":       "Status: 200\nContent-Length: 1\nContent-Length: 2\n\n",
		"negative length":   "Status: 200\nContent-Length: -1\n\n",
		"too many fields":   "Status: 200\n" + strings.Repeat("A: b\n", maxFields) + "\n",
	} {
		t.Run(name, func(t *testing.T) {
			r, err := ParseHeader([]byte(block))
			if syntax := (*SyntaxError)(nil); !errors.As(err, &syntax) {
				t.Errorf("%+v, %v", r, err)
			}
		})
	}
}

func TestHeaderScannerTakesPieces(t *testing.T) {
	const block = "A: b\r\nC: d\n\r\n"
	var s HeaderScanner
	for i := range len(block) {
		if end := s.End([]byte(block[:i])); end != -1 {
			t.Fatalf("end %d in %d bytes", end, i)
		}
	}
	if end := s.End([]byte(block + "more")); end != len(block) {
		t.Errorf("end %d", end)
	}
}

func TestEnvironmentKeepsFunctionsOutOfTheRequest(t *testing.T) {
	env := Environment(&Request{
		Method: "GET", Proto: "HTTP/1.1", Scheme: "https", Host: "[::1]:8443", ScriptName: "/f/x",
		Path: "/a b", RawPath: "/a%20b", Query: "q", RemoteAddr: "[::2]:9", ContentLength: -1,
		Header: http.Header{"X-Nul": {"a\x00b"}, "X_A": {"1"}, "Proxy": {"p"}},
	}, map[string]string{"A": "1", "REMOTE_USER": "root", "HTTP_PROXY": "p"}, map[string]string{"A": "2"})
	got := map[string]string{}
	for _, e := range env {
		name, value, _ := strings.Cut(e, "=")
		got[name] = value
	}
	want := map[string]string{
		"A": "2", "REMOTE_USER": "", "AUTH_TYPE": "", "HTTPS": "on", "SERVER_NAME": "::1", "SERVER_PORT": "8443",
		"SCRIPT_NAME": "/f/x", "PATH_INFO": "/a b", "PATH_TRANSLATED": "/a b", "X_RAW_PATH_INFO": "/a%20b",
		"REQUEST_URI": "/a%20b?q", "QUERY_STRING": "q", "REMOTE_ADDR": "::2", "REMOTE_HOST": "::2", "REMOTE_PORT": "9",
		"X_FULL_URL": "https://[::1]:8443/f/x/a%20b?q", "X_MATCHED_ROUTE": "/f/x/...", "REQUEST_METHOD": "GET",
		"SERVER_PROTOCOL": "HTTP/1.1", "SERVER_SOFTWARE": Software, "GATEWAY_INTERFACE": "CGI/1.1",
		"CONTENT_LENGTH": "", "CONTENT_TYPE": "", "HTTP_HOST": "[::1]:8443", "HTTP_X_NUL": "a",
	}
	if d := cmp.Diff(want, got); d != "" {
		t.Error(d)
	}
}

func FuzzParseHeader(f *testing.F) {
	for _, s := range []string{"Content-Type: a\n\nb", "Status: 200\r\n\r\n", "Location: /\n\n", "\n", ":\n\n", "A: \xff\n\n"} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		var whole, pieces HeaderScanner
		end := whole.End(b)
		for i := range b {
			if got := pieces.End(b[:i+1]); got >= 0 {
				if got != end {
					t.Fatalf("end %d in pieces, %d in one", got, end)
				}
				break
			}
		}
		if end < 0 {
			return
		}
		r, err := ParseHeader(b[:end])
		if err != nil {
			return
		}
		if r.Status < 200 || r.Status > 599 {
			t.Errorf("status %d", r.Status)
		}
		for name, values := range r.Header {
			if hopByHop[name] || strings.ContainsAny(name+strings.Join(values, ""), "\r\n\x00") {
				t.Errorf("field %q: %q", name, values)
			}
		}
	})
}

func BenchmarkEnvironment(b *testing.B) {
	r := &Request{Method: "GET", Proto: "HTTP/1.1", Scheme: "http", Host: "a.localhost", Path: "/", RawPath: "/", RemoteAddr: "127.0.0.1:1",
		Header: http.Header{"User-Agent": {"bench"}, "Accept": {"*/*"}}}
	for b.Loop() {
		Environment(r)
	}
}
