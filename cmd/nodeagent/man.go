package main

import "github.com/urfave/cli/v2"

func manCommand() *cli.Command {
	return &cli.Command{
		Name:  "man",
		Usage: "print the manual page (roff)",
		Description: "Read it at once with `nodeagent man | man -l -`, or install it as " +
			"/usr/local/share/man/man8/nodeagent.8.",
		Flags: []cli.Flag{
			&cli.IntFlag{Name: "section", Value: 8, Usage: "`SECTION` of the manual: 8 (administration) or 1 (commands)"},
		},
		Action: action(func(c *cli.Context) error {
			if err := noArguments(c); err != nil {
				return err
			}
			section := c.Int("section")
			if section != 1 && section != 8 {
				return usageError("--section %d is not one of 1, 8", section)
			}
			page, err := c.App.ToManWithSection(section)
			if err != nil {
				return err
			}
			fprintf(c.App.Writer, "%s", page)
			return nil
		}),
	}
}
