// Command shims builds the Wasm shims of the tests ahead of them, so that no
// test spends its time on that, and prints where they are:
//
//	go run ./test/shims/cmd/shims
package main

import (
	"context"
	"fmt"
	"os"
	"os/signal"
	"syscall"

	"github.com/hearth-sh/hearth/test/shims"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	paths, err := shims.Compile(ctx, os.Stderr)
	if err != nil {
		fmt.Fprintln(os.Stderr, "shims:", err)
		os.Exit(1)
	}
	fmt.Println(paths.Dir)
}
