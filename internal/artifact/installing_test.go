package artifact

import (
	"context"
	"errors"
	"os"
	"sync/atomic"
	"testing"
)

func TestInstallingIsToldOfWhatIsNotThereAndMayRefuse(t *testing.T) {
	content, other := randomBytes(1<<10, 1), randomBytes(1<<10, 2)
	refused := errors.New("no")
	for _, c := range []struct {
		name    string
		there   []byte
		mode    os.FileMode
		answer  error
		told    int64
		outcome Outcome
	}{
		{"nothing is there", nil, 0, nil, 1, OutcomeInstalled},
		{"another file is there", other, 0o755, nil, 1, OutcomeReplaced},
		{"it is there", content, 0o755, nil, 0, OutcomePresent},
		{"it is there with another mode", content, 0o600, nil, 0, OutcomeRepaired},
		{"another file is there and must stay", other, 0o755, refused, 1, OutcomeFailed},
		{"it is there and would be refused", content, 0o755, refused, 0, OutcomePresent},
	} {
		t.Run(c.name, func(t *testing.T) {
			a := artifactOf(t.TempDir(), content, newMirror(t, content).URL+"/k3s")
			if c.there != nil {
				if err := os.WriteFile(a.Path, c.there, c.mode); err != nil {
					t.Fatal(err)
				}
			}
			var told atomic.Int64
			f := newFetcher(t, func(o *Options) {
				o.Installing = func(_ context.Context, which Artifact) error {
					told.Add(1)
					if got, _ := os.ReadFile(which.Path); string(got) != string(c.there) {
						t.Error("it was told too late")
					}
					return c.answer
				}
			})
			r, err := fetchOne(t, f, a)
			if r.Outcome != c.outcome || told.Load() != c.told || (c.outcome == OutcomeFailed) != errors.Is(err, refused) {
				t.Errorf("%s, %v, told %d times; want %s and %d", r.Outcome, err, told.Load(), c.outcome, c.told)
			}
			want := content
			if c.outcome == OutcomeFailed {
				want = other
			}
			wantInstalled(t, a, want)
		})
	}
}
