package main

import (
	"os"

	"github.com/urfave/cli/v2"

	"github.com/hearth-sh/hearth/internal/precompile"
)

func precompileCommand() *cli.Command {
	return &cli.Command{
		Name:   "precompile",
		Usage:  "check or compile one module in a sandbox (started by the agent and the API, not by people)",
		Hidden: true,
		Action: func(c *cli.Context) error {
			return exitWith(precompile.ChildMain(c.Context, os.Stdin, os.Stdout))
		},
	}
}
