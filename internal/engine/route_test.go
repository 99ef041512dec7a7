package engine

import "testing"

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
		if got := routeRequest(test.base, test.host, test.path, test.raw); got != test.want {
			t.Errorf("%s%s below %s: %+v, want %+v", test.host, test.path, test.base, got, test.want)
		}
	}
}

func FuzzRoute(f *testing.F) {
	f.Add("a.localhost:80", "/f/a/")
	f.Add("[::1", "/f//x")
	f.Fuzz(func(t *testing.T, host, path string) {
		r := routeRequest("localhost", host, path, path)
		if r.to == toFunction && (r.path == "" || validLabel(r.function) && r.script != "" && r.path[0] != '/') {
			t.Errorf("%q%q: %+v", host, path, r)
		}
	})
}
