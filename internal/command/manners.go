package command

import (
	"fmt"
	"slices"
	"strings"

	"github.com/urfave/cli/v2"
)

// ExitUsage is the exit code for a command line that makes no sense.
const ExitUsage = 2

// UsageError ends a command with ExitUsage and one sentence.
func UsageError(format string, args ...any) error {
	return cli.Exit(fmt.Sprintf(format, args...), ExitUsage)
}

// fail is UsageError with what to do about it on a line of its own.
func fail(message, remedy string) error { return cli.Exit(message+"\n  "+remedy, ExitUsage) }

// NoArguments is the error of a command that takes none and was given one.
func NoArguments(c *cli.Context) error {
	if c.NArg() > 0 {
		return UsageError("%s takes no argument such as %q", c.Command.HelpName, c.Args().First())
	}
	return nil
}

// Reorder moves options that come after arguments before them, so that
// `logs hello --follow` works: the flag package stops at the first argument. It
// also gives every option its full name.
// What follows -- stays as it is.
func Reorder(app *cli.App, args []string) []string {
	if len(args) == 0 || args[len(args)-1] == CompletionRequest {
		return args // the shell's request has to stay last
	}
	return append(args[:1:1], reorderLevel(app.Flags, app.Commands, args[1:])...)
}

func reorderLevel(flags []cli.Flag, commands []*cli.Command, args []string) []string {
	var options, arguments []string
	for i := 0; i < len(args); i++ {
		arg := args[i]
		if arg == "--" {
			arguments = append(arguments, args[i:]...)
			break
		}
		if len(arg) > 1 && arg[0] == '-' {
			name, value, explicit := strings.Cut(strings.TrimLeft(arg, "-"), "=")
			f := flagNamed(flags, name)
			if f == nil {
				options = append(options, arg)
				continue
			}
			// The library refuses two forms of one option (-e A=1 --env B=2).
			arg = "--" + f.Names()[0]
			if explicit {
				arg += "=" + value
			}
			options = append(options, arg)
			if _, isBool := f.(*cli.BoolFlag); !isBool && !explicit && i+1 < len(args) {
				i++
				options = append(options, args[i])
			}
			continue
		}
		if len(commands) > 0 {
			// The rest belongs to the command.
			rest := args[i+1:]
			for _, command := range commands {
				if command.HasName(arg) {
					rest = reorderLevel(command.Flags, command.Subcommands, rest)
					break
				}
			}
			return slices.Concat(options, []string{arg}, rest)
		}
		arguments = append(arguments, arg)
	}
	if slices.Contains(options, "--help") || slices.Contains(options, "-h") {
		arguments = nil // the library would take one for a topic of its help
	}
	if len(options) > 0 && len(arguments) > 0 && strings.HasPrefix(arguments[0], "-") && arguments[0] != "--" {
		arguments = slices.Concat([]string{"--"}, arguments)
	}
	return slices.Concat(options, arguments)
}

func flagNamed(flags []cli.Flag, name string) cli.Flag {
	for _, f := range flags {
		if slices.Contains(f.Names(), name) {
			return f
		}
	}
	return nil
}

// Prepare gives every command the same manners: wrong usage is one sentence
// and exit code 2 instead of a page of help, and a group of commands without
// a command shows what there is.
func Prepare(app *cli.App) *cli.App {
	app.HideHelpCommand = true
	app.EnableBashCompletion = true
	app.Suggest = false // the library's own comes with a page of help on stdout
	// main decides on exit codes; the library must not exit on its own.
	app.ExitErrHandler = func(*cli.Context, error) {}
	app.OnUsageError = usageHint
	app.Action = groupAction(app.Name, app.Commands, cli.ShowAppHelp)
	var walk func(prefix string, commands []*cli.Command)
	walk = func(prefix string, commands []*cli.Command) {
		for _, command := range commands {
			name := prefix + " " + command.Name
			command.OnUsageError = usageHint
			command.HideHelpCommand = true
			if len(command.Subcommands) > 0 && command.Action == nil {
				command.Action = groupAction(name, command.Subcommands, cli.ShowSubcommandHelp)
			}
			walk(name, command.Subcommands)
		}
	}
	walk(app.Name, app.Commands)
	return app
}

func usageHint(c *cli.Context, err error, _ bool) error {
	name := c.App.Name
	if c.Command != nil && c.Command.HelpName != "" {
		name = c.Command.HelpName
	}
	return fail(err.Error(), "see `"+name+" --help`")
}

func groupAction(name string, commands []*cli.Command, help func(*cli.Context) error) cli.ActionFunc {
	return func(c *cli.Context) error {
		if c.NArg() == 0 {
			return help(c)
		}
		remedy := "see `" + name + " --help`"
		if nearest := nearestCommand(commands, c.Args().First()); nearest != "" {
			remedy = fmt.Sprintf("did you mean `%s %s`?", name, nearest)
		}
		return fail(fmt.Sprintf("%s has no command %q", name, c.Args().First()), remedy)
	}
}

// nearestCommand returns the visible command that is one or two typing
// mistakes away, or "".
func nearestCommand(commands []*cli.Command, typed string) string {
	best, nearest := 3, ""
	for _, command := range commands {
		if command.Hidden {
			continue
		}
		for _, name := range command.Names() {
			if d := editDistance(typed, name); d < best && d < len(name) {
				best, nearest = d, command.Name
			}
		}
	}
	return nearest
}

// editDistance is the Levenshtein distance in bytes; inputs are a command's
// name and what was typed instead, cut to a length where it could matter.
func editDistance(a, b string) int {
	const longest = 32
	a, b = a[:min(len(a), longest)], b[:min(len(b), longest)]
	row := make([]int, len(b)+1)
	for j := range row {
		row[j] = j
	}
	for i := range len(a) {
		diagonal := row[0]
		row[0] = i + 1
		for j := range len(b) {
			cost := diagonal
			if a[i] != b[j] {
				cost++
			}
			diagonal = row[j+1]
			row[j+1] = min(cost, row[j]+1, row[j+1]+1)
		}
	}
	return row[len(b)]
}
