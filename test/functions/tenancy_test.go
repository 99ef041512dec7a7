package functions_test

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	authenticationv1 "k8s.io/api/authentication/v1"
	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/client-go/dynamic"
	"k8s.io/client-go/rest"

	discoveryv1 "k8s.io/api/discovery/v1"

	"github.com/hearth-sh/hearth/api/v1alpha1"
	"github.com/hearth-sh/hearth/internal/client"
	"github.com/hearth-sh/hearth/internal/kube"
	"github.com/hearth-sh/hearth/test/chart"
)

const (
	// apiURL is the name in the certificate of every replica.
	apiURL = "https://hearth-api." + chart.Namespace + ".svc"
	// developer is the ServiceAccount of those who work in a tenant.
	developer = "developer"
	// quota is how many functions a tenant may have; see install.
	quota = 20
)

// newTeam is a tenant whose developer may do everything with its functions,
// and nothing else.
func newTeam(t *testing.T) string {
	t.Helper()
	tenant := newTenant(t)
	ctx := t.Context()
	if _, err := bench.Client().CoreV1().ServiceAccounts(tenant).Create(ctx, &corev1.ServiceAccount{ObjectMeta: metav1.ObjectMeta{Name: developer}}, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	if _, err := bench.Client().RbacV1().Roles(tenant).Create(ctx, &rbacv1.Role{
		ObjectMeta: metav1.ObjectMeta{Name: developer},
		Rules: []rbacv1.PolicyRule{
			{APIGroups: []string{v1alpha1.Group}, Resources: []string{"functions"}, Verbs: []string{"create", "update", "patch", "get", "list", "delete"}},
			{APIGroups: []string{v1alpha1.Group}, Resources: []string{"functions/log"}, Verbs: []string{"get"}},
		},
	}, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	if _, err := bench.Client().RbacV1().RoleBindings(tenant).Create(ctx, &rbacv1.RoleBinding{
		ObjectMeta: metav1.ObjectMeta{Name: developer},
		Subjects:   []rbacv1.Subject{{Kind: rbacv1.ServiceAccountKind, Name: developer, Namespace: tenant}},
		RoleRef:    rbacv1.RoleRef{APIGroup: rbacv1.GroupName, Kind: "Role", Name: developer},
	}, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	return tenant
}

// tokenOf is what `kubectl create token developer --audience` prints.
func tokenOf(t *testing.T, tenant string, audiences ...string) string {
	t.Helper()
	made, err := bench.Client().CoreV1().ServiceAccounts(tenant).CreateToken(t.Context(), developer, &authenticationv1.TokenRequest{
		Spec: authenticationv1.TokenRequestSpec{Audiences: audiences},
	}, metav1.CreateOptions{})
	if err != nil {
		t.Fatal(err)
	}
	return made.Status.Token
}

// authority is what a client outside of the cluster needs to trust the API.
func authority(t *testing.T) *x509.CertPool {
	t.Helper()
	published, err := bench.Client().CoreV1().ConfigMaps(chart.Namespace).Get(t.Context(), "hearth-api", metav1.GetOptions{})
	if err != nil {
		t.Fatal(err)
	}
	roots := x509.NewCertPool()
	if !roots.AppendCertsFromPEM([]byte(published.Data["ca.crt"])) {
		t.Fatalf("no certificates in %v", published.Data)
	}
	return roots
}

// replicas are the API's pods that are ready, those that were made first first.
func replicas(t *testing.T) []corev1.Pod {
	t.Helper()
	if err := ready(t.Context()); err != nil {
		t.Fatal(err)
	}
	pods, err := podsOf(t.Context(), "api")
	if err != nil {
		t.Fatal(err)
	}
	pods = slices.DeleteFunc(pods, func(p corev1.Pod) bool { return !chart.Ready(p) || p.DeletionTimestamp != nil })
	slices.SortFunc(pods, func(a, b corev1.Pod) int { return strings.Compare(a.Name, b.Name) })
	return pods
}

// overTLS reaches one replica as agents and command lines do.
func overTLS(t *testing.T, replica corev1.Pod, roots *x509.CertPool) *http.Transport {
	t.Helper()
	dialer := &net.Dialer{Timeout: 10 * time.Second}
	transport := &http.Transport{
		TLSClientConfig: &tls.Config{RootCAs: roots, MinVersion: tls.VersionTLS12},
		DialContext: func(ctx context.Context, network, _ string) (net.Conn, error) {
			return dialer.DialContext(ctx, network, net.JoinHostPort(replica.Status.PodIP, "8443"))
		},
	}
	t.Cleanup(transport.CloseIdleConnections)
	return transport
}

// person sends requests to one replica with a token.
type person struct {
	http  *http.Client
	token string
}

func (p person) with(token string) person { return person{p.http, token} }

func newPerson(t *testing.T, replica corev1.Pod, token string) person {
	t.Helper()
	return person{&http.Client{Timeout: soon, Transport: overTLS(t, replica, authority(t))}, token}
}

// answered is what the API answered.
type answered struct {
	status  int
	header  http.Header
	problem v1alpha1.Problem
	body    []byte
}

func (a answered) String() string { return fmt.Sprintf("%d %s", a.status, a.body) }

// code is the problem's; empty for none.
func (a answered) code() string { return a.problem.Type[strings.LastIndexByte(a.problem.Type, '/')+1:] }

func (a answered) function(t *testing.T) (f v1alpha1.Function) {
	t.Helper()
	if err := json.Unmarshal(a.body, &f); err != nil || a.status >= 300 {
		t.Fatalf("%s is no function: %v", a, err)
	}
	return f
}

// do sends one request, once. headers are names and values by turns.
func (p person) do(ctx context.Context, method, path string, body []byte, headers ...string) (a answered, err error) {
	request, err := http.NewRequestWithContext(ctx, method, apiURL+path, bytes.NewReader(body))
	if err != nil {
		return a, err
	}
	if p.token != "" {
		request.Header.Set("Authorization", "Bearer "+p.token)
	}
	for i := 0; i+1 < len(headers); i += 2 {
		request.Header.Set(headers[i], headers[i+1])
	}
	response, err := p.http.Do(request)
	if err != nil {
		return a, err
	}
	defer response.Body.Close()
	a.status, a.header = response.StatusCode, response.Header
	if a.body, err = io.ReadAll(io.LimitReader(response.Body, 4<<20)); err != nil {
		return a, err
	}
	if response.Header.Get("Content-Type") == "application/problem+json" {
		err = json.Unmarshal(a.body, &a.problem)
	}
	return a, err
}

func (p person) must(t *testing.T, method, path string, body []byte, headers ...string) answered {
	t.Helper()
	a, err := p.do(t.Context(), method, path, body, headers...)
	if err != nil {
		t.Fatalf("%s %s: %v", method, path, err)
	}
	return a
}

// put submits a module.
func (p person) put(t *testing.T, tenant, name string, module []byte, headers ...string) answered {
	t.Helper()
	return p.must(t, http.MethodPut, "/v1/functions/"+name+"?tenant="+tenant, module, append([]string{"Content-Type", "application/wasm"}, headers...)...)
}

func (a answered) want(t *testing.T, what string, status int, code string) {
	t.Helper()
	if a.status != status || a.code() != code {
		t.Errorf("%s: %s, want %d %s", what, a, status, code)
	}
}

func TestTenantsDoNotReachEachOther(t *testing.T) {
	one, two := newTeam(t), newTeam(t)
	mine := newPerson(t, replicas(t)[0], tokenOf(t, one, v1alpha1.Group))
	theirs := mine.with(tokenOf(t, two, v1alpha1.Group))

	created := mine.put(t, one, "apart", module(t, "one's own"))
	created.want(t, "a function in one's own namespace", http.StatusCreated, "")
	f := created.function(t)
	answers(t, f.URL, "one's own")
	mine.put(t, one, "apart", module(t, "one's own still")).want(t, "an update", http.StatusOK, "")
	mine.must(t, http.MethodGet, "/v1/functions/apart", nil).want(t, "a look", http.StatusOK, "")
	mine.must(t, http.MethodGet, "/v1/functions/apart/logs", nil).want(t, "its log", http.StatusOK, "")
	listed := mine.must(t, http.MethodGet, "/v1/functions?tenant="+one, nil)
	if listed.want(t, "a list of one's own", http.StatusOK, ""); !strings.Contains(string(listed.body), `"apart"`) {
		t.Errorf("the list lacks it: %s", listed)
	}

	for _, c := range []struct {
		what, method, path, media string
		body                      []byte
		status                    int
		code                      string
	}{
		{"a look at another's", http.MethodGet, "/v1/functions/apart", "", nil, 404, "function-not-found"},
		{"another's revisions", http.MethodGet, "/v1/functions/apart/revisions", "", nil, 404, "function-not-found"},
		{"another's log", http.MethodGet, "/v1/functions/apart/logs", "", nil, 404, "function-not-found"},
		{"deleting another's", http.MethodDelete, "/v1/functions/apart", "", nil, 404, "function-not-found"},
		{"rolling another's back", http.MethodPost, "/v1/functions/apart/rollback", "", nil, 404, "function-not-found"},
		{"changing another's", http.MethodPatch, "/v1/functions/apart", "application/merge-patch+json", []byte(`{"memoryMiB":64}`), 404, "function-not-found"},
		// Exactly as for one that does not exist.
		{"deleting what is not there", http.MethodDelete, "/v1/functions/nothing", "", nil, 404, "function-not-found"},
		{"another's name", http.MethodPut, "/v1/functions/apart?tenant=" + two, "application/wasm", module(t, "two's"), 409, "name-taken"},
		{"a function in another's namespace", http.MethodPut, "/v1/functions/apart?tenant=" + one, "application/wasm", module(t, "two's"), 403, "forbidden"},
		{"a new one in another's namespace", http.MethodPut, "/v1/functions/new?tenant=" + one, "application/wasm", module(t, "two's"), 403, "forbidden"},
		{"a namespace that is not there", http.MethodPut, "/v1/functions/new?tenant=nowhere", "application/wasm", module(t, "two's"), 403, "forbidden"},
		{"another's list", http.MethodGet, "/v1/functions?tenant=" + one, "", nil, 403, "forbidden"},
		{"a list of all tenants", http.MethodGet, "/v1/functions", "", nil, 403, "forbidden"},
	} {
		theirs.must(t, c.method, c.path, c.body, "Content-Type", c.media).want(t, c.what, c.status, c.code)
	}
	// Another's image cannot be had by its name either.
	stolen := theirs.must(t, http.MethodPut, "/v1/functions/stolen?tenant="+two, []byte(`{"image":"`+f.Image+`"}`), "Content-Type", "application/json")
	if stolen.status < 400 || stolen.status >= 500 {
		t.Errorf("another tenant's image was taken: %s", stolen)
	}
	if _, err := kube.NewFunctions(bench.Dynamic()).Get(t.Context(), two, "stolen"); err == nil {
		t.Error("a function of another tenant's image was recorded")
	}
	answers(t, f.URL, "one's own still")
	if now := mine.must(t, http.MethodGet, "/v1/functions/apart", nil).function(t); now.Revision != 2 || now.Tenant != one {
		t.Errorf("it was changed: %+v", now)
	}
	mine.must(t, http.MethodDelete, "/v1/functions/apart", nil).want(t, "deleting one's own", http.StatusNoContent, "")
	waitStatusCode(t, f.URL, http.StatusNotFound)
	// Now the name is free.
	freed := theirs.put(t, two, "apart", module(t, "two's"))
	freed.want(t, "a name that became free", http.StatusCreated, "")
	answers(t, f.URL, "two's")
	if n := freed.function(t).Revision; n != 3 {
		t.Errorf("revision %d, want 3: numbers are not used again", n)
	}
}

// applier applies Functions as a tenant's own developer, past the API.
type applier struct {
	tenant  string
	objects dynamic.ResourceInterface
}

func newApplier(t *testing.T, tenant string) applier {
	t.Helper()
	config := rest.AnonymousClientConfig(bench.RESTConfig())
	config.BearerToken = tokenOf(t, tenant)
	client, err := dynamic.NewForConfig(config)
	if err != nil {
		t.Fatal(err)
	}
	return applier{tenant, client.Resource(kube.FunctionGVR()).Namespace(tenant)}
}

func (a applier) apply(t *testing.T, name, image string) {
	t.Helper()
	u := &unstructured.Unstructured{Object: map[string]any{
		"apiVersion": v1alpha1.APIVersion, "kind": kube.FunctionKind,
		"metadata": map[string]any{"name": name, "namespace": a.tenant}, "spec": map[string]any{"image": image},
	}}
	if _, err := a.objects.Apply(t.Context(), name, u, metav1.ApplyOptions{FieldManager: "kubectl"}); err != nil {
		t.Fatal(err)
	}
}

// refused waits until the function's condition says why it is not taken on.
func (a applier) refused(t *testing.T, name, reason, says string) {
	t.Helper()
	f := waitObject(t, a.tenant, name, name+" to be refused: "+reason, func(f *kube.Function) bool {
		return slices.ContainsFunc(f.Status.Conditions, func(c v1alpha1.Condition) bool {
			return c.Type == v1alpha1.ConditionReady && c.Status == v1alpha1.ConditionFalse && c.Reason == reason && strings.Contains(c.Message, says)
		})
	})
	if f.Status.Revision != 0 || f.Status.ActiveRevision != 0 {
		t.Errorf("%s was recorded: %+v", name, f.Status)
	}
}

// audited counts the lines of the replicas' audit log that have all the words.
func audited(t *testing.T, words ...string) (n int) {
	t.Helper()
	for _, p := range replicas(t) {
		log, err := bench.PodLogs(t.Context(), p.Namespace, p.Name, "")
		if err != nil {
			t.Fatal(err)
		}
		for line := range strings.Lines(log) {
			if strings.Contains(line, `"audit":true`) && !slices.ContainsFunc(words, func(w string) bool { return !strings.Contains(line, w) }) {
				n++
			}
		}
	}
	return n
}

func TestWhatATenantAppliesReachesNoOther(t *testing.T) {
	one, two := newTeam(t), newTeam(t)
	mine := newPerson(t, replicas(t)[0], tokenOf(t, one, v1alpha1.Group))
	created := mine.put(t, one, "kept-apart", module(t, "one's secret work"))
	created.want(t, "a function in one's own namespace", http.StatusCreated, "")
	f := created.function(t)
	answers(t, f.URL, "one's secret work")

	theirs := newApplier(t, two)
	theirs.apply(t, "stolen", f.Image)
	theirs.refused(t, "stolen", "ImageNotYours", "image of your own")
	// The nodes have those bytes under their digest: it must be in the
	// repository that is named.
	_, digest, _ := strings.Cut(f.Image, "@")
	own := registry.Host + "/hearth/" + two + "/stolen@" + digest
	theirs.apply(t, "by-digest", own)
	theirs.refused(t, "by-digest", "ImageUnavailable", "push it")
	for _, name := range []string{"stolen", "by-digest"} {
		if status, body, err := get(t.Context(), "http://"+name+"."+base+"/"); err == nil && (status == http.StatusOK || strings.Contains(body, "one's secret work")) {
			t.Errorf("%s answers %d %s", name, status, body)
		}
	}
	// The owner applies the same image, and it runs.
	newApplier(t, one).apply(t, "kept-apart-too", f.Image)
	applied := waitObject(t, one, "kept-apart-too", "the owner's to be warm", allWarm)
	answers(t, applied.Status.URL, "one's secret work")

	for _, words := range [][]string{
		{`"action":"apply"`, `"outcome":"refused"`, `"problem":"ImageNotYours"`, `"tenant":"` + two + `"`, `"function":"stolen"`},
		{`"action":"apply"`, `"outcome":"accepted"`, `"tenant":"` + one + `"`, `"function":"kept-apart-too"`, `"revision":1`},
	} {
		if n := audited(t, words...); n != 1 {
			t.Errorf("%d lines of the audit log have %v", n, words)
		}
	}
}

func TestOnlyGoodTokensAreHeard(t *testing.T) {
	tenant := newTeam(t)
	good := tokenOf(t, tenant, v1alpha1.Group)
	nobody := newPerson(t, replicas(t)[0], "")
	list := "/v1/functions?tenant=" + tenant
	later := resigned(t, good, func(claims map[string]any) { claims["exp"] = time.Now().Add(30 * time.Minute).Unix() })
	for what, token := range map[string]string{"a good token": good, "one that the cluster's key signed": later} {
		nobody.with(token).must(t, http.MethodGet, list, nil).want(t, what, http.StatusOK, "")
	}
	expired := resigned(t, good, func(claims map[string]any) {
		claims["iat"], claims["nbf"], claims["exp"] = time.Now().Add(-time.Hour).Unix(), time.Now().Add(-time.Hour).Unix(), time.Now().Add(-10*time.Minute).Unix()
	})
	for what, token := range map[string]string{
		"no token":                        "",
		"nonsense":                        "nonsense",
		"an expired token":                expired,
		"a token for the Kubernetes API":  tokenOf(t, tenant),
		"a token for another audience":    tokenOf(t, tenant, "somebody.else"),
		"a token with a broken signature": good[:len(good)-8] + "AAAAAAAA",
	} {
		for _, method := range []string{http.MethodGet, http.MethodPut} {
			path := list
			if method == http.MethodPut {
				path = "/v1/functions/unheard?tenant=" + tenant
			}
			a := nobody.with(token).must(t, method, path, module(t, "unheard"), "Content-Type", "application/wasm")
			if a.want(t, method+" with "+what, http.StatusUnauthorized, "unauthorized"); !strings.HasPrefix(a.header.Get("WWW-Authenticate"), "Bearer ") {
				t.Errorf("%s: no challenge in %v", what, a.header)
			}
		}
	}
	// What nodes ask is for nodes.
	if a := nobody.with(good).must(t, http.MethodGet, "/node/v1/desired?after=0&wait=0s", nil); a.status != http.StatusForbidden && a.status != http.StatusUnauthorized {
		t.Errorf("a developer was told what a node is: %s", a)
	}
	nobody.must(t, http.MethodGet, "/openapi.json", nil).want(t, "the API's description", http.StatusOK, "")
	nobody.must(t, http.MethodGet, "/metrics", nil).want(t, "metrics on the public port", http.StatusNotFound, "")
}

// resigned is a token of the cluster with other claims, signed by the
// cluster's own key.
func resigned(t *testing.T, token string, change func(claims map[string]any)) string {
	t.Helper()
	parts := strings.Split(token, ".")
	payload, err := base64.RawURLEncoding.DecodeString(parts[1])
	if err != nil {
		t.Fatal(err)
	}
	claims := map[string]any{}
	if err := json.Unmarshal(payload, &claims); err != nil {
		t.Fatal(err)
	}
	change(claims)
	if payload, err = json.Marshal(claims); err != nil {
		t.Fatal(err)
	}
	data, err := os.ReadFile(filepath.Join(bench.Dir(), "pki", "service-account.key"))
	if err != nil {
		t.Fatal(err)
	}
	block, _ := pem.Decode(data)
	if block == nil {
		t.Fatal("the cluster's key is not PEM")
	}
	key, err := x509.ParseECPrivateKey(block.Bytes)
	if err != nil {
		parsed, perr := x509.ParsePKCS8PrivateKey(block.Bytes)
		ec, ok := parsed.(*ecdsa.PrivateKey)
		if !ok {
			t.Fatal(err, perr)
		}
		key = ec
	}
	signed := parts[0] + "." + base64.RawURLEncoding.EncodeToString(payload)
	sum := sha256.Sum256([]byte(signed))
	r, s, err := ecdsa.Sign(rand.Reader, key, sum[:])
	if err != nil {
		t.Fatal(err)
	}
	return signed + "." + base64.RawURLEncoding.EncodeToString(append(r.FillBytes(make([]byte, 32)), s.FillBytes(make([]byte, 32))...))
}

func TestATenantHasRoomForItsQuota(t *testing.T) {
	const over = 4
	tenant := newTeam(t)
	dev := newPerson(t, replicas(t)[0], tokenOf(t, tenant, v1alpha1.Group))
	path := func(n int) string { return fmt.Sprintf("/v1/functions/quota-%d?wait=0s&tenant=%s", n, tenant) }
	put := func(n int, wasm []byte) (a answered, err error) {
		err = bench.WaitFor(t.Context(), "a place", soon, func(ctx context.Context) (bool, error) {
			a, err = dev.do(ctx, http.MethodPut, path(n), wasm, "Content-Type", "application/wasm")
			return err != nil || !a.problem.Retryable, err
		})
		return a, err
	}
	wasm := module(t, "one of many")
	// At once: nobody may slip through between counting and recording.
	var mu sync.Mutex
	var all sync.WaitGroup
	var accepted, refused []int
	for n := range quota + over {
		all.Go(func() {
			a, err := put(n, wasm)
			mu.Lock()
			defer mu.Unlock()
			switch {
			case err == nil && a.status == http.StatusAccepted:
				accepted = append(accepted, n)
			case err == nil && a.status == http.StatusForbidden && a.code() == "quota-exceeded" && strings.Contains(a.problem.Detail, fmt.Sprint("may have ", quota)):
				refused = append(refused, n)
			default:
				t.Errorf("function %d: %s %v", n, a, err)
			}
		})
	}
	all.Wait()
	if len(accepted) != quota || len(refused) != over {
		t.Fatalf("accepted %v, refused %v", accepted, refused)
	}
	for _, c := range []struct {
		what string
		n    int
	}{{"an update", accepted[0]}, {"one more after one was deleted", refused[0]}} {
		if c.n == refused[0] {
			dev.must(t, http.MethodDelete, fmt.Sprint("/v1/functions/quota-", accepted[1]), nil).want(t, "deleting one", http.StatusNoContent, "")
		}
		if a, err := put(c.n, module(t, "another one of many")); err != nil || a.status != http.StatusAccepted {
			t.Errorf("%s: %s %v", c.what, a, err)
		}
	}
	// What is applied has no more room than what is submitted, until there is some.
	hand := newApplier(t, tenant)
	image := dev.must(t, http.MethodGet, fmt.Sprint("/v1/functions/quota-", accepted[0]), nil).function(t).Image
	hand.apply(t, "quota-applied", image)
	hand.refused(t, "quota-applied", "QuotaExceeded", fmt.Sprint("may have ", quota))
	dev.must(t, http.MethodDelete, fmt.Sprint("/v1/functions/quota-", accepted[2]), nil).want(t, "deleting one", http.StatusNoContent, "")
	f := waitObject(t, tenant, "quota-applied", "the applied function to have room", func(f *kube.Function) bool { return f.Status.ActiveRevision == 1 })
	answers(t, f.Status.URL, "another one of many")
	if a, err := put(refused[1], wasm); err != nil || a.code() != "quota-exceeded" {
		t.Errorf("beside the applied one: %s %v", a, err)
	}
}

func TestFiftySubmitsOfTenTenantsAtOnceAreAllServed(t *testing.T) {
	const tenants, each = 10, 5
	pods, roots := replicas(t), authority(t)
	type result struct {
		f    v1alpha1.Function
		text string
		err  error
	}
	results := make(chan result, tenants*each)
	var all sync.WaitGroup
	began := time.Now()
	for n := range tenants {
		tenant := newTeam(t)
		token := tokenOf(t, tenant, v1alpha1.Group)
		c, err := client.New(client.Options{
			URL: apiURL, Transport: overTLS(t, pods[n%len(pods)], roots),
			Token: func(context.Context, string) (string, error) { return token, nil },
		})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(c.Close)
		for m := range each {
			text := fmt.Sprintf("function %d of tenant %d", m, n)
			wasm := module(t, text)
			all.Go(func() {
				f, err := c.Put(t.Context(), fmt.Sprintf("crowd-%d-%d", n, m), client.Source{
					Size: int64(len(wasm)), Module: func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(wasm)), nil },
				}, client.Change{Tenant: tenant, Wait: soon})
				results <- result{f, text, err}
			})
		}
	}
	all.Wait()
	close(results)
	t.Logf("%d submits were answered within %s", tenants*each, time.Since(began).Round(100*time.Millisecond))
	for r := range results {
		if r.err != nil {
			t.Errorf("%s: %v", r.text, r.err)
			continue
		}
		if r.f.Revision != 1 {
			t.Errorf("%s has revision %d", r.text, r.f.Revision)
		}
		answers(t, r.f.URL, r.text)
	}
	if t.Failed() {
		return
	}
	if again := replicas(t); len(again) != len(pods) || again[0].UID != pods[0].UID || restarts(again) != restarts(pods) {
		t.Errorf("a replica did not live through it: %d restarts, before %d", restarts(again), restarts(pods))
	}
}

func restarts(pods []corev1.Pod) (n int32) {
	for _, p := range pods {
		for _, c := range p.Status.ContainerStatuses {
			n += c.RestartCount
		}
	}
	return n
}

// TestAHostThatAnIngressHasStaysThatIngress's: whoever was there first.
func TestAHostThatSomebodyElsesIngressHasIsNotTaken(t *testing.T) {
	const host = "shop.example.test"
	tenant := newTenant(t)
	shop := somebodyElse(t, tenant, host, "the shop")
	answers(t, "http://"+host+"/", "the shop")

	f := submit(t, tenant, "wants-shop", "not the shop", "--host", host)
	answers(t, f.URL, "not the shop") // at its own name
	told := waitObject(t, tenant, "wants-shop", "the function to be told whose its host is", func(f *kube.Function) bool {
		return strings.Contains(readyOf(f).Message, "Ingress "+tenant+"/"+shop)
	})
	if c := readyOf(told); !strings.Contains(c.Message, host) {
		t.Errorf("%+v", c)
	}
	answers(t, "http://"+host+"/", "the shop")

	if err := bench.Client().NetworkingV1().Ingresses(tenant).Delete(t.Context(), shop, metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	answers(t, "http://"+host+"/", "not the shop")
	waitObject(t, tenant, "wants-shop", "the function to be well", func(f *kube.Function) bool {
		c := readyOf(f)
		return c.Status == v1alpha1.ConditionTrue && !strings.Contains(c.Message, host)
	})
}

func readyOf(f *kube.Function) v1alpha1.Condition {
	for _, c := range f.Status.Conditions {
		if c.Type == v1alpha1.ConditionReady {
			return c
		}
	}
	return v1alpha1.Condition{}
}

// somebodyElse serves host with text through an Ingress that is not Hearth's,
// and returns the Ingress's name.
func somebodyElse(t *testing.T, namespace, host, text string) string {
	t.Helper()
	ctx := t.Context()
	const name = "shop"
	listener, err := new(net.ListenConfig).Listen(ctx, "tcp", net.JoinHostPort(bench.HostIP(), "0"))
	if err != nil {
		t.Fatal(err)
	}
	server := &http.Server{ReadHeaderTimeout: 10 * time.Second, Handler: http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { fmt.Fprintln(w, text) })}
	done := make(chan struct{})
	go func() { defer close(done); _ = server.Serve(listener) }()
	t.Cleanup(func() { _ = server.Close(); <-done })
	address, ok := listener.Addr().(*net.TCPAddr)
	if !ok {
		t.Fatal(listener.Addr())
	}
	port, portName, tcp, prefix := int32(address.Port), "http", corev1.ProtocolTCP, networkingv1.PathTypePrefix
	if _, err := bench.Client().CoreV1().Services(namespace).Create(ctx, &corev1.Service{
		ObjectMeta: metav1.ObjectMeta{Name: name},
		Spec:       corev1.ServiceSpec{Ports: []corev1.ServicePort{{Name: portName, Port: port}}},
	}, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	if _, err := bench.Client().DiscoveryV1().EndpointSlices(namespace).Create(ctx, &discoveryv1.EndpointSlice{
		ObjectMeta:  metav1.ObjectMeta{Name: name, Labels: map[string]string{discoveryv1.LabelServiceName: name}},
		AddressType: discoveryv1.AddressTypeIPv4,
		Endpoints:   []discoveryv1.Endpoint{{Addresses: []string{bench.HostIP()}}},
		Ports:       []discoveryv1.EndpointPort{{Name: &portName, Port: &port, Protocol: &tcp}},
	}, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	class := class
	if _, err := bench.Client().NetworkingV1().Ingresses(namespace).Create(ctx, &networkingv1.Ingress{
		ObjectMeta: metav1.ObjectMeta{Name: name},
		Spec: networkingv1.IngressSpec{IngressClassName: &class, Rules: []networkingv1.IngressRule{{
			Host: host, IngressRuleValue: networkingv1.IngressRuleValue{HTTP: &networkingv1.HTTPIngressRuleValue{Paths: []networkingv1.HTTPIngressPath{{
				Path: "/", PathType: &prefix,
				Backend: networkingv1.IngressBackend{Service: &networkingv1.IngressServiceBackend{Name: name, Port: networkingv1.ServiceBackendPort{Name: portName}}},
			}}}},
		}}},
	}, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	return name
}
