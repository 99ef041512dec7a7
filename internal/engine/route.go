package engine

import (
	"net/netip"
	"strings"
)

// pathPrefix begins the path form of a function's URL.
const pathPrefix = "/f/"

// destination is where a request goes.
type destination int

const (
	// toNowhere: a host that is not ours.
	toNowhere destination = iota
	toFunction
	toAPI
	// toNothing: our host, and a path that nobody serves.
	toNothing
)

// route is the outcome of looking at host and path alone.
type route struct {
	to       destination
	function string
	// script is SCRIPT_NAME, empty in the host form.
	script string
	// path and rawPath are what follows script; rawPath is empty when it is
	// path's default encoding, as in url.URL.
	path, rawPath string
}

// routeRequest decides by host and path where a request goes. base is lower
// case without a trailing dot.
func routeRequest(base, host, path, rawPath string) route {
	host = canonicalHost(host)
	if label, ok := strings.CutSuffix(host, "."+base); ok {
		return route{to: toFunction, function: label, path: slash(path), rawPath: rawPath}
	}
	if !controlHost(base, host) {
		return route{}
	}
	if rest, ok := strings.CutPrefix(path, pathPrefix); ok {
		name, _, _ := strings.Cut(rest, "/")
		r := route{to: toFunction, function: name, script: pathPrefix + name}
		r.path = slash(strings.TrimPrefix(path, r.script))
		// An escaped name is no DNS label, so where the function exists the
		// prefix is the same in both encodings.
		if raw, ok := strings.CutPrefix(rawPath, r.script); ok {
			r.rawPath = slash(raw)
		}
		return r
	}
	if controlPath(path) {
		return route{to: toAPI}
	}
	return route{to: toNothing}
}

func slash(path string) string {
	if path == "" {
		return "/"
	}
	return path
}

// controlHost says whether host is one that control paths and the path form
// are served under. Names we were not told of are refused: a page elsewhere
// can point its own name at this address and would share our origin (DNS
// rebinding).
func controlHost(base, host string) bool {
	if host == base || host == "localhost" {
		return true
	}
	_, err := netip.ParseAddr(host)
	return err == nil
}

func controlPath(path string) bool {
	switch path {
	case "/", "/openapi.json", "/livez", "/readyz", "/metrics", "/v1", "/v2":
		return true
	}
	return strings.HasPrefix(path, "/v1/") || strings.HasPrefix(path, "/v2/")
}

// canonicalHost lowers a Host field and takes port, trailing dot and the
// brackets of an IPv6 address off.
func canonicalHost(host string) string {
	if strings.HasPrefix(host, "[") {
		host, _, _ = strings.Cut(host[1:], "]")
		return strings.ToLower(host)
	}
	host, _, _ = strings.Cut(host, ":")
	return strings.ToLower(strings.TrimSuffix(host, "."))
}

// validLabel says whether s is a DNS label in lower case (RFC 1123).
func validLabel(s string) bool {
	if s == "" || len(s) > 63 || s[0] == '-' || s[len(s)-1] == '-' {
		return false
	}
	for _, c := range []byte(s) {
		if c != '-' && (c < '0' || c > '9') && (c < 'a' || c > 'z') {
			return false
		}
	}
	return true
}
