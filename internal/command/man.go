package command

import (
	"io"

	"github.com/urfave/cli/v2"
)

// Man is the command that prints the program's manual page.
func Man(program string) *cli.Command {
	return &cli.Command{
		Name:  "man",
		Usage: "print the manual page (roff)",
		Description: "Read it at once with `" + program + " man | man -l -`, or install it as " +
			"/usr/local/share/man/man8/" + program + ".8.",
		Flags: []cli.Flag{
			&cli.IntFlag{Name: "section", Value: 8, Usage: "`SECTION` of the manual: 8 (administration) or 1 (commands)"},
		},
		Action: func(c *cli.Context) error {
			if err := NoArguments(c); err != nil {
				return err
			}
			section := c.Int("section")
			if section != 1 && section != 8 {
				return UsageError("--section %d is not one of 1, 8", section)
			}
			page, err := c.App.ToManWithSection(section)
			if err != nil {
				return err
			}
			_, err = io.WriteString(c.App.Writer, page)
			return err
		},
	}
}
