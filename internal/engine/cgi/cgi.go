// Package cgi translates between HTTP and the Common Gateway Interface as
// RFC 3875 defines it: request meta-variables on the way in, the response
// header block on the way out.
//
// It owns names and syntax, and holds no state. It neither runs anything nor
// knows what a guest is. The variables beyond the RFC are the ones that Wagi
// gives its modules, so that a module made for Wagi finds them.
//
// Formats: RFC 3875 sections 4.1 and 6; Wagi's docs/environment_variables.md.
package cgi

import (
	"bytes"
	"net"
	"net/http"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/net/http/httpguts"
)

// Software is the value of SERVER_SOFTWARE.
const Software = "Hearth"

// Request is what of an HTTP request becomes variables.
type Request struct {
	Method string
	// Proto is as in the request line, such as "HTTP/1.1".
	Proto string
	// Scheme is http or https; Host is the Host header as it came.
	Scheme, Host string
	// ScriptName is the part of the path that led to the function, without a
	// trailing slash, empty when the host did.
	ScriptName string
	// Path is the rest of the path, decoded; RawPath the same as it came.
	Path, RawPath string
	Query         string
	// RemoteAddr is host:port of the client.
	RemoteAddr string
	Header     http.Header
	// ContentLength is -1 when it is not known.
	ContentLength int64
}

// Environment gives the variables of a request as NAME=value, sorted by name.
// Function variables come from extra, later maps winning over earlier ones;
// none of them can replace a variable of the request. Values are cut at a NUL,
// which the guest could not see past.
//
// REQUEST_URI is the target as the function sees it, without SCRIPT_NAME, so
// that programs that route by it (Go's net/http/cgi among them) behave the
// same under both URL forms; X_FULL_URL has all of it.
func Environment(r *Request, extra ...map[string]string) []string {
	v := make(map[string]string, 32+len(r.Header))
	for _, m := range extra {
		for name, value := range m {
			// All of HTTP_ belongs to the client: a variable of the function
			// in there would be the client's to replace.
			if !strings.HasPrefix(name, "HTTP_") && !reserved[name] {
				v[name] = value
			}
		}
	}

	host, port := splitHost(r.Host, r.Scheme)
	remote, remotePort, err := net.SplitHostPort(r.RemoteAddr)
	if err != nil {
		remote, remotePort = r.RemoteAddr, ""
	}
	target := r.RawPath
	if r.Query != "" {
		target += "?" + r.Query
	}
	v["GATEWAY_INTERFACE"] = "CGI/1.1"
	v["SERVER_SOFTWARE"] = Software
	v["SERVER_PROTOCOL"] = r.Proto
	v["SERVER_NAME"] = host
	v["SERVER_PORT"] = port
	v["REQUEST_METHOD"] = r.Method
	v["REQUEST_URI"] = target
	v["SCRIPT_NAME"] = r.ScriptName
	v["PATH_INFO"] = r.Path
	v["PATH_TRANSLATED"] = r.Path
	v["QUERY_STRING"] = r.Query
	v["REMOTE_ADDR"] = remote
	v["REMOTE_HOST"] = remote
	v["REMOTE_PORT"] = remotePort
	v["REMOTE_USER"] = ""
	v["AUTH_TYPE"] = ""
	v["CONTENT_TYPE"] = r.Header.Get("Content-Type")
	v["CONTENT_LENGTH"] = ""
	if r.ContentLength >= 0 {
		v["CONTENT_LENGTH"] = strconv.FormatInt(r.ContentLength, 10)
	}
	v["X_MATCHED_ROUTE"] = r.ScriptName + "/..."
	v["X_RAW_PATH_INFO"] = r.RawPath
	v["X_FULL_URL"] = r.Scheme + "://" + r.Host + r.ScriptName + target
	if r.Scheme == "https" {
		v["HTTPS"] = "on"
	}
	v["HTTP_HOST"] = r.Host
	for name, values := range r.Header {
		if variable, ok := headerVariable(name); ok {
			separator := ", "
			if variable == "HTTP_COOKIE" {
				separator = "; " // RFC 6265 section 5.4
			}
			v[variable] = strings.Join(values, separator)
		}
	}

	env := make([]string, 0, len(v))
	for name, value := range v {
		if i := strings.IndexByte(value, 0); i >= 0 {
			value = value[:i]
		}
		env = append(env, name+"="+value)
	}
	slices.Sort(env)
	return env
}

// reserved are the variables that only a request can set.
var reserved = map[string]bool{
	"GATEWAY_INTERFACE": true, "SERVER_SOFTWARE": true, "SERVER_PROTOCOL": true,
	"SERVER_NAME": true, "SERVER_PORT": true, "REQUEST_METHOD": true, "REQUEST_URI": true,
	"SCRIPT_NAME": true, "PATH_INFO": true, "PATH_TRANSLATED": true, "QUERY_STRING": true,
	"REMOTE_ADDR": true, "REMOTE_HOST": true, "REMOTE_PORT": true, "REMOTE_USER": true,
	"AUTH_TYPE": true, "CONTENT_TYPE": true, "CONTENT_LENGTH": true, "HTTPS": true,
	"X_MATCHED_ROUTE": true, "X_RAW_PATH_INFO": true, "X_FULL_URL": true,
}

// headerVariable names the variable of a header, if it has one.
func headerVariable(name string) (string, bool) {
	switch name {
	case "Content-Type", "Content-Length": // have variables of their own
		return "", false
	case "Proxy": // https://httpoxy.org
		return "", false
	}
	// Both "A-B" and "A_B" would become HTTP_A_B, so a client could add to a
	// header that a proxy in front removes.
	if strings.ContainsAny(name, "_=") {
		return "", false
	}
	return "HTTP_" + strings.ToUpper(strings.ReplaceAll(name, "-", "_")), true
}

