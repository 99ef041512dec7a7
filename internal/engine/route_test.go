package engine

import (
	"slices"
	"strings"
	"testing"

	"github.com/hearth-sh/hearth/api/v1alpha1"
)

func TestRouteByHostAndPath(t *testing.T) {
	tests := []struct {
		base, host, path, raw string
		want                  route
	}{
		{"localhost", "a.localhost", "/x", "", route{to: toFunction, function: "a", path: "/x"}},
		{"localhost", "A.LOCALHOST.:8080", "/v1/functions", "", route{to: toFunction, function: "a", path: "/v1/functions"}},
		{"localhost", "a.b.localhost", "/", "", route{to: toFunction, function: "a.b", path: "/"}},
		{"localhost", "localhost", "/f/a/x y", "/f/a/x%20y", route{to: toFunction, function: "a", script: "/f/a", path: "/x y", rawPath: "/x%20y"}},
		{"localhost", "localhost", "/f/a", "", route{to: toFunction, function: "a", script: "/f/a", path: "/"}},
		{"localhost", "localhost", "/f/", "", route{to: toFunction, script: "/f/", path: "/"}},
		{"localhost", "localhost", "/f", "", route{to: toNothing}},
		{"localhost", "localhost:1", "/", "", route{to: toAPI}},
		{"localhost", "[::1]:1", "/v1/x", "", route{to: toAPI}},
		{"localhost", "10.0.0.1", "/readyz", "", route{to: toAPI}},
		{"localhost", "10.0.0.1", "/readyzz", "", route{to: toNothing}},
		{"localhost", "example.org", "/v1/x", "", route{}},
		{"localhost", "notlocalhost", "/", "", route{}},
		{"localhost", "", "/", "", route{}},
		{"10.0.0.1.nip.io", "a.10.0.0.1.nip.io", "/", "", route{to: toFunction, function: "a", path: "/"}},
		{"fn.example.org", "fn.example.org", "/metrics", "", route{to: toAPI}},
		{"fn.example.org", "a.localhost", "/", "", route{}},
	}
	for _, test := range tests {
		if got := (&routing{base: test.base}).request(test.host, test.path, test.raw); got != test.want {
			t.Errorf("%s%s below %s: %+v, want %+v", test.host, test.path, test.base, got, test.want)
		}
	}
}

func TestRoutesOfHostsLeadToFunctions(t *testing.T) {
	table := &routing{base: "fn.example.org"}
	var refused []string
	for _, r := range []struct{ host, path, function string }{
		{"shop.example.com", "/", "shop"},
		{"shop.example.com", "/api", "api"},
		{"shop.example.com", "/api/v2/", "api-v2"},
		{"shop.example.com", "/api/", "other"},
		{"shop.example.com", "/api", "api"}, // again, by the same
		{"paths.example.com", "/only", "only"},
		{"www.shop.fn.example.org", "/", "shop"},
		{"shop.fn.example.org", "/", "thief"},
		{"fn.example.org", "/", "thief"},
		{"localhost", "/", "thief"},
		{"10.0.0.1", "/", "thief"},
		{"Shop.Example.com", "/", "upper"},
		{"a..b", "/", "dots"},
		{"a.example.com:80", "/", "port"},
		{"", "/", "nothing"},
		{"slash.example.com", "api", "relative"},
		{"long.example.com", "/" + strings.Repeat("x", maxRoutePath), "long"},
	} {
		if err := table.add(v1alpha1.HostRoute{Host: r.host, Path: r.path}, r.function); err != nil {
			refused = append(refused, r.function)
		}
	}
	if want := []string{"other", "thief", "thief", "thief", "thief", "upper", "dots", "port", "nothing", "relative", "long"}; !slices.Equal(refused, want) {
		t.Errorf("refused: %q, want %q", refused, want)
	}
	table.sort()
	to := func(function, path string) route { return route{to: toFunction, function: function, path: path} }
	for _, test := range []struct {
		host, path string
		want       route
	}{
		{"shop.example.com", "/", to("shop", "/")},
		{"SHOP.example.com.:8080", "/v1/functions", to("shop", "/v1/functions")},
		{"shop.example.com", "/f/other/", to("shop", "/f/other/")},
		{"shop.example.com", "/api", to("api", "/api")},
		{"shop.example.com", "/api/v1", to("api", "/api/v1")},
		{"shop.example.com", "/api/v2", to("api-v2", "/api/v2")},
		{"shop.example.com", "/api/v2/x", to("api-v2", "/api/v2/x")},
		{"shop.example.com", "/api/v20", to("api", "/api/v20")},
		{"shop.example.com", "/apis", to("shop", "/apis")},
		{"paths.example.com", "/only/x", to("only", "/only/x")},
		{"paths.example.com", "/", route{to: toNothing}},
		{"paths.example.com", "/v1/functions", route{to: toNothing}},
		{"www.shop.fn.example.org", "/", to("shop", "/")},
		{"api.shop.fn.example.org", "/", to("api.shop", "/")},
		{"shop.fn.example.org", "/api", to("shop", "/api")},
		{"example.com", "/", route{}},
		{"x.shop.example.com", "/", route{}},
	} {
		if got := table.request(test.host, test.path, ""); got != test.want {
			t.Errorf("%s%s: %+v, want %+v", test.host, test.path, got, test.want)
		}
	}
}

func FuzzRoute(f *testing.F) {
	f.Add("a.localhost:80", "/f/a/")
	f.Add("[::1", "/f//x")
	f.Fuzz(func(t *testing.T, host, path string) {
		table := &routing{base: "localhost"}
		if table.add(v1alpha1.HostRoute{Host: canonicalHost(host), Path: path}, "a") == nil {
			if r := table.request(host, path, path); r.to != toFunction || r.function != "a" || r.path != path {
				t.Errorf("%q%q does not lead where it was said to: %+v", host, path, r)
			}
		}
		table.sort()
		r := table.request(host, path, path)
		if r.to == toFunction && (r.path == "" || validLabel(r.function) && r.script != "" && r.path[0] != '/') {
			t.Errorf("%q%q: %+v", host, path, r)
		}
	})
}
