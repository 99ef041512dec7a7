// Command freshprocess runs one wasip1 module once, as an ordinary program
// would be started per request: a new process that loads the module through
// wazero's own file cache, runs it with this process's environment and
// standard streams and ends. The benchmark compares Hearth with it, with the
// cache warmed.
package main

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"os"
	"strings"

	"github.com/tetratelabs/wazero"
	"github.com/tetratelabs/wazero/imports/wasi_snapshot_preview1"
	"github.com/tetratelabs/wazero/sys"
)

func main() {
	if len(os.Args) != 3 {
		fmt.Fprintln(os.Stderr, "usage: freshprocess CACHE-DIRECTORY MODULE")
		os.Exit(2)
	}
	if err := run(context.Background(), os.Args[1], os.Args[2]); err != nil {
		fmt.Fprintln(os.Stderr, "freshprocess:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, cacheDir, path string) error {
	module, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	cache, err := wazero.NewCompilationCacheWithDir(cacheDir)
	if err != nil {
		return err
	}
	config := wazero.NewRuntimeConfigCompiler().WithCompilationCache(cache).WithDebugInfoEnabled(false)
	runtime := wazero.NewRuntimeWithConfig(ctx, config)
	if _, err := wasi_snapshot_preview1.Instantiate(ctx, runtime); err != nil {
		return err
	}
	guest := wazero.NewModuleConfig().WithArgs("/").WithStdin(os.Stdin).WithStdout(os.Stdout).WithStderr(os.Stderr).
		WithRandSource(rand.Reader).WithSysWalltime().WithSysNanotime()
	for _, kv := range os.Environ() {
		if name, value, ok := strings.Cut(kv, "="); ok {
			guest = guest.WithEnv(name, value)
		}
	}
	_, err = runtime.InstantiateWithConfig(ctx, module, guest)
	var exit *sys.ExitError
	if errors.As(err, &exit) && exit.ExitCode() == 0 {
		return nil
	}
	return err
}
