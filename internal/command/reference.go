package command

import (
	"bytes"
	"fmt"
	"strings"

	"github.com/urfave/cli/v2"
)

// Reference describes every visible command and option of a program in
// Markdown: a table of the commands, then a section of the given level for
// each. Options that come from the environment of who runs it appear with its
// values, so tests that write documents clear those variables first.
func Reference(app *cli.App, level int) []byte {
	b := &bytes.Buffer{}
	fmt.Fprintf(b, "| command | |\n|---|---|\n")
	for _, c := range app.VisibleCommands() {
		if c.Name != "help" {
			fmt.Fprintf(b, "| [`%s`](#%s) | %s |\n", c.Name, anchor(app.Name+" "+c.Name), c.Usage)
		}
	}
	for _, c := range app.VisibleCommands() {
		if c.Name != "help" {
			describe(b, app.Name, c, level)
		}
	}
	return b.Bytes()
}

func anchor(s string) string { return strings.ReplaceAll(s, " ", "-") }

func describe(b *bytes.Buffer, prefix string, c *cli.Command, level int) {
	name := prefix + " " + c.Name
	fmt.Fprintf(b, "\n%s %s\n\n", strings.Repeat("#", level), name)
	fmt.Fprintf(b, "%s.", strings.ToUpper(c.Usage[:1])+c.Usage[1:])
	if len(c.Aliases) > 0 {
		fmt.Fprintf(b, " Short: `%s`.", strings.Join(c.Aliases, "`, `"))
	}
	fmt.Fprintf(b, "\n\n")
	if len(c.Subcommands) == 0 {
		synopsis := name
		if len(c.VisibleFlags()) > 0 {
			synopsis += " [options]"
		}
		if c.ArgsUsage != "" {
			synopsis += " " + c.ArgsUsage
		}
		fmt.Fprintf(b, "```\n%s\n```\n", synopsis)
	}
	if c.Description != "" {
		fmt.Fprintf(b, "\n%s\n", blocks(c.Description))
	}
	header := false
	for _, f := range c.Flags {
		d, ok := f.(cli.DocGenerationFlag)
		if v, visible := f.(cli.VisibleFlag); !ok || visible && !v.IsVisible() {
			continue
		}
		if !header {
			fmt.Fprintf(b, "\n| option | meaning | default |\n|---|---|---|\n")
			header = true
		}
		fmt.Fprintf(b, "%s\n", optionRow(d, f.Names()))
	}
	for _, sub := range c.VisibleCommands() {
		if sub.Name != "help" {
			describe(b, name, sub, level+1)
		}
	}
}

func optionRow(d cli.DocGenerationFlag, names []string) string {
	usage := d.GetUsage()
	placeholder := ""
	if before, rest, found := strings.Cut(usage, "`"); found {
		if inside, after, closed := strings.Cut(rest, "`"); closed {
			placeholder, usage = inside, before+inside+after
		}
	}
	if placeholder == "" && d.TakesValue() {
		placeholder = "VALUE"
	}
	var forms []string
	for _, name := range names {
		dashes := "--"
		if len(name) == 1 {
			dashes = "-"
		}
		forms = append(forms, dashes+name)
	}
	option := "`" + strings.Join(forms, "`, `")
	if placeholder != "" {
		option += " " + placeholder
	}
	def := d.GetDefaultText()
	if !d.TakesValue() || def == `""` {
		def = ""
	}
	if env := d.GetEnvVars(); len(env) > 0 {
		usage += fmt.Sprintf(" (`$%s`)", strings.Join(env, "`, `$"))
	}
	return fmt.Sprintf("| %s` | %s | %s |", option, strings.ReplaceAll(usage, "|", `\|`), def)
}

// blocks turns indented lines of a description into code blocks.
func blocks(s string) string {
	var out []string
	code := false
	for _, line := range strings.Split(s, "\n") {
		indented := strings.HasPrefix(line, "   ")
		if indented && !code {
			if len(out) > 0 && out[len(out)-1] != "" {
				out = append(out, "")
			}
			out = append(out, "```")
		}
		if !indented && code {
			out = append(out, "```")
		}
		code = indented
		out = append(out, strings.TrimPrefix(line, "   "))
	}
	if code {
		out = append(out, "```")
	}
	return strings.Join(out, "\n")
}
