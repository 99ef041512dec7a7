package wasm_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"sort"
	"strconv"
	"strings"
	"sync"
	"testing"

	"github.com/tetratelabs/wazero"
	"github.com/tetratelabs/wazero/api"
	"github.com/tetratelabs/wazero/experimental"

	"github.com/hearth-sh/hearth/internal/wasm"
	"github.com/hearth-sh/hearth/test/needs"
)

// The WebAssembly spec testsuite, as wast2json of wabt translates it, ships
// inside the wazero module. The runner below reads the JSON scripts (format:
// wabt, docs/wast2json.md) and runs every module through Lower first.

var spectestDir = sync.OnceValues(func() (string, error) {
	out, err := exec.Command("go", "list", "-m", "-f", "{{.Dir}}", "github.com/tetratelabs/wazero").Output()
	if err != nil {
		return "", fmt.Errorf("find the wazero module: %w", err)
	}
	return filepath.Join(strings.TrimSpace(string(out)), "internal", "integration_test", "spectest"), nil
})

type specScript struct {
	Commands []specCommand `json:"commands"`
}

type specCommand struct {
	Type       string      `json:"type"`
	Line       int         `json:"line"`
	Name       string      `json:"name"`
	As         string      `json:"as"`
	Filename   string      `json:"filename"`
	ModuleType string      `json:"module_type"`
	Text       string      `json:"text"`
	Action     specAction  `json:"action"`
	Expected   []specValue `json:"expected"`
}

type specAction struct {
	Type   string      `json:"type"`
	Module string      `json:"module"`
	Field  string      `json:"field"`
	Args   []specValue `json:"args"`
}

type specValue struct {
	Type     string          `json:"type"`
	LaneType string          `json:"lane_type"`
	Value    json.RawMessage `json:"value"`
}

// lanes returns the value's scalars and the bit width of each.
func (v specValue) lanes() ([]string, int) {
	if v.Type == "v128" {
		var lanes []string
		if json.Unmarshal(v.Value, &lanes) != nil {
			return nil, 0
		}
		return lanes, map[string]int{"i8": 8, "i16": 16, "i32": 32, "f32": 32, "i64": 64, "f64": 64}[v.LaneType]
	}
	var s string
	if len(v.Value) > 0 && json.Unmarshal(v.Value, &s) != nil {
		return nil, 0
	}
	if strings.HasSuffix(v.Type, "32") {
		return []string{s}, 32
	}
	return []string{s}, 64
}

func (v specValue) slots() int {
	if v.Type == "v128" {
		return 2
	}
	return 1
}

func parseBits(s string) (uint64, error) {
	if strings.HasPrefix(s, "-") {
		n, err := strconv.ParseInt(s, 10, 64)
		return uint64(n), err
	}
	return strconv.ParseUint(s, 10, 64)
}

// encode returns the value as wazero passes it.
func (v specValue) encode() ([]uint64, error) {
	if v.Type == "externref" || v.Type == "funcref" {
		lanes, _ := v.lanes()
		if len(lanes) != 1 || lanes[0] == "null" || lanes[0] == "" {
			return []uint64{0}, nil
		}
		n, err := parseBits(lanes[0])
		return []uint64{n + 1}, err // 0 is null in wazero
	}
	lanes, width := v.lanes()
	out := make([]uint64, v.slots())
	for i, lane := range lanes {
		n, err := parseBits(lane)
		if err != nil {
			return nil, err
		}
		if width < 64 {
			n &= 1<<width - 1
		}
		out[i*width/64] |= n << (i * width % 64)
	}
	return out, nil
}

// matches compares a result with what the script expects, NaN patterns
// included.
func (v specValue) matches(got []uint64) bool {
	if v.Type == "externref" || v.Type == "funcref" {
		if len(v.Value) == 0 {
			return true // any reference
		}
		want, err := v.encode()
		return err == nil && want[0] == got[0]
	}
	lanes, width := v.lanes()
	if width == 0 {
		return false
	}
	for i, lane := range lanes {
		bits := got[i*width/64] >> (i * width % 64)
		if width < 64 {
			bits &= 1<<width - 1
		}
		switch lane {
		case "nan:canonical":
			if width == 32 && bits&0x7fffffff != 0x7fc00000 || width == 64 && bits&math.MaxInt64 != 0x7ff8000000000000 {
				return false
			}
		case "nan:arithmetic":
			if width == 32 && bits&0x7fc00000 != 0x7fc00000 || width == 64 && bits&0x7ff8000000000000 != 0x7ff8000000000000 {
				return false
			}
		default:
			want, err := parseBits(lane)
			if err != nil {
				return false
			}
			if width < 64 {
				want &= 1<<width - 1
			}
			if bits != want {
				return false
			}
		}
	}
	return true
}

