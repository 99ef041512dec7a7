package kubeaccess

import (
	"context"
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	authenticationv1 "k8s.io/api/authentication/v1"
	authorizationv1 "k8s.io/api/authorization/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/client-go/kubernetes/fake"
	k8stesting "k8s.io/client-go/testing"

	"github.com/hearth-sh/hearth/internal/access"
)

func key(s string) [sha256.Size]byte { return sha256.Sum256([]byte(s)) }

func TestAnswersAreKeptAsLongAsTheySay(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a := newAnswers[int](10, 2, time.Second, time.Now)
		asked := 0
		get := func(k string, ttl time.Duration, err error) (int, error) {
			return a.get(t.Context(), key(k), func(context.Context) (int, time.Duration, error) { asked++; return asked, ttl, err })
		}
		for _, c := range []struct {
			name string
			pass time.Duration
			key  string
			ttl  time.Duration
			err  error
			want int
		}{
			{"first", 0, "a", 10 * time.Second, nil, 1},
			{"within", 9 * time.Second, "a", 10 * time.Second, nil, 1},
			{"over", time.Second, "a", 10 * time.Second, nil, 2},
			{"another", 0, "b", 0, nil, 3},
			{"not kept", 0, "b", -time.Second, nil, 4},
			{"still not kept", 0, "b", 0, nil, 5},
			{"trouble", 0, "c", 10 * time.Second, errors.New("down"), 6},
			{"trouble is not kept", 0, "c", 10 * time.Second, nil, 7},
			{"now it is", 0, "c", 10 * time.Second, nil, 7},
		} {
			time.Sleep(c.pass)
			if got, err := get(c.key, c.ttl, c.err); got != c.want || !errors.Is(err, c.err) {
				t.Errorf("%s: %d, %v, want %d", c.name, got, err, c.want)
			}
		}
	})
}

func TestAnswerInUseIsRenewedBeforeItsTimeWithoutWaiting(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a := newAnswers[int](10, 2, time.Minute, time.Now)
		asked := 0
		var trouble error
		ask := func(context.Context) (int, time.Duration, error) {
			asked++
			n, err := asked, trouble
			time.Sleep(time.Second)
			return n, 10 * time.Second, err
		}
		want := func(answer, questions int, wait time.Duration) {
			t.Helper()
			began := time.Now()
			got, err := a.get(t.Context(), key("a"), ask)
			took := time.Since(began)
			synctest.Wait()
			if got != answer || err != nil || asked != questions || took != wait {
				t.Errorf("%d, %v after %s and %d questions, want %d after %s and %d", got, err, took, asked, answer, wait, questions)
			}
		}
		want(1, 1, time.Second) // at 1 s, asked at 0 s
		time.Sleep(6 * time.Second)
		want(1, 1, 0) // 7 s
		time.Sleep(time.Second)
		want(1, 2, 0) // 8 s: asked for anew
		want(1, 2, 0) // once
		time.Sleep(time.Second)
		synctest.Wait()
		want(2, 2, 0) // 9 s
		trouble = errors.New("away")
		time.Sleep(8500 * time.Millisecond)
		want(2, 3, 0) // 17.5 s: trouble changes nothing
		trouble = nil
		time.Sleep(1500 * time.Millisecond)
		want(4, 4, time.Second) // 19 s: over, as without renewal
	})
}

func TestOneQuestionAnswersAllWhoAskIt(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a := newAnswers[int](10, 2, 5*time.Second, time.Now)
		asked := 0
		ask := func(context.Context) (int, time.Duration, error) {
			asked++
			time.Sleep(time.Second)
			return 7, time.Minute, nil
		}
		hasty, leave := context.WithCancel(t.Context())
		var all sync.WaitGroup
		all.Go(func() { // who asked first leaves first
			if _, err := a.get(hasty, key("a"), ask); !errors.Is(err, context.Canceled) {
				t.Errorf("%v", err)
			}
		})
		synctest.Wait()
		for range 20 {
			all.Go(func() {
				if got, err := a.get(t.Context(), key("a"), ask); got != 7 || err != nil {
					t.Errorf("%d, %v", got, err)
				}
			})
		}
		leave()
		all.Wait()
		if asked != 1 {
			t.Errorf("asked %d times", asked)
		}
	})
}

func TestQuestionsWaitForAPlaceAndNotForever(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a := newAnswers[int](10, 2, 5*time.Second, time.Now)
		at, most := 0, 0
		var mu sync.Mutex
		slow := func(ctx context.Context) (int, time.Duration, error) {
			mu.Lock()
			at++
			most = max(most, at)
			mu.Unlock()
			defer func() { mu.Lock(); at--; mu.Unlock() }()
			<-ctx.Done() // a server that does not answer
			return 0, 0, ctx.Err()
		}
		var all sync.WaitGroup
		began := time.Now()
		for i := range maxAsked {
			all.Go(func() {
				if _, err := a.get(t.Context(), key(fmt.Sprint(i)), slow); !errors.Is(err, context.DeadlineExceeded) {
					t.Errorf("%v", err)
				}
			})
		}
		synctest.Wait()
		if _, err := a.get(t.Context(), key("one more"), slow); !errors.Is(err, errBusy) {
			t.Errorf("%v", err)
		}
		all.Wait()
		if took := time.Since(began); took > 10*time.Second || most > 2 {
			t.Errorf("took %s, %d at once", took, most)
		}
		if len(a.asked) != 0 || len(a.known) != 0 {
			t.Errorf("%d asked, %d known", len(a.asked), len(a.known))
		}
	})
}

