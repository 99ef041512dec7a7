package images

import (
	"context"
	"os"
	"testing"

	"go.uber.org/goleak"

	"github.com/hearth-sh/hearth/internal/precompile"
)

// childEnv makes this test binary a precompile child.
const childEnv = "IMAGES_TEST_CHILD"

func TestMain(m *testing.M) {
	if os.Getenv(childEnv) != "" {
		os.Exit(precompile.ChildMain(context.Background(), os.Stdin, os.Stdout))
	}
	goleak.VerifyTestMain(m)
}

// startModule is the smallest module with _start: (module (memory (export
// "memory") 1) (func (export "_start"))) and a custom section that pads it
// to about n bytes and makes it differ.
func startModule(tag byte, n int) []byte {
	m := []byte("\x00asm\x01\x00\x00\x00" +
		"\x01\x04\x01\x60\x00\x00" +
		"\x03\x02\x01\x00" +
		"\x05\x03\x01\x00\x01" +
		"\x07\x13\x02\x06memory\x02\x00\x06_start\x00\x00" +
		"\x0a\x04\x01\x02\x00\x0b")
	pad := make([]byte, n)
	for i := range pad {
		pad[i] = tag
	}
	return append(m, customSection(append([]byte{1, tag}, pad...))...)
}

func customSection(body []byte) []byte {
	out := []byte{0}
	size := len(body)
	for ; size >= 0x80; size >>= 7 {
		out = append(out, byte(size)|0x80)
	}
	return append(append(out, byte(size)), body...)
}
