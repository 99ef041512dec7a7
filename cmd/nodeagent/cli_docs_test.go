package main

import (
	"bytes"
	"fmt"
	"os"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/urfave/cli/v2"
)

const cliReference = "../../docs/cli.md"

// TestCLIReferenceIsUpToDate generates docs/cli.md from the commands
// themselves.
func TestCLIReferenceIsUpToDate(t *testing.T) {
	// Defaults that come from a person's environment do not belong there.
	t.Setenv("HOME", "/home/you")
	for _, variable := range os.Environ() {
		if name, _, _ := strings.Cut(variable, "="); strings.HasPrefix(name, "HEARTH_") || strings.HasPrefix(name, "XDG_") {
			t.Setenv(name, "")
		}
	}
	got := reference(prepare(newApp()))
	if *update {
		if err := os.WriteFile(cliReference, got, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(cliReference)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(string(want), string(got)); diff != "" {
		t.Errorf("%s is not what the commands say; run go test ./cmd/nodeagent -run TestCLIReference -update\n%s", cliReference, diff)
	}
}

func reference(app *cli.App) []byte {
	var b bytes.Buffer
	fprintf(&b, "# Command line\n\n<!-- Generated from the commands by TestCLIReferenceIsUpToDate in cmd/nodeagent; do not edit. -->\n\n")
	fprintf(&b, "`nodeagent`: %s. Options may stand before or after arguments; what follows `--` is an argument.\n", app.Usage)
	fprintf(&b, "Results go to stdout, progress and errors to stderr. Errors are one sentence, followed by what to do next.\n")
	fprintf(&b, "Colours appear on a terminal only, and not with `NO_COLOR` set. Values of secrets are never printed.\n\n")
	fprintf(&b, "## Exit codes\n\n| code | meaning |\n|---|---|\n")
	for _, c := range exitCodes {
		fprintf(&b, "| %d | %s |\n", c.code, c.meaning)
	}
	fprintf(&b, "\n## Commands\n\n| command | |\n|---|---|\n")
	for _, c := range app.VisibleCommands() {
		if c.Name != "help" {
			fprintf(&b, "| [`%s`](#%s) | %s |\n", c.Name, anchor("nodeagent "+c.Name), c.Usage)
		}
	}
	for _, c := range app.VisibleCommands() {
		if c.Name != "help" {
			describe(&b, "nodeagent", c, 2)
		}
	}
	return b.Bytes()
}

func anchor(s string) string { return strings.ReplaceAll(s, " ", "-") }

func describe(b *bytes.Buffer, prefix string, c *cli.Command, level int) {
	name := prefix + " " + c.Name
	fprintf(b, "\n%s %s\n\n", strings.Repeat("#", level), name)
	fprintf(b, "%s.", strings.ToUpper(c.Usage[:1])+c.Usage[1:])
	if len(c.Aliases) > 0 {
		fprintf(b, " Short: `%s`.", strings.Join(c.Aliases, "`, `"))
	}
	fprintf(b, "\n\n")
	if len(c.Subcommands) == 0 {
		synopsis := name
		if len(c.VisibleFlags()) > 0 {
			synopsis += " [options]"
		}
		if c.ArgsUsage != "" {
			synopsis += " " + c.ArgsUsage
		}
		fprintf(b, "```\n%s\n```\n", synopsis)
	}
	if c.Description != "" {
		fprintf(b, "\n%s\n", blocks(c.Description))
	}
	header := false
	for _, f := range c.Flags {
		d, ok := f.(cli.DocGenerationFlag)
		if v, visible := f.(cli.VisibleFlag); !ok || visible && !v.IsVisible() {
			continue
		}
		if !header {
			fprintf(b, "\n| option | meaning | default |\n|---|---|---|\n")
			header = true
		}
		fprintf(b, "%s\n", optionRow(d, f.Names()))
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
