package worker

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/hearth-sh/hearth/api/v1alpha1"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func TestMemoryIsReservedOnceAndAccounted(t *testing.T) {
	b := newBudget(3 << 20)
	one := &linearMemory{budget: b, limit: 2 << 20}
	m := one.Allocate(0, 1<<32)
	first := m.Reallocate(1 << 20)
	first[0] = 42
	grown := m.Reallocate(2 << 20)
	if &first[0] != &grown[0] || grown[1<<20] != 0 {
		t.Error("growing moved the memory, or it is not zero")
	}
	if m.Reallocate(2<<20+1) != nil || !one.denied {
		t.Error("grew beyond its limit")
	}
	two := &linearMemory{budget: b, limit: 2 << 20}
	m2 := two.Allocate(0, 1<<32)
	if m2.Reallocate(1<<20) == nil || m2.Reallocate(2<<20) != nil || !two.noRoom {
		t.Error("the budget does not hold")
	}
	_, freed := b.state()
	m.Free()
	m.Free()
	<-freed
	if used, _ := b.state(); used != 1<<20 {
		t.Errorf("%d used", used)
	}
	if m2.Reallocate(2<<20) == nil {
		t.Error("freed memory is not had")
	}
	m2.Free()
	if used, _ := b.state(); used != 0 {
		t.Errorf("%d used", used)
	}
}

func TestMemoryThatCannotStartPanicsWithItsReason(t *testing.T) {
	for name, test := range map[string]struct {
		limit, budget, size uint64
		want                error
	}{
		"over the limit":  {1 << 20, 1 << 30, 2 << 20, errOverLimit},
		"over the budget": {4 << 20, 1 << 20, 2 << 20, errNoRoom},
	} {
		t.Run(name, func(t *testing.T) {
			m := &linearMemory{budget: newBudget(test.budget), limit: test.limit}
			defer m.Free()
			defer func() {
				if err, _ := recover().(error); !errors.Is(err, test.want) {
					t.Errorf("panic with %v, want %v", err, test.want)
				}
			}()
			m.Allocate(0, 1<<32).Reallocate(test.size)
		})
	}
}

func drain(l *logPipe) (lines []v1alpha1.LogLine) {
	for {
		select {
		case line := <-l.queue:
			lines = append(lines, line)
		default:
			return lines
		}
	}
}

func TestStderrBecomesBoundedLines(t *testing.T) {
	pipe := newLogPipe()
	s := &stderrLog{pipe: pipe, line: v1alpha1.LogLine{Function: "f"}}
	for _, part := range []string{"a\nb", "c\r\n", "\xff\n", strings.Repeat("x", MaxLogLine+5), "\nlast"} {
		if n, err := s.Write([]byte(part)); n != len(part) || err != nil {
			t.Errorf("%d %v", n, err)
		}
	}
	s.flush()
	want := []string{"a", "bc", "\uFFFD", strings.Repeat("x", MaxLogLine), "xxxxx", "last"}
	got := drain(pipe)
	if len(got) != len(want) {
		t.Fatalf("%d lines, want %d", len(got), len(want))
	}
	for i := range want {
		if got[i].Line != want[i] || got[i].Stream != streamStderr {
			t.Errorf("line %d: %.40q", i, got[i].Line)
		}
	}
}

func TestStderrOfOneRequestIsBoundedAndSaysSo(t *testing.T) {
	pipe := newLogPipe()
	s := &stderrLog{pipe: pipe}
	line := []byte(strings.Repeat("y", 1023) + "\n")
	for range 2 * MaxLogBytes / len(line) {
		if _, err := s.Write(line); err != nil {
			t.Fatal(err)
		}
	}
	got := drain(pipe)
	if last := got[len(got)-1]; last.Stream != streamSystem || len(got) != MaxLogBytes/len(line)+1 {
		t.Errorf("%d lines, the last %+v", len(got), last)
	}
}

