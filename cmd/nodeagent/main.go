// Command nodeagent is Hearth on a machine: the agent, the function engine and
// its workers, the submit API, and the command line that talks to them.
package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/signal"
	"runtime/debug"
	"syscall"

	"github.com/urfave/cli/v2"
	"golang.org/x/term"
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
	app := prepare(newApp())
	err := app.RunContext(ctx, reorder(app, args))
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
		Version:              buildVersion(),
		EnableBashCompletion: true,
		Suggest:              true,
		HideHelpCommand:      true,
		// main decides on exit codes; the library must not exit on its own.
		ExitErrHandler: func(*cli.Context, error) {},
		OnUsageError: func(c *cli.Context, err error, _ bool) error {
			return cli.Exit(fmt.Sprintf("%v (see `%s --help`)", err, c.App.Name), exitUsage)
		},
		Commands: []*cli.Command{
			devCommand(),
			submitCommand(),
			functionsCommand(),
			logsCommand(),
			invokeCommand(),
			statusCommand(),
			doctorCommand(),
			completionCommand(),
			manCommand(),
			runCommand(),
			engineCommand(),
			workerCommand(),
			precompileCommand(),
		},
	}
}

// exitUsage is the exit code for a command line that makes no sense.
const exitUsage = 2

// buildVersion says what this binary is: the linker's word, else the commit
// the source tree was at.
func buildVersion() string {
	if version != "" {
		return version
	}
	info, ok := debug.ReadBuildInfo()
	if !ok {
		return "unknown"
	}
	for _, setting := range info.Settings {
		if setting.Key == "vcs.revision" && len(setting.Value) >= 12 {
			return "devel-" + setting.Value[:12]
		}
	}
	return "devel"
}

// newLogger writes text to a terminal and JSON to anything else.
func newLogger(level slog.Level) *slog.Logger {
	options := &slog.HandlerOptions{Level: level}
	if term.IsTerminal(int(os.Stderr.Fd())) {
		return slog.New(slog.NewTextHandler(os.Stderr, options))
	}
	return slog.New(slog.NewJSONHandler(os.Stderr, options))
}

// logLevelFlag is shared by everything that runs for long.
func logLevelFlag(value string) *cli.StringFlag {
	return &cli.StringFlag{
		Name:    "log-level",
		Usage:   "how much is logged to stderr: debug, info, warn or error",
		EnvVars: []string{"HEARTH_LOG_LEVEL"},
		Value:   value,
	}
}

// loggerFrom reads --log-level.
func loggerFrom(c *cli.Context) (*slog.Logger, error) {
	var level slog.Level
	if err := level.UnmarshalText([]byte(c.String("log-level"))); err != nil {
		return nil, cli.Exit(fmt.Sprintf("--log-level %q is not one of debug, info, warn, error", c.String("log-level")), exitUsage)
	}
	return newLogger(level), nil
}
