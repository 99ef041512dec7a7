package main

import (
	"fmt"
	"os"
	"path/filepath"

	"github.com/urfave/cli/v2"

	"github.com/hearth-sh/hearth/internal/agent"
	"github.com/hearth-sh/hearth/internal/paths"
	"github.com/hearth-sh/hearth/internal/sandbox"
)

func storeBudgetFlag() *cli.Int64Flag {
	return &cli.Int64Flag{
		Name:    "store-budget",
		Usage:   "`MIB` of disk for compiled functions; the least recently used that nothing needs go first",
		Value:   4096,
		EnvVars: []string{"HEARTH_STORE_BUDGET"},
		Action: func(_ *cli.Context, value int64) error {
			if value < 64 {
				return cli.Exit(fmt.Sprintf("--store-budget %d is too small to compile anything; give at least 64", value), exitUsage)
			}
			return nil
		},
	}
}

func runCommand() *cli.Command {
	dataDir := paths.DataDir()
	return &cli.Command{
		Name:     "run",
		Category: "services",
		Usage:    "run the node agent: pull, verify and compile functions, feed the engine, report",
		Description: "Started by `nodeagent dev`. The agent is the only writer of the store and never runs a guest; " +
			"`nodeagent status` asks it how the node is.",
		Flags: []cli.Flag{
			&cli.StringFlag{Name: "socket", Usage: "unix socket on which `nodeagent status` asks", Value: paths.AgentSocket(dataDir)},
			&cli.StringFlag{Name: "api-socket", Usage: "unix socket of the submit API, which says what should be here", Value: paths.APISocket(dataDir)},
			&cli.StringFlag{Name: "engine-socket", Usage: "control socket of the engine", Value: paths.EngineSocket(dataDir)},
			&cli.StringFlag{Name: "registry", Usage: "`HOST:PORT` of the registry that artifacts without a host of their own are in", Required: true},
			&cli.BoolFlag{Name: "registry-plain-http", Usage: "speak HTTP without TLS to --registry"},
			&cli.StringFlag{Name: "store-dir", Usage: "the store of compiled functions; this process is its only writer", Value: filepath.Join(dataDir, "store")},
			&cli.StringFlag{Name: "state-dir", Usage: "where the last instructions are kept for a start without the API", Value: filepath.Join(dataDir, "agent")},
			storeBudgetFlag(),
			&cli.StringFlag{Name: "node-name", Usage: "name of this node in reports (default: the host's name)", EnvVars: []string{"NODE_NAME"}},
			logLevelFlag("info"),
			lifelineFlag(),
		},
		Action: func(c *cli.Context) error {
			logger, err := loggerFrom(c)
			if err != nil {
				return err
			}
			if err := holdLifeline(c); err != nil {
				return err
			}
			node := c.String("node-name")
			if node == "" {
				if node, err = os.Hostname(); err != nil {
					return fmt.Errorf("find the host's name: %w; give --node-name", err)
				}
			}
			return agent.Run(c.Context, agent.Options{
				Node:              node,
				Socket:            c.String("socket"),
				APISocket:         c.String("api-socket"),
				EngineSocket:      c.String("engine-socket"),
				Registry:          c.String("registry"),
				RegistryPlainHTTP: c.Bool("registry-plain-http"),
				StoreDir:          c.String("store-dir"),
				StateDir:          c.String("state-dir"),
				StoreBudgetBytes:  c.Int64("store-budget") << 20,
				CompilerCommand:   []string{sandbox.Executable(), "precompile"},
				Version:           buildVersion(),
				Logger:            logger,
			})
		},
	}
}
