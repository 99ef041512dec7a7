package command

import (
	"bytes"
	"errors"
	"strings"
	"testing"

	"github.com/urfave/cli/v2"
	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func sample() *cli.App {
	return Prepare(&cli.App{
		Name: "program", Usage: "does things",
		Commands: []*cli.Command{
			{
				Name: "show", Aliases: []string{"s"}, Usage: "show a thing", ArgsUsage: "[NAME]", Description: "Try it:\n\n   program show x",
				Flags: []cli.Flag{
					&cli.StringFlag{Name: "output", Aliases: []string{"o"}, Usage: "`FORMAT` such as a|b", Value: "text", EnvVars: []string{"PROGRAM_OUTPUT"}},
					&cli.StringFlag{Name: "secret", Usage: "not shown", Hidden: true},
					LogLevelFlag("warn"),
				},
				Action: func(c *cli.Context) error {
					if _, err := Logger(c); err != nil {
						return err
					}
					if c.NArg() > 1 {
						return UsageError("one name")
					}
					_, err := c.App.Writer.Write([]byte(c.Args().First() + " as " + c.String("output")))
					return err
				},
			},
			{Name: "group", Usage: "has commands", Subcommands: []*cli.Command{{Name: "inner", Usage: "is one", Action: NoArguments}}},
			{Name: "quiet", Usage: "not shown", Hidden: true},
			Completion("program", "commands"), Man("program"),
		},
	})
}

func TestManners(t *testing.T) {
	for _, tt := range []struct {
		line, stdout, fails string
	}{
		{"show x", "x as text", ""},
		{"show x -o json", "x as json", ""},
		{"show -- -x", "-x as text", ""},
		{"show --log-level loud", "", "--log-level \"loud\""},
		{"show --colour", "", "see `program show --help`"},
		{"shwo", "", "did you mean `program show`?"},
		{"quie", "", "see `program --help`"},
		{"group innre", "", "did you mean `program group inner`?"},
		{"group inner x", "", "takes no argument such as \"x\""},
		{"man --section 3", "", "--section 3"},
	} {
		app := sample()
		var stdout bytes.Buffer
		app.Writer, app.ErrWriter = &stdout, &stdout
		err := app.RunContext(t.Context(), Reorder(app, append([]string{"program"}, strings.Fields(tt.line)...)))
		if tt.fails == "" {
			if err != nil || stdout.String() != tt.stdout {
				t.Errorf("%s: %q %v", tt.line, stdout.String(), err)
			}
			continue
		}
		var exit cli.ExitCoder
		if !errors.As(err, &exit) || exit.ExitCode() != ExitUsage || !strings.Contains(err.Error(), tt.fails) || stdout.Len() > 0 {
			t.Errorf("%s: %q %v", tt.line, stdout.String(), err)
		}
	}
}

func TestReference(t *testing.T) {
	got := string(Reference(sample(), 3))
	for _, want := range []string{
		"| [`show`](#program-show) | show a thing |", "### program show\n", "Show a thing. Short: `s`.", "```\nprogram show [options] [NAME]\n```", "```\nprogram show x\n```",
		"| `--output`, `-o FORMAT` | FORMAT such as a\\|b (`$PROGRAM_OUTPUT`) | \"text\" |", "#### program group inner\n",
	} {
		if !strings.Contains(got, want) {
			t.Errorf("%q is missing in\n%s", want, got)
		}
	}
	for _, hidden := range []string{"quiet", "secret"} {
		if strings.Contains(got, hidden) {
			t.Errorf("%s is shown", hidden)
		}
	}
}

func TestVersionIsTheLinkersWord(t *testing.T) {
	if got := Version("v1.2.3"); got != "v1.2.3" {
		t.Error(got)
	}
	if got := Version(""); got == "" {
		t.Error("a build without the linker's word has no version")
	}
}
