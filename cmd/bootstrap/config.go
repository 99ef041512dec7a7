package main

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/urfave/cli/v2"

	"github.com/hearth-sh/hearth/internal/bootstrap"
	"github.com/hearth-sh/hearth/internal/bootstrap/fault"
	"github.com/hearth-sh/hearth/internal/command"
	"github.com/hearth-sh/hearth/internal/imds"
	"github.com/hearth-sh/hearth/internal/nodeconfig"
)

// metadataWait bounds asking for user-data and tags in `bootstrap config`.
const metadataWait = 10 * time.Second

func configCommand() *cli.Command {
	format := func(value, choices string) cli.Flag {
		return &cli.StringFlag{Name: "output", Aliases: []string{"o"}, Usage: "`FORMAT` of the result: " + choices, Value: value}
	}
	return &cli.Command{
		Name:  "config",
		Usage: "look at the configuration this machine would follow",
		Subcommands: []*cli.Command{
			{
				Name: "check", Usage: "say whether the configuration is valid, and everything that is wrong with it",
				Description: "Without --config the sources are those of `bootstrap run`: /etc/hearth/*.yaml, user-data, instance tags.",
				Flags:       []cli.Flag{configFlag(), format("text", "text or json")},
				Action: func(c *cli.Context) error {
					if err := command.NoArguments(c); err != nil {
						return err
					}
					asJSON, err := wantsJSON(c)
					if err != nil {
						return err
					}
					sources, err := configSources(c)
					if err != nil {
						return explained(err)
					}
					o := nodeconfig.CheckOptions{Sources: sources}
					if asJSON {
						o.Format = nodeconfig.FormatJSON
					}
					if err := nodeconfig.Check(c.Context, c.App.Writer, o); err != nil {
						var invalid *nodeconfig.Invalid
						if errors.As(err, &invalid) {
							return cli.Exit("", bootstrap.ExitConfig) // Check printed it
						}
						return explained(err)
					}
					return nil
				},
			},
			{
				Name: "dump", Usage: "print the whole configuration, with every default",
				Flags: []cli.Flag{
					configFlag(), format("yaml", "yaml or json"),
					&cli.BoolFlag{Name: "origins", Usage: "say where each value came from"},
				},
				Action: func(c *cli.Context) error {
					if err := command.NoArguments(c); err != nil {
						return err
					}
					f := nodeconfig.Format(c.String("output"))
					if f != nodeconfig.FormatYAML && f != nodeconfig.FormatJSON {
						return command.UsageError("--output %q is not yaml or json", f)
					}
					sources, err := configSources(c)
					if err != nil {
						return explained(err)
					}
					return explained(nodeconfig.DumpSources(c.Context, c.App.Writer, nodeconfig.DumpOptions{
						Sources: sources, Format: f, Origins: c.Bool("origins"),
					}))
				},
			},
			{
				Name: "schema", Usage: "print the JSON Schema of a NodeConfig",
				Flags: []cli.Flag{&cli.StringSliceFlag{Name: "config", Hidden: true, Usage: "accepted for symmetry; the schema is the same for all"}},
				Action: func(c *cli.Context) error {
					if err := command.NoArguments(c); err != nil {
						return err
					}
					return nodeconfig.WriteSchema(c.App.Writer)
				},
			},
		},
	}
}

// configSources are the files that were named, or those of a run. Metadata is
// asked only for the latter.
func configSources(c *cli.Context) (nodeconfig.Sources, error) {
	if files := c.StringSlice("config"); len(files) > 0 {
		return nodeconfig.Sources{Files: files}, nil
	}
	client, err := imds.New(imds.Options{})
	if err != nil {
		return nodeconfig.Sources{}, err
	}
	defer client.Close()
	ctx, cancel := context.WithTimeout(c.Context, metadataWait)
	defer cancel()
	return bootstrap.ConfigSources(ctx, client)
}

// explained turns a classified failure into its exit code and sentence.
func explained(err error) error {
	if err == nil {
		return nil
	}
	code, message := bootstrap.ExitConfig, err.Error()
	if fault.CodeOf(err) == "" {
		code = bootstrap.ExitInternal
	} else {
		message += fmt.Sprintf(" (bootstrap explain %s)", fault.CodeOf(err))
	}
	if isMetadata(fault.CodeOf(err)) {
		code = bootstrap.ExitMetadata
	}
	return cli.Exit(message, code)
}
