package bootstrap_test

import (
	"bytes"
	"context"
	"encoding/xml"
	"fmt"
	"io"
	"net/http"
	"net/http/httputil"
	"net/url"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/hearth-sh/hearth/internal/bootstrap/sigv4test"
	"github.com/hearth-sh/hearth/internal/imds/imdstest"
	"github.com/hearth-sh/hearth/test/machine"
)

// vault is S3 for those who have the role's credentials, which moto does not
// look at.
type vault struct {
	moto  *httputil.ReverseProxy
	role  sigv4test.Credentials
	mu    sync.Mutex
	asked []string // method and path of what was let through
	wrong []error
}

func (v *vault) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	body, err := io.ReadAll(r.Body)
	if err == nil {
		err = sigv4test.Verify(r, body, v.role, "eu-central-1", "s3")
	}
	v.mu.Lock()
	if err != nil {
		v.wrong = append(v.wrong, fmt.Errorf("%s %s: %w", r.Method, r.URL, err))
	} else {
		v.asked = append(v.asked, r.Method+" "+r.URL.Path)
	}
	v.mu.Unlock()
	if err != nil {
		w.WriteHeader(http.StatusForbidden)
		return
	}
	r.Body = io.NopCloser(bytes.NewReader(body))
	v.moto.ServeHTTP(w, r)
}

// keys are the names of a bucket's objects.
func (l *lab) keys(t *testing.T, bucket string) []string {
	t.Helper()
	var list struct {
		Contents []struct{ Key string }
	}
	if err := xml.Unmarshal(l.object(t, bucket, "?list-type=2"), &list); err != nil {
		t.Fatal(err)
	}
	var keys []string
	for _, object := range list.Contents {
		keys = append(keys, object.Key)
	}
	return keys
}

// TestAClusterComesBackFromASnapshotInS3 has the only server of a cluster write
// snapshots to S3 on its schedule, with nothing but the instance's role, and
// loses it with its disk. Another one is told a snapshot's name.
func TestAClusterComesBackFromASnapshotInS3(t *testing.T) {
	t.Parallel()
	l := newLab(t, "snapshots")
	const bucket, folder = "hearth-backups", "production"
	if err := l.put(t.Context(), bucket, "", nil); err != nil {
		t.Fatal(err)
	}
	// Of a server of long ago; the newest two of all are to be kept.
	for _, at := range []string{"1700000000", "1700000001"} {
		if err := l.put(t.Context(), bucket, folder+"/etcd-snapshot-i-0aaaaaaaaaaaaaaaa-"+at, []byte("old")); err != nil {
			t.Fatal(err)
		}
	}
	target, err := url.Parse(l.aws)
	if err != nil {
		t.Fatal(err)
	}
	v := &vault{moto: httputil.NewSingleHostReverseProxy(target), role: sigv4test.Credentials{AccessKeyID: "ASIASNAPSHOTS0000000", SecretAccessKey: "of-snapshots", SessionToken: "session-of-snapshots"}}
	endpoint := strings.TrimPrefix(l.serve(v), "http://")
	spec := machine.Spec{Configure: func(c *imdstest.Config) {
		c.Credentials.AccessKeyID, c.Credentials.SecretAccessKey, c.Credentials.SessionToken = v.role.AccessKeyID, v.role.SecretAccessKey, v.role.SessionToken
	}}
	// The schedule is the shortest there is.
	userData := func(restore string) string {
		config := strings.Replace(l.userData("control-plane", ""), "      store:",
			fmt.Sprintf("      snapshots: {bucket: s3://%s/%s, schedule: '* * * * *', retention: 2}\n%s        store:", bucket, folder, restore), 1)
		config = strings.Replace(config, "kubelet-arg:", fmt.Sprintf("etcd-s3-endpoint: %s\n          etcd-s3-insecure: true\n          kubelet-arg:", endpoint), 1)
		if !strings.Contains(config, "snapshots:") || !strings.Contains(config, "etcd-s3-insecure") {
			t.Fatalf("the user-data has no place for it:\n%s", config)
		}
		return config
	}
	old := l.add("old", userData(""), spec)
	l.boot(old)
	l.succeeded(old)
	remember := func(server *machine.Machine, name string) {
		t.Helper()
		if _, err := client(t, server).CoreV1().ConfigMaps("default").Create(t.Context(), &corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Name: name}}, metav1.CreateOptions{}); err != nil {
			t.Fatal(err)
		}
	}
	remember(old, "before")
	written := time.Now()
	prefix := folder + "/etcd-snapshot-" + old.InstanceID + "-"
	newest := func() (at int64) {
		for _, key := range l.keys(t, bucket) {
			if taken, err := strconv.ParseInt(strings.TrimPrefix(key, prefix), 10, 64); err == nil {
				at = max(at, taken)
			}
		}
		return at
	}
	waitFor(t, old, "a snapshot in the bucket that was taken later", func(context.Context) (bool, error) { return newest() > written.Unix(), nil })
	t.Logf("a snapshot is in the bucket %s after what it has was written", time.Since(written).Round(time.Second))
	waitFor(t, old, "two snapshots to be kept", func(context.Context) (bool, error) { return len(l.keys(t, bucket)) == 2, nil })
	if err := old.Remove(t.Context()); err != nil {
		t.Fatal(err)
	}
	// By now there may be another one, in the place of the first.
	snapshot := fmt.Sprintf("%s%d", strings.TrimPrefix(prefix, folder+"/"), newest())

	fresh := l.add("fresh", userData(fmt.Sprintf("        restore: {generation: 1, snapshot: %s}\n", snapshot)), spec)
	l.boot(fresh)
	r := l.succeeded(fresh)
	t.Logf("the restored server is a node: %s", phases(r))
	if r.Node.Action != "found" || r.Node.Generation != 2 {
		t.Errorf("it became %+v", r.Node)
	}
	if _, err := client(t, fresh).CoreV1().ConfigMaps("default").Get(t.Context(), "before", metav1.GetOptions{}); err != nil {
		t.Error(err)
	}
	etcdMembers(t, fresh, 1)
	// And it has snapshots of its own.
	if out, err := fresh.Exec(t.Context(), "k3s", "etcd-snapshot", "save", "--name=by-hand"); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	listed, err := fresh.Exec(t.Context(), "k3s", "etcd-snapshot", "ls")
	if want := "s3://" + bucket + "/" + folder + "/by-hand-" + fresh.InstanceID + "-"; err != nil || !strings.Contains(listed, want) {
		t.Errorf("there is no %s: %v\n%s", want, err, listed)
	}
	v.mu.Lock()
	defer v.mu.Unlock()
	for _, err := range v.wrong {
		t.Error(err)
	}
	t.Logf("S3 was asked for %q", v.asked)
}
