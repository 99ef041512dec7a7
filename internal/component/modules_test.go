package component

import (
	"bytes"
	"encoding/binary"
	"errors"
	"io"
	"strings"
	"testing"

	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const (
	corePreamble      = "\x00asm\x01\x00\x00\x00"
	componentPreamble = "\x00asm\x0d\x00\x01\x00"
)

// section encodes one section.
func section(id byte, body string) string {
	return string(binary.AppendUvarint([]byte{id}, uint64(len(body)))) + body
}

func comp(sections ...string) string { return componentPreamble + strings.Join(sections, "") }

func TestCoreModulesAreFoundAtEveryLevelInOrder(t *testing.T) {
	a := corePreamble + "\x00\x02\x01a"
	b := corePreamble + "\x00\x02\x01b"
	c := corePreamble
	big := corePreamble + section(0, "\x01x"+strings.Repeat("y", 300))
	in := comp(
		section(0, "\x04name"),
		section(1, a),
		section(7, "\x00"),
		section(4, comp(section(4, comp(section(1, b))), section(1, big))),
		section(1, c),
	)
	got, err := CoreModules(strings.NewReader(in), int64(len(in)))
	if err != nil {
		t.Fatal(err)
	}
	want := []string{a, b, big, c}
	depths := []int{1, 3, 2, 1}
	if len(got) != len(want) {
		t.Fatalf("%d modules, want %d", len(got), len(want))
	}
	for i, s := range got {
		if in[s.Offset:s.Offset+s.Size] != want[i] || s.Depth != depths[i] {
			t.Errorf("module %d: %+v", i, s)
		}
	}
}

func TestComponentsThatAreRefused(t *testing.T) {
	deep := func(n int) string {
		c := comp()
		for range n - 1 {
			c = comp(section(4, c))
		}
		return c
	}
	for _, tt := range []struct {
		name, in string
		want     error // nil: accepted
	}{
		{"an empty component has no modules", comp(), nil},
		{"nesting at the limit", deep(MaxDepth), nil},
		{"nesting beyond the limit", deep(MaxDepth + 1), ErrLimit},
		{"modules at the limit", comp(strings.Repeat(section(1, corePreamble), MaxModules)), nil},
		{"modules beyond the limit", comp(strings.Repeat(section(1, corePreamble), MaxModules+1)), ErrLimit},
		{"sections beyond the limit", comp(strings.Repeat(section(0, ""), MaxSections+1)), ErrLimit},
		{"nothing", "", ErrNotComponent},
		{"half a preamble", componentPreamble[:6], ErrNotComponent},
		{"a core module", corePreamble, ErrNotComponent},
		{"another version of the format", "\x00asm\x0e\x00\x01\x00", ErrNotComponent},
		{"a section without length", comp("\x01"), ErrMalformed},
		{"a length that never ends", comp("\x00\xff\xff\xff\xff\xff\x00"), ErrMalformed},
		{"a length beyond 32 bits", comp("\x00\xff\xff\xff\xff\x7f"), ErrMalformed},
		{"a section beyond the end", comp("\x00\x05abc"), ErrMalformed},
		{"a nested section beyond its component", comp(section(4, comp("\x00\x05abc")), section(0, "abcdef")), ErrMalformed},
		{"an unknown section", comp(section(13, "")), ErrMalformed},
		{"a module section without a module", comp(section(1, "garbage!")), ErrMalformed},
		{"a module section with a component", comp(section(1, comp())), ErrMalformed},
		{"a component section with a module", comp(section(4, corePreamble)), ErrMalformed},
		{"a module section that is too short", comp(section(1, "\x00asm")), ErrMalformed},
	} {
		t.Run(tt.name, func(t *testing.T) {
			if _, err := CoreModules(strings.NewReader(tt.in), int64(len(tt.in))); !errors.Is(err, tt.want) {
				t.Errorf("got %v, want %v", err, tt.want)
			}
		})
	}
	t.Run("shorter than its size", func(t *testing.T) {
		in := comp(section(1, corePreamble))
		if _, err := CoreModules(strings.NewReader(in[:12]), int64(len(in))); !errors.Is(err, ErrMalformed) {
			t.Errorf("got %v", err)
		}
	})
	t.Run("an error of the reader stays itself", func(t *testing.T) {
		if _, err := CoreModules(brokenReader{}, 100); !errors.Is(err, io.ErrClosedPipe) || errors.Is(err, ErrMalformed) {
			t.Errorf("got %v", err)
		}
	})
}

type brokenReader struct{}

func (brokenReader) ReadAt([]byte, int64) (int, error) { return 0, io.ErrClosedPipe }

func FuzzCoreModules(f *testing.F) {
	f.Add([]byte(comp(section(1, corePreamble), section(4, comp(section(1, corePreamble+"\x00\x01\x00"))))))
	f.Add([]byte(comp("\x00\xff\xff\xff\xff\x0f")))
	f.Add([]byte(corePreamble))
	f.Fuzz(func(t *testing.T, in []byte) {
		got, err := CoreModules(bytes.NewReader(in), int64(len(in)))
		if err != nil {
			if !errors.Is(err, ErrNotComponent) && !errors.Is(err, ErrMalformed) && !errors.Is(err, ErrLimit) {
				t.Fatalf("untyped error %v", err)
			}
			return
		}
		last := int64(0)
		for _, s := range got {
			if s.Offset < last || s.Size < preambleBytes || s.Offset+s.Size > int64(len(in)) || s.Depth < 1 || s.Depth > MaxDepth {
				t.Fatalf("section %+v of %d bytes", s, len(in))
			}
			if !bytes.HasPrefix(in[s.Offset:], []byte(corePreamble)) {
				t.Fatalf("no module at %+v", s)
			}
			last = s.Offset + s.Size
		}
	})
}
