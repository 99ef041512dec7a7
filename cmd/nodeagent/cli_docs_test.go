package main

import (
	"bytes"
	"os"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/urfave/cli/v2"

	"github.com/hearth-sh/hearth/internal/command"
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
	got := reference(command.Prepare(newApp()))
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
	fprintf(&b, "\n## Where the API is\n\n"+
		"Every command that speaks to the API is told where it is in the same way. Without any of these options it is the one of\n"+
		"`nodeagent dev` on this machine, whatever kubeconfig lies around: a cluster is only spoken to when `--cluster`, `--context` or\n"+
		"`--kubeconfig` (or `HEARTH_CONTEXT`) says so. Options go before the environment; two of them that contradict each other are refused.\n\n"+
		"With a kubeconfig (client certificate, token or credential plugin) the command makes a token of ten minutes for a ServiceAccount,\n"+
		"reads the API's certificate authority and opens a port-forward to a ready pod of the API, without opening a port of this machine.\n"+
		"For that the user needs, in the namespace of Hearth: `get` on the Service and the ConfigMap `hearth-api`, `list` on `endpointslices`,\n"+
		"`create` on `serviceaccounts/token` of `hearth-cli`, `get` and `create` on `pods/portforward`. A token of the environment is not\n"+
		"shown to it: that is for the API of `HEARTH_API`.\n\n%s", optionTable())
	fprintf(&b, "\n## Commands\n\n%s", command.Reference(withoutAPIOptions(app), 2))
	return b.Bytes()
}

// optionTable describes the options that all commands share, once.
func optionTable() string {
	shared := slices.DeleteFunc(apiFlags(""), func(f cli.Flag) bool { return f.Names()[0] == "tenant" }) // means another thing each time
	page := string(command.Reference(&cli.App{Name: "x", Commands: []*cli.Command{{Name: "y", Usage: "z", Flags: shared}}}, 2))
	return page[strings.Index(page, "| option |"):]
}

// withoutAPIOptions leaves out what optionTable says.
func withoutAPIOptions(app *cli.App) *cli.App {
	var walk func(commands []*cli.Command)
	walk = func(commands []*cli.Command) {
		for _, c := range commands {
			before := len(c.Flags)
			c.Flags = slices.DeleteFunc(c.Flags, func(f cli.Flag) bool {
				grouped, ok := f.(cli.CategorizableFlag)
				return ok && grouped.GetCategory() == apiCategory
			})
			if len(c.Flags) < before {
				c.Description = strings.TrimSpace("Options: below, and [where the API is](#where-the-api-is).\n\n" + c.Description)
			}
			walk(c.Subcommands)
		}
	}
	walk(app.Commands)
	return app
}
