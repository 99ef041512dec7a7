package wasm_test

import (
	"bytes"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/hearth-sh/hearth/internal/wasm"
)

// withFunctions is a module of a type, an import, three functions, a table, a
// memory, a global, exports, an element segment and data.
var withFunctions = []byte{
	0, 'a', 's', 'm', 1, 0, 0, 0,
	1, 4, 1, 0x60, 0, 0, // type ()->()
	3, 4, 3, 0, 0, 0, // three functions
	4, 4, 1, 0x70, 0, 3, // a table of three
	5, 3, 1, 0, 1, // a page of memory
	6, 6, 1, 0x7f, 1, 0x41, 7, 0x0b, // a global
	7, 10, 1, 6, '_', 's', 't', 'a', 'r', 't', 0, 2,
	9, 9, 1, 0, 0x41, 0, 0x0b, 3, 0, 1, 2, // all in the table
	10, 16, 3, 2, 0, 0x0b, 4, 0, 0x10, 0, 0x0b, 6, 1, 1, 0x7f, 0x10, 1, 0x0b, // bodies
	11, 8, 1, 0, 0x41, 8, 0x0b, 2, 'h', 'i',
}

func TestModuleWithoutBodiesDiffersInNothingElse(t *testing.T) {
	lowered, err := wasm.Lower(withFunctions, wasm.LowerOptions{Limits: wasm.DefaultLimits(), InterruptChecks: true})
	if err != nil {
		t.Fatal(err)
	}
	bodiless, err := wasm.WithoutBodies(lowered.Bytes)
	if err != nil {
		t.Fatal(err)
	}
	if len(bodiless) >= len(lowered.Bytes) {
		t.Errorf("%d bytes without bodies, %d with", len(bodiless), len(lowered.Bytes))
	}
	want, err := wasm.Parse(withFunctions, wasm.DefaultLimits())
	if err != nil {
		t.Fatal(err)
	}
	again, err := wasm.WithoutBodies(bodiless)
	if err != nil || !bytes.Equal(again, bodiless) {
		t.Errorf("a second time: %v, %d bytes", err, len(again))
	}
	plain, err := wasm.WithoutBodies(withFunctions)
	if err != nil {
		t.Fatal(err)
	}
	got, err := wasm.Parse(plain, wasm.DefaultLimits())
	if err != nil {
		t.Fatal(err)
	}
	want.CodeBytes, got.CodeBytes = 0, 0
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("the module changed (-with +without bodies):\n%s", diff)
	}
}

func TestBodiesOfBrokenModulesAreNotTakenOut(t *testing.T) {
	for name, module := range map[string][]byte{
		"no header":           {0, 'a', 's'},
		"section cut off":     withFunctions[:len(withFunctions)-1],
		"size cut off":        append(bytes.Clone(withFunctions[:8]), 10),
		"size too large":      append(bytes.Clone(withFunctions[:8]), 10, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x7f, 0),
		"count not there":     append(bytes.Clone(withFunctions[:8]), 10, 0),
		"more than its bytes": append(bytes.Clone(withFunctions[:8]), 10, 2, 0xff, 0x7f),
	} {
		if _, err := wasm.WithoutBodies(module); err == nil {
			t.Errorf("%s: no error", name)
		}
	}
}

func FuzzWithoutBodies(f *testing.F) {
	f.Add(withFunctions)
	f.Fuzz(func(t *testing.T, module []byte) {
		// Bodies are at least two bytes and become four.
		if out, err := wasm.WithoutBodies(module); err == nil && len(out) > 8+4*len(module) {
			t.Errorf("%d bytes became %d", len(module), len(out))
		}
	})
}
