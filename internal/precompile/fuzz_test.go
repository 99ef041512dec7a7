package precompile

import (
	"bytes"
	"strings"
	"testing"
	"time"

	"github.com/hearth-sh/hearth/api/v1alpha1"
	"github.com/hearth-sh/hearth/internal/sandbox"
)

// FuzzMessages: what a child is told and what it answers never panics, and
// what is accepted is within bounds and can be told again.
func FuzzMessages(f *testing.F) {
	for _, message := range []any{
		&request{Version: wireVersion, Operation: operationCheck, SizeBytes: 1, MemoryLimitPages: 1, MemoryBytes: 1 << 30, CPUSeconds: 1},
		&result{Version: wireVersion, Failure: &failure{Code: CodeInvalidModule, Detail: "bad\x00\n" + strings.Repeat("x", 5000)}},
		&result{Version: wireVersion, Module: &moduleDescription{Imports: []string{"a.b"}, MemoryMinPages: 1, Functions: 2},
			Timings: []v1alpha1.Phase{{Name: "lower", Milliseconds: 1.5}}, Sandbox: sandbox.Applied{NoNewPrivs: true, Notes: []string{"n"}}},
	} {
		var b bytes.Buffer
		if err := writeMessage(&b, message); err != nil {
			f.Fatal(err)
		}
		f.Add(b.Bytes())
	}
	f.Add([]byte(`{"version":1,"failure":{"code":"internal","detail":""},"timings":[{"name":"lower","ms":-1}]}`))
	f.Add([]byte(`{}{}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		for _, into := range []interface{ validate() error }{new(request), new(result)} {
			if err := readMessage(bytes.NewReader(b), maxResultBytes, into); err != nil {
				continue
			}
			var again bytes.Buffer
			if err := writeMessage(&again, into); err != nil {
				t.Fatal(err)
			}
			if r, ok := into.(*result); ok && r.Failure != nil && len(r.Failure.Detail) > maxDetailBytes+len("…") {
				t.Fatal("detail is too long")
			}
		}
	})
}

// FuzzDocuments: files of a store never panic, and what is accepted is what
// would be written.
func FuzzDocuments(f *testing.F) {
	digest := strings.Repeat("0a", 32)
	for _, document := range []any{
		&Manifest{Version: formatVersion, Target: CurrentTarget(), Source: Source{SHA256: digest, SizeBytes: 1}, CreatedAt: time.Unix(1, 0).UTC(),
			Files: []File{{moduleFile, digest, 1}, {"code/x/y", digest, 1}}, Timings: []v1alpha1.Phase{{Name: "lower", Milliseconds: 1}}},
		&imageIndex{Version: formatVersion, Image: digest, Objects: []string{digest}},
	} {
		b, err := seal(document)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(b)
	}
	f.Add([]byte(`{"content":{},"sha256":""}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		for _, into := range []interface{ validate() error }{new(Manifest), new(imageIndex)} {
			if err := unseal(b, into); err != nil {
				continue
			}
			again, err := seal(into)
			if err != nil || !bytes.Equal(again, b) {
				t.Fatalf("%q became %q, %v", b, again, err)
			}
		}
	})
}

func FuzzPrintable(f *testing.F) {
	f.Add("a\x1b[31m\u202e\xff\n", 4)
	f.Fuzz(func(t *testing.T, s string, limit int) {
		if limit < 0 || limit > 1<<10 {
			return
		}
		p := printable(s, limit)
		if len(p) > limit+len("…") || strings.ContainsAny(p, "\n\r\x1b\x00") {
			t.Fatalf("%q", p)
		}
	})
}