func splitHost(host, scheme string) (name, port string) {
	name, port, err := net.SplitHostPort(host)
	if err == nil {
		return name, port
	}
	name = strings.TrimSuffix(strings.TrimPrefix(host, "["), "]")
	if scheme == "https" {
		return name, "443"
	}
	return name, "80"
}

// hopByHop are the fields that belong to one connection (RFC 9110 section
// 7.6.1), by canonical name.
var hopByHop = map[string]bool{
	"Connection": true, "Keep-Alive": true, "Proxy-Authenticate": true,
	"Proxy-Authorization": true, "Proxy-Connection": true, "Te": true,
	"Trailer": true, "Transfer-Encoding": true, "Upgrade": true, "Http2-Settings": true,
}

// RemoveHopByHop deletes fields that must not be forwarded, including the ones
// that Connection names.
func RemoveHopByHop(h http.Header) {
	for _, line := range h["Connection"] {
		for name := range strings.SplitSeq(line, ",") {
			if name = http.CanonicalHeaderKey(strings.TrimSpace(name)); name != "" {
				delete(h, name)
			}
		}
	}
	for name := range hopByHop {
		delete(h, name)
	}
}

// MaxHeaderBytes bounds the header block of a response.
const MaxHeaderBytes = 64 << 10

// maxFields bounds the fields of a response.
const maxFields = 256

// Response is a parsed header block.
type Response struct {
	// Status is 200 to 599.
	Status int
	// Header has canonical names. Fields of one connection, Status and Date
	// are not part of it.
	Header http.Header
	// ContentLength is what the program promised, -1 when nothing.
	ContentLength int64
}

// SyntaxError says what is wrong with a program's output.
type SyntaxError struct{ Detail string }

func (e *SyntaxError) Error() string { return e.Detail }

// HeaderScanner finds the end of a header block that arrives in pieces,
// looking at each byte once. The zero value is ready.
type HeaderScanner struct{ line, next int }

// End takes all bytes so far and gives the length of the header block with its
// blank line, or -1 when they do not hold all of it. Lines end in LF or CRLF,
// mixed if need be.
func (s *HeaderScanner) End(b []byte) int {
	for s.next < len(b) {
		i := bytes.IndexByte(b[s.next:], '\n')
		if i < 0 {
			s.next = len(b)
			break
		}
		i += s.next
		if i == s.line || i == s.line+1 && b[s.line] == '\r' {
			return i + 1
		}
		s.line, s.next = i+1, i+1
	}
	return -1
}

// ParseHeader reads a header block as HeaderScanner delimits it. Errors are
// *SyntaxError.
func ParseHeader(block []byte) (*Response, error) {
	r := &Response{Header: make(http.Header, 8), ContentLength: -1}
	cgiField := false
	fields := 0
	for line := range strings.Lines(string(block)) {
		line = strings.TrimSuffix(strings.TrimSuffix(line, "\n"), "\r")
		if line == "" {
			break
		}
		if fields++; fields > maxFields {
			return nil, &SyntaxError{"the response has more than " + strconv.Itoa(maxFields) + " header fields"}
		}
		name, value, ok := strings.Cut(line, ":")
		if !ok || !httpguts.ValidHeaderFieldName(name) {
			return nil, &SyntaxError{"the output does not begin with CGI header fields: " + quote(line)}
		}
		value = strings.Trim(value, " \t")
		if !httpguts.ValidHeaderFieldValue(value) {
			return nil, &SyntaxError{"the value of header field " + quote(name) + " has control characters"}
		}
		switch name = http.CanonicalHeaderKey(name); name {
		case "Status":
			code, _, _ := strings.Cut(value, " ")
			status, err := strconv.Atoi(code)
			if err != nil || len(code) != 3 || status < 200 || status > 599 {
				return nil, &SyntaxError{"the Status field is not a code from 200 to 599: " + quote(value)}
			}
			r.Status = status
			cgiField = true
			continue
		case "Content-Length":
			n, err := strconv.ParseInt(value, 10, 64)
			if err != nil || n < 0 || r.ContentLength >= 0 && r.ContentLength != n {
				return nil, &SyntaxError{"the Content-Length field is not one number: " + quote(value)}
			}
			r.ContentLength = n
			continue
		case "Content-Type", "Location":
			cgiField = true
		case "Date":
			continue // the server's own clock says it
		}
		r.Header[name] = append(r.Header[name], value)
	}
	if !cgiField {
		return nil, &SyntaxError{"the response header has none of Content-Type, Status and Location"}
	}
	RemoveHopByHop(r.Header)
	if r.Status == 0 {
		r.Status = http.StatusOK
		// A local redirect (RFC 3875 section 6.2.2) is given to the client
		// as well: handling it here would run two functions for one request.
		if r.Header.Get("Location") != "" {
			r.Status = http.StatusFound
		}
	}
	return r, nil
}

// quote shows the beginning of what a program wrote.
func quote(s string) string {
	const most = 64
	if len(s) > most {
		return strconv.QuoteToASCII(s[:most]) + "…"
	}
	return strconv.QuoteToASCII(s)
}

// BodyAllowed says whether a response of this status has a body.
func BodyAllowed(status int) bool {
	return status >= 200 && status != http.StatusNoContent && status != http.StatusNotModified
}
