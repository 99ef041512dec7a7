package access

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func request(headers ...string) *http.Request {
	r := httptest.NewRequest(http.MethodGet, "/", nil)
	for _, h := range headers {
		r.Header.Add("Authorization", h)
	}
	return r
}

func TestBearerToken(t *testing.T) {
	for _, c := range []struct {
		name      string
		headers   []string
		token     string
		presented bool
	}{
		{"a token", []string{"Bearer abc"}, "abc", false},
		{"any case", []string{"bEARER a.b-c_d~e+f/g="}, "a.b-c_d~e+f/g=", false},
		{"more spaces", []string{"Bearer   abc "}, "abc", false},
		{"nothing", nil, "", false},
		{"an empty header", []string{""}, "", false},
		{"no scheme", []string{"abc"}, "", false},
		{"another scheme", []string{"Basic YTpi"}, "", false},
		{"an empty token", []string{"Bearer "}, "", false},
		{"two headers", []string{"Bearer a", "Bearer b"}, "", true},
		{"two tokens", []string{"Bearer a b"}, "", true},
		{"two tokens with a comma", []string{"Bearer a, Bearer b"}, "", true},
		{"control characters", []string{"Bearer a\x00b"}, "", true},
		{"not ASCII", []string{"Bearer ä"}, "", true},
		{"the longest", []string{"Bearer " + strings.Repeat("a", MaxTokenBytes)}, strings.Repeat("a", MaxTokenBytes), false},
		{"too long", []string{"Bearer " + strings.Repeat("a", MaxTokenBytes+1)}, "", true},
	} {
		token, err := BearerToken(request(c.headers...))
		var ue *UnauthenticatedError
		if token != c.token || (err == nil) != (c.token != "") || err != nil && (!errors.As(err, &ue) || ue.Presented != c.presented) {
			t.Errorf("%s: %q, %+v", c.name, token, err)
		}
	}
}

// line makes a token and its line.
func line(t testing.TB, user string, tenants ...string) (token, line string) {
	t.Helper()
	token, line, err := GenerateToken(user, tenants...)
	if err != nil {
		t.Fatal(err)
	}
	return token, line
}