func TestAnswersAreBounded(t *testing.T) {
	a := newAnswers[int](100, 2, time.Second, time.Now)
	for i := range 1000 {
		if _, err := a.get(t.Context(), key(fmt.Sprint(i)), func(context.Context) (int, time.Duration, error) { return i, time.Minute, nil }); err != nil {
			t.Fatal(err)
		}
		if len(a.known) > 100 {
			t.Fatalf("%d kept", len(a.known))
		}
	}
	if len(a.known) < 50 {
		t.Errorf("only %d kept", len(a.known))
	}
}

func TestDifferentQuestionsHaveDifferentKeys(t *testing.T) {
	seen := map[[sha256.Size]byte]string{}
	for _, c := range []access.Caller{
		{User: "a"}, {User: "a", UID: "1"}, {User: "a", Groups: []string{"g"}}, {User: "a", Groups: []string{"g", "h"}}, {User: "a", Groups: []string{"gh"}},
		{User: "a", Extra: map[string][]string{"g": nil}}, {User: "a", Extra: map[string][]string{"g": {"h"}}}, {User: "a", Extra: map[string][]string{"g": {}, "h": {}}}, {User: "ag"},
	} {
		for _, act := range []access.Action{
			{Verb: "get", Tenant: "t"}, {Verb: "get", Function: "t"}, {Verb: "get", Tenant: "t", Function: "f"}, {Verb: "get", Tenant: "tf"},
			{Verb: "get", Tenant: "t", Function: "f", Subresource: "log"}, {Verb: "list", Tenant: "t"}, {Verb: "list"},
		} {
			k, q := rightsKey(c, act), fmt.Sprintf("%+v %+v", c, act)
			if other, ok := seen[k]; ok {
				t.Errorf("%s and %s are the same", q, other)
			}
			seen[k] = q
		}
	}
	if rightsKey(access.Caller{User: "a", Groups: []string{"g", "h"}}, access.Action{}) != rightsKey(access.Caller{User: "a", Groups: []string{"h", "g"}}, access.Action{}) {
		t.Error("the order of groups matters")
	}
}

// reviews is an API server that answers reviews as told: what a real one only
// does with authenticators that test/cluster has not.
func reviews(t *testing.T, token func(*authenticationv1.TokenReview), rights func(*authorizationv1.SubjectAccessReview)) (*Access, *int) {
	t.Helper()
	asked := new(int)
	client := fake.NewClientset()
	client.PrependReactor("create", "tokenreviews", func(a k8stesting.Action) (bool, runtime.Object, error) {
		*asked++
		r := a.(k8stesting.CreateAction).GetObject().(*authenticationv1.TokenReview).DeepCopy()
		token(r)
		return true, r, nil
	})
	client.PrependReactor("create", "subjectaccessreviews", func(a k8stesting.Action) (bool, runtime.Object, error) {
		r := a.(k8stesting.CreateAction).GetObject().(*authorizationv1.SubjectAccessReview).DeepCopy()
		rights(r)
		return true, r, nil
	})
	a, err := New(Options{Tokens: client.AuthenticationV1(), Rights: client.AuthorizationV1()})
	if err != nil {
		t.Fatal(err)
	}
	return a, asked
}

func bearer(token string) *http.Request {
	r := httptest.NewRequest(http.MethodGet, "/", nil)
	r.Header.Set("Authorization", "Bearer "+token)
	return r
}

