package main

import (
	"errors"
	"fmt"
	"io"
	"os"
	"strings"

	"github.com/urfave/cli/v2"

	"github.com/hearth-sh/hearth/internal/artifact"
	"github.com/hearth-sh/hearth/internal/bootstrap"
	"github.com/hearth-sh/hearth/internal/command"
	"github.com/hearth-sh/hearth/internal/host"
)

func planCommand() *cli.Command {
	return &cli.Command{
		Name:        "plan",
		Usage:       "show every file, download, unit and command that `run` would change; touches nothing",
		Description: "What another server decides (who founds the cluster, through whom this machine joins) is shown as it most likely will be, and said so.",
		Flags:       []cli.Flag{configFlag(), stateDirFlag(), outputFlag(), logLevelFlag()},
		Action: func(c *cli.Context) error {
			o, asJSON, done, err := runOptions(c)
			if err != nil {
				return err
			}
			defer done()
			plan, err := bootstrap.MakePlan(c.Context, o)
			if err != nil {
				return explained(err)
			}
			if asJSON {
				return printJSON(c.App.Writer, plan, 0)
			}
			printPlan(c.App.Writer, plan)
			return nil
		},
	}
}

func printPlan(w io.Writer, p bootstrap.Plan) {
	fmt.Fprintf(w, "%s becomes a %s of cluster %s in pool %s\n", p.Node.Name, p.Node.Role, p.Node.Cluster, p.Node.Pool)
	for _, f := range p.Findings {
		if f.Severity != host.OK {
			fmt.Fprintf(w, "\n%s: %s\n  %s\n", f.Severity, f.Fact, f.Remedy)
		}
	}
	fmt.Fprintln(w, "\nDownloads")
	for _, d := range p.Downloads {
		switch {
		case d.State == artifact.StatePresent:
			fmt.Fprintf(w, "  same    %s\n", d.Path)
		case d.Bytes >= 0:
			fmt.Fprintf(w, "  %-7s %s (%s %s, %.1f MiB)\n", d.State, d.Path, d.Name, d.Version, float64(d.Bytes)/(1<<20))
		default:
			fmt.Fprintf(w, "  %-7s %s (%s %s)\n", d.State, d.Path, d.Name, d.Version)
		}
	}
	fmt.Fprintln(w, "\nFiles")
	fmt.Fprint(w, indent(host.Text(p.Files)))
	section := func(title string, lines []string) {
		if len(lines) == 0 {
			return
		}
		fmt.Fprintf(w, "\n%s\n", title)
		for _, l := range lines {
			fmt.Fprintf(w, "  %s\n", l)
		}
	}
	section("Files that go", p.Retired)
	section("Commands", p.Commands)
	var units []string
	for _, u := range p.Units {
		units = append(units, fmt.Sprintf("%s %s: %s", u.Action, u.Name, u.Reason))
	}
	section("Units", units)
	section("Notes", p.Notes)
	if !p.Changes {
		fmt.Fprintln(w, "\nNothing would be changed.")
	}
}

func resetCommand() *cli.Command {
	return &cli.Command{
		Name:  "reset",
		Usage: "remove everything bootstrap installed, and what k3s made of it, and nothing else",
		Description: "Without --yes it only shows what would go. Files that somebody changed since stay and are listed; what was there before comes back. " +
			"The Node stays in the cluster: kubectl delete node NAME.",
		Flags: []cli.Flag{stateDirFlag(), outputFlag(), &cli.BoolFlag{Name: "yes", Aliases: []string{"y"}, Usage: "do it"}},
		Action: func(c *cli.Context) error {
			if err := command.NoArguments(c); err != nil {
				return err
			}
			asJSON, err := wantsJSON(c)
			if err != nil {
				return err
			}
			var report bootstrap.ResetReport
			if c.Bool("yes") {
				if os.Geteuid() != 0 {
					return cli.Exit("reset needs root; run it with sudo", bootstrap.ExitHost)
				}
				report, err = bootstrap.Reset(c.Context, c.String("state-dir"), func(text string) { fmt.Fprintln(c.App.ErrWriter, text) })
			} else {
				report, err = bootstrap.PlanReset(c.Context, c.String("state-dir"))
			}
			if asJSON {
				err = errors.Join(err, printJSON(c.App.Writer, report, 0))
			} else {
				printReset(c.App.Writer, report, c.Bool("yes"))
			}
			if err != nil {
				return cli.Exit(err.Error(), bootstrap.ExitHost)
			}
			return nil
		},
	}
}

func printReset(w io.Writer, r bootstrap.ResetReport, done bool) {
	verb := "would remove"
	if done {
		verb = "removed"
	}
	for _, path := range append(r.Files.Removed, r.K3s.Directories...) {
		fmt.Fprintln(w, verb, path)
	}
	for _, path := range r.Files.Restored {
		fmt.Fprintln(w, verb, path, "and bring back what was there before")
	}
	for _, l := range r.Files.Left {
		fmt.Fprintf(w, "left %s: %s\n", l.Path, l.Why)
	}
	if !done {
		fmt.Fprintln(w, "and the data, pods and network of k3s, if it runs by a unit of bootstrap's; `bootstrap reset --yes` does it")
	}
}

func indent(s string) string {
	var b strings.Builder
	for line := range strings.Lines(s) {
		b.WriteString("  " + line)
	}
	return b.String()
}