// trapText maps the spec's words for a trap to wazero's.
func trapText(text string) string {
	switch {
	case text == "out of bounds memory access":
		return "out of bounds memory access"
	case text == "indirect call type mismatch" || text == "indirect call":
		return "indirect call type mismatch"
	case text == "undefined element", text == "undefined", text == "out of bounds table access", strings.HasPrefix(text, "uninitialized"):
		return "invalid table access"
	default:
		return text
	}
}

type specRunner struct {
	dir        string
	transform  func([]byte) ([]byte, error)
	runtime    wazero.Runtime
	ctx        context.Context
	last       api.Module
	modules    map[string]api.Module
	registered map[string]api.Module
}

func (s *specRunner) instantiate(file string) (api.Module, error) {
	b, err := os.ReadFile(filepath.Join(s.dir, file))
	if err != nil {
		return nil, err
	}
	return s.instantiateBytes(b)
}

func (s *specRunner) instantiateBytes(b []byte) (api.Module, error) {
	b, err := s.transform(b)
	if err != nil {
		return nil, err
	}
	m, err := s.runtime.InstantiateWithConfig(s.ctx, b, wazero.NewModuleConfig().WithName("").WithStartFunctions())
	if err != nil {
		return nil, err
	}
	if start := m.ExportedFunction(wasm.ExportStart); start != nil {
		if _, err := start.Call(s.ctx); err != nil {
			return m, err
		}
	}
	return m, nil
}

var errNotRun = errors.New("not run: text format")

func (s *specRunner) run(c *specCommand) error {
	switch c.Type {
	case "module":
		m, err := s.instantiate(c.Filename)
		s.last = m
		if c.Name != "" {
			s.modules[c.Name] = m
		}
		return err
	case "register":
		m := s.last
		if c.Name != "" {
			m = s.modules[c.Name]
		}
		s.registered[c.As] = m
		return nil
	case "action", "assert_return":
		got, err := s.act(c.Action)
		if err != nil {
			return err
		}
		for i, want := range c.Expected {
			n := want.slots()
			if len(got) < n {
				return fmt.Errorf("result %d is missing", i)
			}
			if !want.matches(got[:n]) {
				return fmt.Errorf("result %d: got %#x, want %s %s", i, got[:n], want.Type, want.Value)
			}
			got = got[n:]
		}
		return nil
	case "assert_trap", "assert_exhaustion":
		_, err := s.act(c.Action)
		want := trapText(c.Text)
		if c.Type == "assert_exhaustion" {
			want = "stack overflow"
		}
		if err == nil || !strings.Contains(err.Error(), want) {
			return fmt.Errorf("got %v, want the trap %q", err, want)
		}
		return nil
	case "assert_invalid", "assert_malformed", "assert_unlinkable", "assert_uninstantiable":
		if c.ModuleType == "text" {
			return errNotRun
		}
		_, err := s.instantiate(c.Filename)
		if err == nil {
			return errors.New("accepted")
		}
		if c.Type == "assert_uninstantiable" && c.Text == "unreachable" && !strings.Contains(err.Error(), "unreachable") {
			return err // refused for something else than its start function
		}
		return nil
	}
	return fmt.Errorf("unknown command %q", c.Type)
}

func (s *specRunner) act(a specAction) ([]uint64, error) {
	m := s.last
	if a.Module != "" {
		m = s.modules[a.Module]
	}
	if m == nil {
		return nil, errors.New("no module")
	}
	switch a.Type {
	case "invoke":
		var args []uint64
		for _, v := range a.Args {
			bits, err := v.encode()
			if err != nil {
				return nil, err
			}
			args = append(args, bits...)
		}
		f := m.ExportedFunction(a.Field)
		if f == nil {
			return nil, fmt.Errorf("no function %q", a.Field)
		}
		return f.Call(s.ctx, args...)
	case "get":
		g := m.ExportedGlobal(a.Field)
		if g == nil {
			return nil, fmt.Errorf("no global %q", a.Field)
		}
		return []uint64{g.Get(), 0}, nil
	}
	return nil, fmt.Errorf("unknown action %q", a.Type)
}

