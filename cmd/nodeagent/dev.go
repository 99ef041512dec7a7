package main

import (
	"log/slog"
	"os"

	"github.com/urfave/cli/v2"
	"golang.org/x/term"

	"github.com/hearth-sh/hearth/internal/command"
	"github.com/hearth-sh/hearth/internal/dev"
	"github.com/hearth-sh/hearth/internal/paths"
)

func devCommand() *cli.Command {
	return &cli.Command{
		Name:     "dev",
		Category: "services",
		Usage:    "run everything on this machine: submit API, registry, agent, engine",
		Description: "Runs as an ordinary user, keeps everything in one directory and ends with Ctrl-C; the next run has " +
			"every function again. Prints what to try once it is ready.",
		Flags: []cli.Flag{
			&cli.StringFlag{Name: "listen", Usage: "`ADDRESS` of the API and of functions; port 0 takes a free one", Value: "127.0.0.1:8080", EnvVars: []string{"HEARTH_LISTEN"}},
			&cli.StringFlag{Name: "data-dir", Usage: "`DIR` where everything is kept", Value: paths.DataDir(), EnvVars: []string{"HEARTH_DATA_DIR"}},
			&cli.StringFlag{Name: "base-domain", Usage: "`DOMAIN` below which each function has a host of its own, such as 203.0.113.7.nip.io", Value: "localhost", EnvVars: []string{"HEARTH_BASE_DOMAIN"}},
			&cli.StringFlag{Name: "token-file", Usage: "`FILE` of the tokens that may use the API (docs/api.md, `nodeagent token line`); empty: whoever can connect may", EnvVars: []string{"HEARTH_DEV_TOKEN_FILE"}},
			isolationFlag(),
			quotaInvocationsFlag(),
			workerMemoryFlag(),
			storeBudgetFlag(),
			&cli.BoolFlag{Name: "verbose", Usage: "repeat everything the agent and the engine log"},
			command.LogLevelFlag("warn"),
		},
		Action: func(c *cli.Context) error {
			if c.Bool("verbose") && !c.IsSet("log-level") {
				if err := c.Set("log-level", slog.LevelInfo.String()); err != nil {
					return err
				}
			}
			logger, err := command.Logger(c)
			if err != nil {
				return err
			}
			if c.Args().Present() {
				return cli.Exit("dev takes no arguments (see `nodeagent dev --help`)", exitUsage)
			}
			terminal := term.IsTerminal(int(os.Stdout.Fd()))
			return dev.Run(c.Context, dev.Options{
				Listen:           c.String("listen"),
				DataDir:          c.String("data-dir"),
				BaseDomain:       c.String("base-domain"),
				TokenFile:        c.String("token-file"),
				Isolation:        c.String("isolation"),
				WorkerMemoryMiB:  c.Int64("worker-memory"),
				QuotaInvocations: c.Float64("quota-invocations"),
				StoreBudgetMiB:   c.Int64("store-budget"),
				Version:          buildVersion(),
				Verbose:          c.Bool("verbose"),
				Out:              os.Stdout,
				Terminal:         terminal,
				Colour:           terminal && os.Getenv("NO_COLOR") == "",
				CommandName:      os.Args[0],
				Logger:           logger,
			})
		},
	}
}
