// Command bootstrap turns an EC2 instance into a proven node of a highly
// available k3s cluster that runs WebAssembly. It is what user-data starts.
package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"syscall"

	"github.com/urfave/cli/v2"

	"github.com/hearth-sh/hearth/internal/bootstrap"
	"github.com/hearth-sh/hearth/internal/command"
)

// version is set by the linker; a plain `go build` falls back to what Go
// recorded of the source tree.
var version = ""

func main() {
	// A second signal ends the process at once.
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	context.AfterFunc(ctx, stop)
	os.Exit(run(ctx, os.Args))
}

// run executes the command line and returns the exit code; docs/bootstrap.md
// lists the codes.
func run(ctx context.Context, args []string) int {
	app := command.Prepare(newApp())
	err := app.RunContext(ctx, command.Reorder(app, args))
	if err == nil {
		return bootstrap.ExitOK
	}
	var exit cli.ExitCoder
	if errors.As(err, &exit) {
		if message := exit.Error(); message != "" {
			fmt.Fprintln(os.Stderr, "bootstrap: "+message)
		}
		return exit.ExitCode()
	}
	fmt.Fprintln(os.Stderr, "bootstrap: "+err.Error())
	return bootstrap.ExitInternal
}

func newApp() *cli.App {
	return &cli.App{
		Name:  "bootstrap",
		Usage: "from EC2 user-data to a proven node of a k3s cluster",
		Description: "`bootstrap run` reads what this instance is to become from its user-data, brings what that needs, founds or joins the cluster, " +
			"and ends when the node is Ready and has run a WebAssembly module. Running it again changes nothing that is as it should be.",
		Version: buildVersion(),
		Commands: []*cli.Command{
			runCommand(),
			planCommand(),
			statusCommand(),
			explainCommand(),
			configCommand(),
			enableCommand(),
			resetCommand(),
			manifestCommand(),
			command.Completion("bootstrap", "commands, options and codes"),
			command.Man("bootstrap"),
		},
	}
}

// buildVersion says what this binary is.
func buildVersion() string { return command.Version(version) }

func logLevelFlag() cli.Flag { return command.LogLevelFlag("warn") }

func outputFlag() cli.Flag {
	return &cli.StringFlag{Name: "output", Aliases: []string{"o"}, Usage: "`FORMAT` of the result: text or json", Value: "text"}
}

// wantsJSON reads --output.
func wantsJSON(c *cli.Context) (bool, error) {
	switch o := c.String("output"); o {
	case "json":
		return true, nil
	case "text":
		return false, nil
	default:
		return false, command.UsageError("--output %q is not text or json", o)
	}
}

func configFlag() cli.Flag {
	return &cli.StringSliceFlag{
		Name: "config", TakesFile: true,
		Usage: "read `FILE` instead of /etc/hearth, user-data and tags; may be repeated, later files win",
	}
}

func stateDirFlag() cli.Flag {
	return &cli.StringFlag{
		Name: "state-dir", Usage: "`DIR` for what bootstrap remembers: the result, what it installed, its part in the election",
		Value: bootstrap.DefaultStateDir, EnvVars: []string{"HEARTH_BOOTSTRAP_STATE"},
	}
}