// runSpecFile returns the failures by command index, and how many commands ran.
func runSpecFile(t *testing.T, root, version, name string, transform func([]byte) ([]byte, error)) (map[int]error, []specCommand, int) {
	t.Helper()
	dir := filepath.Join(root, version, "testdata")
	raw, err := os.ReadFile(filepath.Join(dir, name+".json"))
	if err != nil {
		t.Fatal(err)
	}
	var script specScript
	if err := json.Unmarshal(raw, &script); err != nil {
		t.Fatal(err)
	}
	s := &specRunner{dir: dir, transform: transform, modules: map[string]api.Module{}, registered: map[string]api.Module{}}
	s.ctx = experimental.WithImportResolver(t.Context(), func(name string) api.Module {
		return s.registered[name]
	})
	// The suite of WebAssembly 1.0 runs with 2.0 as well: the few modules that
	// 1.0 refused and 2.0 accepts fail without lowering just the same.
	s.runtime = wazero.NewRuntimeWithConfig(s.ctx, wazero.NewRuntimeConfigCompiler().WithCoreFeatures(api.CoreFeaturesV2))
	defer func() {
		if err := s.runtime.Close(s.ctx); err != nil {
			t.Error(err)
		}
	}()
	spectest, err := os.ReadFile(filepath.Join(root, "testdata", "spectest.wasm"))
	if err != nil {
		t.Fatal(err)
	}
	if s.registered["spectest"], err = s.instantiateBytes(spectest); err != nil {
		t.Fatal(err)
	}
	failures := map[int]error{}
	ran := 0
	for i := range script.Commands {
		err := s.run(&script.Commands[i])
		if errors.Is(err, errNotRun) {
			continue
		}
		ran++
		if err != nil {
			failures[i] = err
		}
	}
	return failures, script.Commands, ran
}

func lowerWith(o wasm.LowerOptions) func([]byte) ([]byte, error) {
	return func(b []byte) ([]byte, error) {
		l, err := wasm.Lower(b, o)
		if err != nil {
			return nil, err
		}
		return l.Bytes, nil
	}
}

// specLimits are wide enough for the suite, which has tables of up to 2^32
// entries as a maximum.
func specLimits() wasm.Limits {
	l := wasm.DefaultLimits()
	l.TableEntries = 1 << 27
	return l
}

// onOneGoroutine leaves a test to the run without the race detector, which
// `make test` has as well: there is nothing to race with, and it takes eight
// times as long.
func onOneGoroutine(t *testing.T) {
	t.Helper()
	if raceDetector {
		t.Skip("computes on one goroutine; runs without the race detector")
	}
}

func TestSpecSuiteBehavesTheSameLowered(t *testing.T) {
	onOneGoroutine(t)
	root, err := spectestDir()
	if err != nil {
		needs.Missing(t, "%v", err)
	}
	modes := []struct {
		name string
		o    wasm.LowerOptions
	}{
		{"remainder", wasm.LowerOptions{Limits: specLimits(), MaxTableEntries: math.MaxUint32, InterruptChecks: true, RemainderByDivision: true, RefillFuel: wasm.MinRefillFuel}},
		{"checks", wasm.LowerOptions{Limits: specLimits(), MaxTableEntries: math.MaxUint32, InterruptChecks: true}},
		{"plain", wasm.LowerOptions{Limits: specLimits(), MaxTableEntries: math.MaxUint32}},
	}
	if testing.Short() {
		modes = modes[:1]
	}
	for _, mode := range modes {
		t.Run(mode.name, func(t *testing.T) {
			total, same := 0, 0
			for _, version := range []string{"v1", "v2"} {
				files, err := filepath.Glob(filepath.Join(root, version, "testdata", "*.json"))
				if err != nil {
					t.Fatal(err)
				}
				sort.Strings(files)
				for _, file := range files {
					name := strings.TrimSuffix(filepath.Base(file), ".json")
					if testing.Short() && runtime.GOARCH != "amd64" && version == "v1" {
						continue // an emulator: version 2 includes nearly all of it
					}
					failures, commands, ran := runSpecFile(t, root, version, name, lowerWith(mode.o))
					total += ran
					if len(failures) == 0 {
						continue
					}
					// What fails without lowering as well is the engine's.
					unlowered, _, _ := runSpecFile(t, root, version, name, func(b []byte) ([]byte, error) { return b, nil })
					for i, err := range failures {
						if unlowered[i] != nil {
							same++
							t.Logf("%s/%s:%d %s fails without lowering too: %v; lowered: %v", version, name, commands[i].Line, commands[i].Type, unlowered[i], err)
							continue
						}
						t.Errorf("%s/%s:%d %s %s: %v", version, name, commands[i].Line, commands[i].Type, commands[i].Filename, err)
					}
				}
			}
			t.Logf("%d commands run, %d deviations of the engine itself", total, same)
			if total == 0 {
				t.Error("no command was run")
			}
		})
	}
}
