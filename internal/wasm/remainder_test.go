package wasm_test

import (
	"context"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"testing"
	"time"

	"github.com/tetratelabs/wazero/api"
)

// TestArm64RemainderReproducer runs upstream's reproducer of the arm64
// miscompilation (see testdata/README.md): the fill step of an Argon2 hash,
// whose parameters (8 blocks of 1 KiB, 2 passes, 1 lane) are in a struct in
// its memory. The digest of what it leaves was taken on amd64, unlowered.
func TestArm64RemainderReproducer(t *testing.T) {
	const (
		stackTop, params, blocks = 1 << 20, 17 << 16, 18 << 16
		blockCount, passes       = 8, 2
		wantDigest               = "f46218965a737246"
	)
	r := newRuntime(t)
	nonces := 0
	count := api.GoModuleFunc(func(context.Context, api.Module, []uint64) { nonces++ })
	if _, err := r.NewHostModuleBuilder("repro").NewFunctionBuilder().
		WithGoModuleFunction(count, []api.ValueType{api.ValueTypeI32}, nil).
		Export("update_nonce").Instantiate(t.Context()); err != nil {
		t.Fatal(err)
	}
	i := instantiate(t, r, mustLower(t, readTestdata(t, "urem_regalloc.wasm"), options()).Bytes)
	if _, ok := i.Memory().Grow(16); !ok {
		t.Fatal("memory does not grow")
	}
	for offset, v := range map[uint32]uint32{8: blockCount, 12: passes, 16: 1} {
		i.Memory().WriteUint32Le(params+offset, v)
	}
	for k := range uint32(blockCount * 128) { // something to mix
		b := binary.LittleEndian.AppendUint64(nil, uint64(k)*0x9e3779b97f4a7c15)
		i.Memory().Write(blocks+8*k, b)
	}
	i.ExportedGlobal("__stack_pointer").(api.MutableGlobal).Set(stackTop - 256)

	stop := watchdog(t, 2*time.Minute) // unfixed, it may never return
	defer stop()
	got, err := i.ExportedFunction("fill_blocks").Call(t.Context(), params, blocks, blockCount, stackTop-256)
	if err != nil {
		t.Fatal(err)
	}
	mem, _ := i.Memory().Read(blocks, blockCount<<10)
	digest := sha256.Sum256(mem)
	t.Logf("result %d, %d nonces", got[0], nonces)
	if d := hex.EncodeToString(digest[:8]); got[0] != 18 || d != wantDigest {
		t.Errorf("got %d and the blocks %s, want 18 and %s", got[0], d, wantDigest)
	}
}