func write(t testing.TB, path string, lines ...string) {
	t.Helper()
	if err := os.WriteFile(path, []byte(strings.Join(lines, "\n")+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
}

func open(t testing.TB, lines ...string) (*File, string) {
	t.Helper()
	path := filepath.Join(t.TempDir(), "tokens")
	write(t, path, lines...)
	f, err := OpenFile(path, FileOptions{})
	if err != nil {
		t.Fatal(err)
	}
	return f, path
}

func TestTokenFileDecides(t *testing.T) {
	alice, l1 := line(t, "alice", "team-a", "shared:read")
	bot, l2 := line(t, "alice", "team-a:read")
	root, l3 := line(t, "root", "*")
	auditor, l4 := line(t, "auditor", "*:read", "audit")
	f, _ := open(t, "# a comment", "", l1, "\t"+strings.ReplaceAll(l2, " ", " \t "), l3, l4)
	for _, c := range []struct {
		token, user string
		action      Action
		may         bool
	}{
		{alice, "alice", Action{Verb: VerbCreate, Tenant: "team-a", Function: "f"}, true},
		{alice, "alice", Action{Verb: VerbDelete, Tenant: "team-a", Function: "f"}, true},
		{alice, "alice", Action{Verb: VerbGet, Tenant: "shared", Function: "f", Subresource: SubresourceLog}, true},
		{alice, "alice", Action{Verb: VerbList, Tenant: "shared"}, true},
		{alice, "alice", Action{Verb: VerbUpdate, Tenant: "shared", Function: "f"}, false},
		{alice, "alice", Action{Verb: VerbGet, Tenant: "team-b", Function: "f"}, false},
		{alice, "alice", Action{Verb: VerbList}, false},
		{alice, "alice", Action{Verb: VerbGet, Tenant: "*"}, false},
		{bot, "alice", Action{Verb: VerbGet, Tenant: "team-a"}, true},
		{bot, "alice", Action{Verb: VerbUpdate, Tenant: "team-a"}, false}, // rights are the token's
		{root, "root", Action{Verb: VerbDelete, Tenant: "any"}, true},
		{root, "root", Action{Verb: VerbList}, false},
		{auditor, "auditor", Action{Verb: VerbGet, Tenant: "any"}, true},
		{auditor, "auditor", Action{Verb: VerbUpdate, Tenant: "any"}, false},
		{auditor, "auditor", Action{Verb: VerbUpdate, Tenant: "audit"}, true},
	} {
		caller, err := f.Authenticate(context.Background(), request("Bearer "+c.token))
		if err != nil || caller.User != c.user {
			t.Fatalf("%+v, %v", caller, err)
		}
		may := c.may
		if c.user == "root" || c.user == "auditor" {
			may = may || c.action == Action{Verb: VerbList}
		}
		err = f.Authorize(context.Background(), caller, c.action)
		var de *DeniedError
		if (err == nil) != may || err != nil && (!errors.As(err, &de) || de.User != c.user || de.Action != c.action) {
			t.Errorf("%s: %s: %v", c.user, c.action, err)
		}
	}
	if err := f.Authorize(context.Background(), Caller{User: "root"}, Action{Verb: VerbGet, Tenant: "any"}); err == nil {
		t.Error("the name of a user is enough")
	}
	for _, bad := range []string{"nobody", alice + "x", alice[:len(alice)-1], strings.Fields(l1)[0][len(hashPrefix):]} {
		var ue *UnauthenticatedError
		if _, err := f.Authenticate(context.Background(), request("Bearer "+bad)); !errors.As(err, &ue) || !ue.Presented || ue.Remedy == "" || strings.Contains(ue.Error(), bad) {
			t.Errorf("%q: %+v", bad, err)
		}
	}
}

func TestTokenFileThatIsRefused(t *testing.T) {
	_, good := line(t, "alice", "team-a")
	sum := strings.Fields(good)[0]
	many := make([]string, maxTokens+1)
	for i := range many {
		many[i] = fmt.Sprintf("sha256:%064x u a", i)
	}
	for _, c := range []struct{ name, content, says string }{
		{"two fields", sum + " alice", "line 1: it must have three fields"},
		{"four fields", good + " more", "line 1: it must have three fields"},
		{"a token itself", "hearth_abc alice team-a", "line 1: the first field must be sha256:"},
		{"a short hash", "sha256:abcd alice team-a", "line 1: the first field"},
		{"not hexadecimal", "sha256:" + strings.Repeat("g", 64) + " alice team-a", "line 1: the first field"},
		{"no algorithm", strings.TrimPrefix(sum, hashPrefix) + " alice team-a", "line 1: the first field"},
		{"a long user", sum + " " + strings.Repeat("u", maxUserBytes+1) + " team-a", "line 1: the user must be"},
		{"a control character", sum + " al\x01ice team-a", "line 1: the user must be"},
		{"a bad tenant", "\n" + sum + " alice Team", "line 2: tenant must start"},
		{"an empty tenant", sum + " alice team-a,", "line 1: tenant must not be empty"},
		{"a right that is none", sum + " alice team-a:write", "line 1: tenant must consist"},
		{"a tenant twice", sum + " alice team-a,team-a:read", "line 1: the tenant team-a is named twice"},
		{"a token twice", good + "\n# x\n" + good, "line 3: the token is the one of line 1"},
		{"too many", strings.Join(many, "\n"), "there are more than 1000 tokens"},
		{"too large", strings.Repeat("#", maxFileBytes+1), "larger than"},
	} {
		path := filepath.Join(t.TempDir(), "tokens")
		write(t, path, c.content)
		_, err := OpenFile(path, FileOptions{})
		if err == nil || !strings.Contains(err.Error(), c.says) || !strings.Contains(err.Error(), path) || strings.Contains(err.Error(), sum) {
			t.Errorf("%s: %v, want %q", c.name, err, c.says)
		}
	}
}

func TestTokenFileThatOthersCanWriteIsRefused(t *testing.T) {
	f, path := open(t, "# none")
	for _, mode := range []os.FileMode{0o620, 0o602} {
		if err := os.Chmod(path, mode); err != nil {
			t.Fatal(err)
		}
		if _, err := OpenFile(path, FileOptions{}); err == nil || !strings.Contains(err.Error(), "chmod go-w") {
			t.Errorf("%v: %v", mode, err)
		}
	}
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	if _, err := f.Authenticate(context.Background(), request("Bearer x")); !errors.Is(err, ErrUnavailable) {
		t.Errorf("without a file: %v", err)
	}
	if err := syscall.Mkfifo(path, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := OpenFile(path, FileOptions{}); err == nil || !strings.Contains(err.Error(), "regular file") {
		t.Errorf("a pipe: %v", err)
	}
}

func TestChangesOfTheTokenFileHoldAtOnce(t *testing.T) {
	alice, l1 := line(t, "alice", "team-a")
	bob, l2 := line(t, "bob", "team-b")
	f, path := open(t, l1)
	known := func(token string) bool {
		t.Helper()
		_, err := f.Authenticate(context.Background(), request("Bearer "+token))
		var ue *UnauthenticatedError
		if err != nil && !errors.As(err, &ue) {
			t.Fatal(err)
		}
		return err == nil
	}
	// Old enough to be believed, and then changed in place within one tick of
	// the file system's clock.
	old := time.Now().Add(-time.Hour)
	for _, at := range []time.Time{old, time.Now()} {
		write(t, path, l1)
		if err := os.Chtimes(path, at, at); err != nil {
			t.Fatal(err)
		}
		if !known(alice) || known(bob) {
			t.Fatal("the first file does not hold")
		}
		write(t, path, l2)
		if at != old {
			if err := os.Chtimes(path, at, at); err != nil {
				t.Fatal(err)
			}
		}
		if known(alice) || !known(bob) {
			t.Error("the second file does not hold")
		}
	}
	// Another file of the same size and time over it.
	write(t, path, l2)
	write(t, path+".new", strings.Replace(l1, "alice team-a", "al1 team-ab", 1)[:len(l2)])
	for _, p := range []string{path, path + ".new"} {
		if err := os.Chtimes(p, old, old); err != nil {
			t.Fatal(err)
		}
	}
	if !known(bob) {
		t.Fatal("bob is not known")
	}
	if err := os.Rename(path+".new", path); err != nil {
		t.Fatal(err)
	}
	if known(bob) || !known(alice) {
		t.Error("a file that replaced it does not hold")
	}
}

func TestBrokenTokenFileLetsNobodyInUntilItIsMended(t *testing.T) {
	alice, l1 := line(t, "alice", "team-a")
	f, path := open(t, l1)
	write(t, path, l1, "oops")
	for range 2 {
		if _, err := f.Authenticate(context.Background(), request("Bearer "+alice)); !errors.Is(err, ErrUnavailable) || !strings.Contains(err.Error(), "line 2") {
			t.Fatalf("%v", err)
		}
	}
	write(t, path, l1)
	if _, err := f.Authenticate(context.Background(), request("Bearer "+alice)); err != nil {
		t.Fatal(err)
	}
}

func TestTokenFileIsReadByManyAtOnce(t *testing.T) {
	alice, l1 := line(t, "alice", "team-a")
	f, path := open(t, l1)
	var all sync.WaitGroup
	for range 8 {
		all.Go(func() {
			for range 50 {
				if _, err := f.Authenticate(context.Background(), request("Bearer "+alice)); err != nil {
					t.Error(err)
					return
				}
			}
		})
	}
	for range 20 {
		write(t, path+".new", l1, "# changed")
		if err := os.Rename(path+".new", path); err != nil {
			t.Fatal(err)
		}
	}
	all.Wait()
}

func TestGeneratedTokensDiffer(t *testing.T) {
	a, l1 := line(t, "u", "a", "a")
	b, l2 := line(t, "u", "a")
	if a == b || l1 == l2 || strings.Contains(l1, a[len(tokenPrefix):]) || !strings.HasSuffix(l1, " u a") {
		t.Error(l1, l2)
	}
	for _, bad := range [][]string{{"a user", "a"}, {"", "a"}, {"u"}, {"u", "A"}, {"u", "a b"}, {"u\n", "a"}} {
		if _, _, err := GenerateToken(bad[0], bad[1:]...); err == nil {
			t.Errorf("%q makes a line", bad)
		}
	}
}

func FuzzParseTokens(f *testing.F) {
	_, l := line(f, "alice", "team-a", "*:read")
	f.Add([]byte(l))
	f.Add([]byte("# x\n\n" + l + "\r\n"))
	f.Add([]byte("sha256: a b"))
	f.Fuzz(func(t *testing.T, data []byte) {
		entries, err := parseTokens(data)
		if err != nil {
			if entries != nil {
				t.Error("entries with an error")
			}
			return
		}
		for _, e := range entries {
			if e.user == "" || e.grant == nil || len(*e.grant) == 0 {
				t.Errorf("%+v", e)
			}
		}
	})
}
