// Command nodeagent is Hearth on a machine: the agent, the function engine and
// its workers, the submit API, and the command line that talks to them.
package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"slices"
	"syscall"

	"github.com/urfave/cli/v2"

	"github.com/hearth-sh/hearth/internal/command"
)

// version is set by the linker; a plain `go build` falls back to what Go
// recorded of the source tree.
var version = ""

func main() {
	// Signals are registered before anything slow, so that Ctrl-C works from
	// the first instant. A second signal ends the process at once.
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	context.AfterFunc(ctx, stop)
	os.Exit(run(ctx, os.Args))
}

// run executes the command line and returns the exit code; docs/cli.md lists
// the codes.
func run(ctx context.Context, args []string) int {
	app := command.Prepare(newApp())
	err := app.RunContext(ctx, command.Reorder(app, args))
	if err == nil {
		return 0
	}
	var exit cli.ExitCoder
	if errors.As(err, &exit) {
		if message := exit.Error(); message != "" {
			fmt.Fprintln(os.Stderr, "nodeagent: "+message)
		}
		return exit.ExitCode()
	}
	fmt.Fprintln(os.Stderr, "nodeagent: "+err.Error())
	return 1
}

func newApp() *cli.App {
	return &cli.App{
		Name:  "nodeagent",
		Usage: "WebAssembly functions on machines you own",
		Description: "Start everything on this machine with `nodeagent dev`, then `nodeagent submit FILE|DIR` " +
			"in another terminal. `nodeagent status` says how a machine is, `nodeagent doctor` what to do about it.",
		Version: buildVersion(),
		Commands: slices.Concat([]*cli.Command{
			devCommand(),
			submitCommand(),
			functionsCommand(),
			logsCommand(),
			invokeCommand(),
			openCommand(),
			tokenCommand(),
			statusCommand(),
			doctorCommand(),
		}, clusterCommands(), []*cli.Command{
			command.Completion("nodeagent", "commands, options and names of functions"),
			command.Man("nodeagent"),
			runCommand(),
			engineCommand(),
			workerCommand(),
			precompileCommand(),
		}),
	}
}

// exitUsage is the exit code for a command line that makes no sense.
const exitUsage = command.ExitUsage

// buildVersion says what this binary is.
func buildVersion() string { return command.Version(version) }
