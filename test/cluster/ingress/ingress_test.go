package ingress

import "testing"

func TestHostsAndPathsMatchAsTheAPIDocuments(t *testing.T) {
	for _, test := range []struct {
		pattern, host string
		how           int
		ok            bool
	}{
		{"foo.example.com", "foo.example.com", 2, true},
		{"foo.example.com", "bar.example.com", 0, false},
		{"*.example.com", "foo.example.com", 1, true},
		{"*.example.com", "foo.bar.example.com", 1, false},
		{"*.example.com", "example.com", 1, false},
		{"", "anything", 0, true},
	} {
		how, ok := matchHost(test.pattern, test.host)
		if ok != test.ok || ok && how != test.how {
			t.Errorf("%s for %s: %d %t", test.pattern, test.host, how, ok)
		}
	}
	for _, test := range []struct {
		prefix, path string
		want         bool
	}{
		{"/", "/", true}, {"/", "/a", true}, {"/foo", "/foo", true}, {"/foo", "/foo/", true}, {"/foo/", "/foo", true},
		{"/foo", "/foo/bar", true}, {"/foo", "/foobar", false}, {"/foo/bar", "/foo", false},
	} {
		if got := matchPrefix(test.prefix, test.path); got != test.want {
			t.Errorf("%s for %s: %t", test.prefix, test.path, got)
		}
	}
}
