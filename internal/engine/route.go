package engine

import (
	"cmp"
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"github.com/hearth-sh/hearth/api/v1alpha1"
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

// routing is what hosts mean. It is never changed, only replaced.
type routing struct {
	// base is lower case without a trailing dot.
	base string
	// hosts are the names beside those below base, each with its paths, the
	// longest first.
	hosts map[string][]hostPath
}

// hostPath is a path of a host that leads to a function.
type hostPath struct {
	// path has no trailing slash: it is empty for all of the host.
	path     string
	function string
}

// maxRoutePath bounds the path of a route.
const maxRoutePath = 1024

// add makes a route lead to a function. The first to have a path keeps it.
func (t *routing) add(r v1alpha1.HostRoute, function string) error {
	host := canonicalHost(r.Host)
	label, below := strings.CutSuffix(host, "."+t.base)
	switch {
	case host != r.Host || !validHost(host):
		return fmt.Errorf("the host %q is not a DNS name in lower case", r.Host)
	case controlHost(t.base, host):
		return fmt.Errorf("the host %q is this server's own", host)
	case below && validLabel(label):
		return fmt.Errorf("the host %q belongs to the function named %q", host, label)
	case !strings.HasPrefix(r.Path, "/") || len(r.Path) > maxRoutePath:
		return fmt.Errorf("the path %.100q of host %s does not begin with a slash, or has more than %d bytes", r.Path, host, maxRoutePath)
	}
	p := hostPath{strings.TrimRight(r.Path, "/"), function}
	for _, other := range t.hosts[host] {
		if other.path == p.path {
			if other.function == function {
				return nil
			}
			return fmt.Errorf("host %s and path %s lead to function %s already", host, slash(p.path), other.function)
		}
	}
	if t.hosts == nil {
		t.hosts = make(map[string][]hostPath)
	}
	t.hosts[host] = append(t.hosts[host], p)
	return nil
}

// sort puts the longest paths first, once all are there.
func (t *routing) sort() {
	for _, paths := range t.hosts {
		slices.SortFunc(paths, func(a, b hostPath) int { return cmp.Compare(len(b.path), len(a.path)) })
	}
}

// request decides by host and path where a request goes. A function's own name
// goes first, then the hosts that functions were given. Those lead to the
// function only: nothing of this server's own is below them, and nothing is
// taken off the path.
func (t *routing) request(host, path, rawPath string) route {
	host = canonicalHost(host)
	label, below := strings.CutSuffix(host, "."+t.base)
	if below && validLabel(label) {
		return route{to: toFunction, function: label, path: slash(path), rawPath: rawPath}
	}
	if paths, ok := t.hosts[host]; ok {
		for _, p := range paths {
			// On the border of a segment: /api leads to /api and /api/x, not to /apix.
			if rest, ok := strings.CutPrefix(path, p.path); ok && (rest == "" || rest[0] == '/') {
				return route{to: toFunction, function: p.function, path: slash(path), rawPath: rawPath}
			}
		}
		return route{to: toNothing}
	}
	if below {
		return route{to: toFunction, function: label, path: slash(path), rawPath: rawPath} // which nobody has
	}
	if !controlHost(t.base, host) {
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
	return isAddress(host)
}

// isAddress says whether a canonical host is an IP address.
func isAddress(host string) bool {
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

// validHost says whether s is a DNS name of labels in lower case, at most 253
// bytes (RFC 1035).
func validHost(s string) bool {
	if len(s) > 253 {
		return false
	}
	for label := range strings.SplitSeq(s, ".") {
		if !validLabel(label) {
			return false
		}
	}
	return true
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