func TestReviewsThatSayLessThanTheySeem(t *testing.T) {
	for name, answer := range map[string]authenticationv1.TokenReviewStatus{
		"authenticated for no audience":      {Authenticated: true, User: authenticationv1.UserInfo{Username: "u"}},
		"authenticated for another audience": {Authenticated: true, User: authenticationv1.UserInfo{Username: "u"}, Audiences: []string{"https://kubernetes.default.svc"}},
		"authenticated as nobody":            {Authenticated: true, Audiences: []string{"hearth.sh"}},
		"a user without authentication":      {User: authenticationv1.UserInfo{Username: "u"}, Audiences: []string{"hearth.sh"}},
	} {
		a, _ := reviews(t, func(r *authenticationv1.TokenReview) { r.Status = answer }, nil)
		var ue *access.UnauthenticatedError
		if c, err := a.Authenticate(t.Context(), bearer("t")); !errors.As(err, &ue) || c.User != "" {
			t.Errorf("%s: %+v, %v", name, c, err)
		}
	}
	for name, answer := range map[string]authorizationv1.SubjectAccessReviewStatus{
		"allowed and denied": {Allowed: true, Denied: true},
		"not evaluated":      {EvaluationError: "no such role"},
		"no opinion":         {},
	} {
		a, _ := reviews(t, nil, func(r *authorizationv1.SubjectAccessReview) { r.Status = answer })
		var de *access.DeniedError
		if err := a.Authorize(t.Context(), access.Caller{User: "u"}, access.Action{Verb: access.VerbGet}); !errors.As(err, &de) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestRightsAreAskedForAllThatIsKnownOfTheCaller(t *testing.T) {
	a, _ := reviews(t, func(r *authenticationv1.TokenReview) {
		if len(r.Spec.Audiences) != 1 || r.Spec.Audiences[0] != "hearth.sh" || r.Spec.Token != "t" {
			t.Errorf("%+v", r.Spec)
		}
		r.Status = authenticationv1.TokenReviewStatus{Authenticated: true, Audiences: []string{"other", "hearth.sh"}, User: authenticationv1.UserInfo{
			Username: "u", UID: "1", Groups: []string{"g"}, Extra: map[string]authenticationv1.ExtraValue{"scope": {"x", "y"}},
		}}
	}, func(r *authorizationv1.SubjectAccessReview) {
		s, at := r.Spec, r.Spec.ResourceAttributes
		r.Status.Allowed = s.User == "u" && s.UID == "1" && len(s.Groups) == 1 && s.Groups[0] == "g" && len(s.Extra["scope"]) == 2 && s.NonResourceAttributes == nil &&
			at.Group == "hearth.sh" && at.Resource == "functions" && at.Subresource == "log" && at.Namespace == "team" && at.Name == "hello" && at.Verb == "get"
	})
	c, err := a.Authenticate(t.Context(), bearer("t"))
	if err != nil {
		t.Fatal(err)
	}
	if err := a.Authorize(t.Context(), c, access.Action{Verb: access.VerbGet, Tenant: "team", Function: "hello", Subresource: access.SubresourceLog}); err != nil {
		t.Error(err)
	}
}

func TestRightToAllFunctionsIsAskedForOnceAndOneFunctionsOnlyWithoutIt(t *testing.T) {
	for _, c := range []struct {
		name   string
		grants func(namespace, name string) bool
		may    bool
		asked  int
	}{
		{"all of the namespace", func(namespace, name string) bool { return namespace == "team" }, true, 1},
		{"these by name", func(namespace, name string) bool { return namespace == "team" && name != "" }, true, 1 + 100},
		{"none", func(string, string) bool { return false }, false, 1 + 100},
	} {
		asked := 0
		a, _ := reviews(t, nil, func(r *authorizationv1.SubjectAccessReview) {
			asked++
			at := r.Spec.ResourceAttributes
			r.Status.Allowed = c.grants(at.Namespace, at.Name)
		})
		// Nothing here lasts as long as an answer, however busy the machine is.
		now := time.Now()
		a.rights.now = func() time.Time { return now }
		for i := range 100 {
			act := access.Action{Verb: access.VerbGet, Tenant: "team", Function: fmt.Sprintf("f%d", i)}
			var de *access.DeniedError
			if err := a.Authorize(t.Context(), access.Caller{User: "u"}, act); (err == nil) != c.may || err != nil && (!errors.As(err, &de) || de.Action != act) {
				t.Errorf("%s: %v", c.name, err)
			}
		}
		if asked != c.asked {
			t.Errorf("%s: %d reviews, want %d", c.name, asked, c.asked)
		}
	}
}

func TestTokenIsReviewedOnceInAWhile(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		good := func(r *authenticationv1.TokenReview) {
			r.Status = authenticationv1.TokenReviewStatus{Authenticated: true, Audiences: []string{"hearth.sh"}, User: authenticationv1.UserInfo{Username: "u"}}
		}
		soon, _ := json.Marshal(map[string]any{"exp": time.Now().Add(64 * time.Second).Unix(), "aud": "hearth.sh"})
		for _, c := range []struct {
			name, token string
			review      func(*authenticationv1.TokenReview)
			in30s       int
		}{
			{"good", "opaque", good, 4}, // anew after 7.5 s, while it is in use
			{"refused", "opaque", func(*authenticationv1.TokenReview) {}, 15},
			// Begins after a minute of the others. Once over, what the cluster says counts: clocks differ.
			{"about to expire", "e30." + base64.RawURLEncoding.EncodeToString(soon) + ".x", good, 28},
		} {
			a, asked := reviews(t, c.review, nil)
			for range 30 {
				_, _ = a.Authenticate(t.Context(), bearer(c.token))
				time.Sleep(time.Second)
			}
			if *asked != c.in30s {
				t.Errorf("%s: reviewed %d times in 30 s, want %d", c.name, *asked, c.in30s)
			}
		}
	})
}

func FuzzReadClaims(f *testing.F) {
	for _, s := range []string{"", "a.b.c", "e30.e30.x", "x." + base64.RawURLEncoding.EncodeToString([]byte(`{"exp":1,"aud":["a","b"]}`)) + ".y", "x." + base64.RawURLEncoding.EncodeToString([]byte(`{"exp":1e400,"aud":7}`)) + ".y"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, token string) {
		if readClaims(token).refusal("hearth.sh", time.Now()) == "" {
			t.Error("a refusal without a reason")
		}
	})
}
