package shim_test

import (
	"context"
	"strings"
	"testing"
	"time"

	"github.com/hearth-sh/hearth/internal/shim"
	"github.com/hearth-sh/hearth/internal/shim/shimtest"
)

func TestProveDecidesWithoutRunning(t *testing.T) {
	fake := shimtest.NewFake()
	usable := fake.Runtime("good", shimtest.Working)
	cases := []struct {
		behaviour string
		change    func(*shim.Runtime)
		code      shim.Code
		says      string
	}{
		{"a runtime without a probe", func(r *shim.Runtime) { r.Kind = shim.KindUnproven }, shim.CodeNoProbe, "never called proven"},
		{"a shim without a handler", func(r *shim.Runtime) { r.Handler = "" }, shim.CodeNoHandler, "no runtime handler"},
		{"a shim that is too old", func(r *shim.Runtime) { r.TooOld, r.Version = true, "0.14.1" }, shim.CodeVersionTooOld, "0.14.1 is too old"},
	}
	for _, tc := range cases {
		t.Run(tc.behaviour, func(t *testing.T) {
			runtime := usable
			tc.change(&runtime)
			proof := shim.NewProver(fake, shim.ProverOptions{}).Prove(t.Context(), runtime)
			if proof.Code != tc.code || proof.OK || !strings.Contains(proof.Message, tc.says) {
				t.Errorf("%s: %s", proof.Code, proof.Message)
			}
		})
	}
	if n := fake.Runs("good"); n != 0 {
		t.Errorf("ran %d times", n)
	}
}

// Whether the shim is there is containerd's to say: where it looks may not be
// known to us, as in a pod that cannot read its environment.
func TestProveAsksContainerdForAShimThatWasNotSeen(t *testing.T) {
	fake := shimtest.NewFake()
	for does, code := range map[shimtest.Behaviour]shim.Code{shimtest.Working: shim.CodeOK, shimtest.Missing: shim.CodeNotFound} {
		runtime := fake.Runtime("r", does)
		runtime.Binary, runtime.Problems = "", []string{"install it"}
		if proof := shim.NewProver(fake, shim.ProverOptions{}).Prove(t.Context(), runtime); proof.Code != code {
			t.Errorf("%s: %s, want %s", proof.Code, proof.Message, code)
		}
	}
}

func TestProveJudgesOutput(t *testing.T) {
	fake := shimtest.NewFake()
	cases := []struct {
		behaviour string
		does      shimtest.Behaviour
		code      shim.Code
		says      string
	}{
		{"an echo of the question is no answer", shimtest.Echoing, shim.CodeWrongOutput, "ran nothing"},
		{"a failed probe repeats its last words", shimtest.Exiting, shim.CodeExited, `status 1 instead of 0: "out of luck"`},
		{"a task that does not start", shimtest.Unstartable, shim.CodeStartFailed, "not today"},
	}
	for _, tc := range cases {
		t.Run(tc.behaviour, func(t *testing.T) {
			proof := shim.NewProver(fake, shim.ProverOptions{}).Prove(t.Context(), fake.Runtime("r", tc.does))
			if proof.Code != tc.code || !strings.Contains(proof.Message, tc.says) {
				t.Errorf("%s: %s", proof.Code, proof.Message)
			}
		})
	}
}

// failingNode fails as told.
type failingNode struct {
	shim.Node
	run    func(ctx context.Context) error
	server error
}

func (n failingNode) Server(context.Context) (shim.Server, error) { return shim.Server{}, n.server }
func (n failingNode) Run(ctx context.Context, _ shim.Runtime, _ string) (shim.Output, error) {
	return shim.Output{}, n.run(ctx)
}

func TestProveBlamesTheRightParty(t *testing.T) {
	late := func(stage shim.Stage) func(context.Context) error {
		return func(ctx context.Context) error {
			<-ctx.Done()
			return &shim.RunError{Stage: stage, Err: ctx.Err()}
		}
	}
	cases := []struct {
		behaviour string
		node      failingNode
		code      shim.Code
	}{
		{"late in the shim while containerd answers", failingNode{run: late(shim.StageCreate)}, shim.CodeTimeout},
		{"late while containerd does not answer either", failingNode{run: late(shim.StageCreate), server: shim.ErrUnreachable}, shim.CodeUnreachable},
		{"late before its turn came", failingNode{run: late(shim.StagePrepare)}, shim.CodeInternal},
		{"our own side failed", failingNode{run: func(context.Context) error {
			return &shim.RunError{Stage: shim.StagePrepare, Err: context.Canceled}
		}}, shim.CodeInternal},
	}
	for _, tc := range cases {
		t.Run(tc.behaviour, func(t *testing.T) {
			runtime := shim.Runtime{Name: "r", Kind: shim.KindCommand, Handler: "r", Binary: "/r"}
			proof := shim.NewProver(tc.node, shim.ProverOptions{Deadline: 10 * time.Millisecond}).Prove(t.Context(), runtime)
			if proof.Code != tc.code {
				t.Errorf("%s: %s, want %s", proof.Code, proof.Message, tc.code)
			}
		})
	}
}
