package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/urfave/cli/v2"

	"github.com/hearth-sh/hearth/internal/bootstrap"
	"github.com/hearth-sh/hearth/internal/bootstrap/fault"
	"github.com/hearth-sh/hearth/internal/command"
)

func statusCommand() *cli.Command {
	return &cli.Command{
		Name:        "status",
		Usage:       "show how the run under way is going, or how the last one went",
		Description: "The exit code is that of the run: 0 when it succeeded, 75 while it is under way, else the code it failed with.",
		Flags:       []cli.Flag{stateDirFlag(), outputFlag()},
		Action: func(c *cli.Context) error {
			if err := command.NoArguments(c); err != nil {
				return err
			}
			asJSON, err := wantsJSON(c)
			if err != nil {
				return err
			}
			r, err := bootstrap.LastResult(c.String("state-dir"))
			if errors.Is(err, bootstrap.ErrNoResult) {
				return cli.Exit(err.Error()+"; `bootstrap plan` shows what it would do", bootstrap.ExitInternal)
			}
			if err != nil {
				return cli.Exit(err.Error(), bootstrap.ExitInternal)
			}
			if asJSON {
				return printJSON(c.App.Writer, r, exitOf(r))
			}
			printStatus(c.App.Writer, r)
			if code := exitOf(r); code != 0 {
				return cli.Exit("", code)
			}
			return nil
		},
	}
}

// exitUnderWay is EX_TEMPFAIL of sysexits(3): ask again.
const exitUnderWay = 75

func exitOf(r bootstrap.Result) int {
	if r.Outcome == bootstrap.OutcomeRunning {
		return exitUnderWay
	}
	return r.ExitCode
}

func printJSON(w io.Writer, document any, code int) error {
	encoder := json.NewEncoder(w)
	encoder.SetIndent("", "  ")
	if err := encoder.Encode(document); err != nil {
		return err
	}
	if code != 0 {
		return cli.Exit("", code)
	}
	return nil
}

func printStatus(w io.Writer, r bootstrap.Result) {
	switch r.Outcome {
	case bootstrap.OutcomeRunning:
		line := fmt.Sprintf("under way: phase %s since %s", r.Phase, time.Since(r.PhaseSince).Round(100*time.Millisecond))
		if r.Doing != "" {
			line += ", " + r.Doing
		}
		fmt.Fprintln(w, line)
	case bootstrap.OutcomeSucceeded:
		fmt.Fprintf(w, "succeeded in %s at %s\n", milliseconds(r.DurationMS), r.FinishedAt.Format(time.RFC3339))
	default:
		fmt.Fprintf(w, "failed in phase %s at %s: %s\n", r.Phase, r.FinishedAt.Format(time.RFC3339), r.Message)
		if r.Remedy != "" {
			fmt.Fprintln(w, "  "+r.Remedy)
		}
		fmt.Fprintf(w, "  bootstrap explain %s\n", r.Code)
	}
	if n := r.Node; n.Name != "" {
		fmt.Fprintf(w, "node %s", n.Name)
		if n.Role != "" {
			fmt.Fprintf(w, ", %s in pool %s", n.Role, n.Pool)
		}
		if n.Generation > 0 {
			fmt.Fprintf(w, ", generation %d of cluster %s (%s)", n.Generation, n.Cluster, n.Action)
		}
		if len(n.Proven) > 0 {
			fmt.Fprintf(w, ", ran WebAssembly through %s", strings.Join(n.Proven, ", "))
		}
		fmt.Fprintln(w)
	}
	for _, warning := range r.Warnings {
		fmt.Fprintln(w, "warning: "+warning)
	}
	table := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	fmt.Fprintln(table, "\nPHASE\tOUTCOME\tSTART\tTOOK\tATTEMPTS\tCHANGED")
	for _, p := range r.Phases {
		changed := ""
		if p.Changed {
			changed = "yes"
		}
		fmt.Fprintf(table, "%s\t%s\t%s\t%s\t%d\t%s\n", p.Name, p.Outcome, milliseconds(p.StartMS), milliseconds(p.DurationMS), p.Attempts, changed)
	}
	_ = table.Flush()
}

func milliseconds(ms int64) string {
	return (time.Duration(ms) * time.Millisecond).Round(time.Millisecond).String()
}

func explainCommand() *cli.Command {
	return &cli.Command{
		Name:      "explain",
		Usage:     "say what a code means and what to do about it; without CODE, list all",
		ArgsUsage: "[CODE]",
		Flags:     []cli.Flag{outputFlag()},
		BashComplete: func(c *cli.Context) {
			for _, e := range bootstrap.Explanations() {
				fmt.Fprintln(c.App.Writer, e.Code)
			}
		},
		Action: func(c *cli.Context) error {
			asJSON, err := wantsJSON(c)
			if err != nil {
				return err
			}
			if c.NArg() > 1 {
				return command.UsageError("explain takes one code, found %d", c.NArg())
			}
			all := bootstrap.Explanations()
			if c.NArg() == 0 {
				if asJSON {
					return printJSON(c.App.Writer, all, 0)
				}
				table := tabwriter.NewWriter(c.App.Writer, 0, 0, 2, ' ', 0)
				for _, e := range all {
					fmt.Fprintf(table, "%s\t%s\n", e.Code, e.Meaning)
				}
				return table.Flush()
			}
			for _, e := range all {
				if e.Code != fault.Code(c.Args().First()) {
					continue
				}
				if asJSON {
					return printJSON(c.App.Writer, e, 0)
				}
				fmt.Fprintf(c.App.Writer, "%s: %s\n  %s\n", e.Code, e.Meaning, e.Remedy)
				return nil
			}
			return command.UsageError("there is no code %q; `bootstrap explain` lists all", c.Args().First())
		},
	}
}

func isMetadata(code fault.Code) bool { return strings.HasPrefix(string(code), "metadata-") }
