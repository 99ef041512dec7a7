package bootstrap_test

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"os"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/hearth-sh/hearth/test/machine"
)

// tests are the package's, and the end of the world.
type tests struct{ *testing.M }

func (t tests) Run() int {
	code := t.M.Run()
	theWorld.Lock()
	defer theWorld.Unlock()
	if theWorld.world == nil {
		return code
	}
	if err := theWorld.close(); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return max(code, 1)
	}
	return code
}

func TestMain(m *testing.M) { goleak.VerifyTestMain(tests{m}) }

// soaked is what a test does in `make soak`, where there is time, and usual
// elsewhere.
func soaked[T any](usual, soak T) T {
	if os.Getenv("HEARTH_SOAK") != "" {
		return soak
	}
	return usual
}

// object reads an object of S3; nil if there is none.
func (l *lab) object(t *testing.T, bucket, key string) []byte {
	t.Helper()
	request, err := http.NewRequestWithContext(t.Context(), http.MethodGet, l.aws+"/"+bucket+"/"+key, nil)
	if err != nil {
		t.Fatal(err)
	}
	request.Header.Set("Authorization", "AWS4-HMAC-SHA256 Credential=test/20260101/eu-central-1/s3/aws4_request, SignedHeaders=host, Signature=0")
	response, err := http.DefaultClient.Do(request)
	if err != nil {
		t.Fatal(err)
	}
	defer response.Body.Close()
	body, err := io.ReadAll(response.Body)
	switch {
	case err != nil:
		t.Fatal(err)
	case response.StatusCode == http.StatusNotFound:
		return nil
	case response.StatusCode != http.StatusOK:
		t.Fatalf("get s3://%s/%s: %s: %s", bucket, key, response.Status, body)
	}
	return body
}

// maxGenerations is more than any test makes.
const maxGenerations = 100

// outcomes are how the election's generations ended, from the first on; the
// last may be "" for one that is not decided.
func (l *lab) outcomes(t *testing.T) []string {
	t.Helper()
	var all []string
	for n := 1; n < maxGenerations; n++ {
		base := fmt.Sprintf("%s/generation/%d/", l.name, n)
		if l.object(t, stateBucket, base+"holder") == nil {
			break
		}
		var record struct {
			Outcome string `json:"outcome"`
		}
		if b := l.object(t, stateBucket, base+"outcome"); b != nil {
			if err := json.Unmarshal(b, &record); err != nil {
				t.Fatalf("outcome of generation %d: %v", n, err)
			}
		}
		all = append(all, record.Outcome)
	}
	return all
}

// waitFor waits on a machine within soon.
func waitFor(t *testing.T, m *machine.Machine, what string, so func(context.Context) (bool, error)) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), soon)
	defer cancel()
	if err := m.WaitFor(ctx, what, so); err != nil {
		t.Fatal(err)
	}
}

// boundedBy ends a test that hangs with a message of its own.
func boundedBy(t *testing.T, d time.Duration) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), d)
	t.Cleanup(cancel)
	return ctx
}