func TestLogPipeDropsInsteadOfBlocking(t *testing.T) {
	pipe := newLogPipe()
	for range logQueue + 10 {
		pipe.send(v1alpha1.LogLine{Line: "z"})
	}
	if pipe.dropped.Load() != 10 {
		t.Errorf("%d dropped", pipe.dropped.Load())
	}
	var out bytes.Buffer
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() { defer close(done); pipe.run(ctx, &out) }()
	for len(pipe.queue) > 0 {
		time.Sleep(time.Millisecond)
	}
	cancel()
	<-done
	if lines := bytes.Count(out.Bytes(), []byte("\n")); lines < logQueue-1 {
		t.Errorf("%d lines", lines)
	}
}

func newTestResponse(method string) (*response, *httptest.ResponseRecorder, *[]*Fault) {
	rec := httptest.NewRecorder()
	var faults []*Fault
	return &response{
		w: rec, rc: http.NewResponseController(rec), head: method == http.MethodHead,
		abort: func(f *Fault) { faults = append(faults, f) },
	}, rec, &faults
}

func TestShortResponsesGoOutWhole(t *testing.T) {
	r, rec, faults := newTestResponse("GET")
	for _, part := range []string{"Content-", "Type: a/b\r", "\nHearth-Fault: x\n\nbo", "dy"} {
		if _, err := r.Write([]byte(part)); err != nil {
			t.Fatal(err)
		}
	}
	fault, cut := r.finish(nil)
	if fault != nil || cut || len(*faults) != 0 {
		t.Errorf("%v %v %v", fault, cut, *faults)
	}
	if rec.Code != 200 || rec.Body.String() != "body" || rec.Header().Get("Content-Length") != "4" || rec.Header().Get(HeaderFault) != "" {
		t.Errorf("%d %q %v", rec.Code, rec.Body, rec.Header())
	}
}

func TestFailureBeforeTheAnswerIsOutBecomesTheAnswer(t *testing.T) {
	r, rec, _ := newTestResponse("GET")
	if _, err := r.Write([]byte("Status: 200\n\nhalf of it")); err != nil {
		t.Fatal(err)
	}
	_, cut := r.finish(&Fault{Status: 502, Code: FaultTrap, Detail: "trapped"})
	var f Fault
	if err := json.Unmarshal(rec.Body.Bytes(), &f); err != nil || cut || rec.Code != 502 || f.Code != FaultTrap || rec.Header().Get(HeaderFault) != FaultTrap {
		t.Errorf("%d %s %v", rec.Code, rec.Body, err)
	}
	if _, err := r.Write([]byte("late")); err == nil {
		t.Error("writing after the end")
	}
}

func TestFailureAfterTheAnswerBeganCutsIt(t *testing.T) {
	r, rec, _ := newTestResponse("GET")
	if _, err := r.Write([]byte("Status: 200\n\n" + strings.Repeat("x", holdBytes+1))); err != nil {
		t.Fatal(err)
	}
	if _, cut := r.finish(&Fault{Status: 502, Code: FaultTrap}); !cut || rec.Code != 200 {
		t.Errorf("%v %d", cut, rec.Code)
	}
}

func TestEndlessOutputAbortsTheGuest(t *testing.T) {
	for name, test := range map[string]struct{ first, rest, code string }{
		"header": {"X: ", strings.Repeat("y", 1000), FaultOutput},
		"body":   {"Status: 200\n\n", strings.Repeat("y", 64<<10), FaultTooLarge},
	} {
		t.Run(name, func(t *testing.T) {
			r, _, faults := newTestResponse("GET")
			_, err := r.Write([]byte(test.first))
			for err == nil {
				_, err = r.Write([]byte(test.rest))
			}
			r.finish((*faults)[0])
			if len(*faults) != 1 || (*faults)[0].Code != test.code {
				t.Errorf("%+v", *faults)
			}
		})
	}
}
