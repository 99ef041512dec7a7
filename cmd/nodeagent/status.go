package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"time"

	"github.com/urfave/cli/v2"

	"github.com/hearth-sh/hearth/api/v1alpha1"
	"github.com/hearth-sh/hearth/internal/command"
	"github.com/hearth-sh/hearth/internal/localsocket"
	"github.com/hearth-sh/hearth/internal/paths"
)

const (
	// statusWait bounds `nodeagent status` altogether: it is asked when
	// something hangs, so it must not.
	statusWait = 800 * time.Millisecond
	// maxStatusBytes bounds the document: 100 failed functions and 16 errors
	// take less than a tenth of it.
	maxStatusBytes = 4 << 20
)

func socketFlags() []cli.Flag {
	return []cli.Flag{
		&cli.StringFlag{Name: "socket", EnvVars: []string{"HEARTH_SOCKET"}, Usage: "`PATH` of the agent's control socket (default: " + paths.NodeAgentSocket + " if it exists, else the one below --data-dir)"},
		&cli.StringFlag{Name: "data-dir", EnvVars: []string{"HEARTH_DATA_DIR"}, Usage: "`DIR` that `nodeagent dev` was started with (default: $XDG_DATA_HOME/hearth or ~/.local/share/hearth)"},
	}
}

// agentSocket decides which socket is meant.
func agentSocket(c *cli.Context) string {
	switch {
	case c.String("socket") != "":
		return c.String("socket")
	case c.String("data-dir") != "":
		return paths.AgentSocket(c.String("data-dir"))
	}
	if _, err := os.Stat(paths.NodeAgentSocket); err == nil {
		return paths.NodeAgentSocket
	}
	return paths.AgentSocket(paths.DataDir())
}

func statusCommand() *cli.Command {
	return &cli.Command{
		Name:  "status",
		Usage: "say how this machine is",
		Description: "Reads the agent's control socket and answers in well under a second, whatever hangs. " +
			"The exit code is 0 when healthy, 3 degraded, 4 failed, 5 when no agent answers. " +
			"-o json is versioned; docs/status.schema.json describes it.",
		Flags:  append(socketFlags(), outputFlag()),
		Action: action(statusAction),
	}
}

func statusAction(c *cli.Context) error {
	if err := command.NoArguments(c); err != nil {
		return err
	}
	asJSON, err := wantsJSON(c)
	if err != nil {
		return err
	}
	status, raw, err := readStatus(c.Context, agentSocket(c))
	if err != nil {
		return err
	}
	if asJSON {
		// As it came: a newer agent may say more than this command knows.
		fprintf(c.App.Writer, "%s", raw)
	} else {
		printStatus(c.App.Writer, status, nowOf(c))
	}
	switch status.State {
	case v1alpha1.NodeHealthy:
		return nil
	case v1alpha1.NodeDegraded:
		return cli.Exit("", exitDegraded)
	}
	return cli.Exit("", exitFailed)
}

// readStatus asks the agent. Every failure is an exit error with code 5.
func readStatus(ctx context.Context, socket string) (status v1alpha1.NodeStatus, raw []byte, err error) {
	bounded, cancel := context.WithTimeout(ctx, statusWait)
	defer cancel()
	client := localsocket.HTTPClient(socket)
	defer client.CloseIdleConnections()
	req, err := http.NewRequestWithContext(bounded, http.MethodGet, localsocket.BaseURL+"/v1/status", nil)
	if err != nil {
		return status, nil, err
	}
	resp, err := client.Do(req)
	if err == nil {
		defer resp.Body.Close()
		if resp.StatusCode != http.StatusOK {
			return status, nil, fail(exitUnreachable, fmt.Sprintf("what listens on %s answered %d; is it the agent's socket?", socket, resp.StatusCode), "")
		}
		raw, err = io.ReadAll(io.LimitReader(resp.Body, maxStatusBytes))
	}
	var socketErr *localsocket.Error
	switch {
	case ctx.Err() != nil:
		return status, nil, ctx.Err()
	case bounded.Err() != nil:
		return status, nil, fail(exitUnreachable, fmt.Sprintf("the agent took the connection on %s but did not answer within %v", socket, statusWait),
			"it may be stopped or overloaded: look at its process and log")
	case errors.As(err, &socketErr):
		return status, nil, fail(exitUnreachable, fmt.Sprintf("no agent answers: %v", socketErr), "")
	case err != nil:
		return status, nil, fail(exitUnreachable, fmt.Sprintf("the agent on %s broke off: %v", socket, err), "")
	}
	if err := json.Unmarshal(raw, &status); err != nil || status.Kind != "NodeStatus" {
		return status, nil, fail(exitUnreachable, "what listens on "+socket+" does not answer as the agent does", "give the agent's socket with --socket")
	}
	return status, raw, nil
}

func printStatus(w io.Writer, s v1alpha1.NodeStatus, now time.Time) {
	t := terminalOf(w)
	state := string(s.State)
	fprintf(w, "%s is %s since %s: %s\n\n", printable(s.Node), t.paint(stateColour(state), state), age(now, s.Since), printable(s.Summary))

	table := newTable(w)
	fprintf(table, "CHECK\t%s\tSINCE\tMESSAGE\n", t.paint(plain, "STATE"))
	for _, check := range s.Checks {
		state := string(check.State)
		colour := stateColour(state)
		if check.State == v1alpha1.CheckFailing && check.Severity != v1alpha1.SeverityCritical {
			colour = yellow
		}
		message := printable(check.Message)
		if check.CausedBy != "" {
			message += " (because of " + printable(check.CausedBy) + ")"
		}
		fprintf(table, "%s\t%s\t%s\t%s\n", printable(check.Code), t.paint(colour, state), age(now, check.Since), message)
		if check.State == v1alpha1.CheckFailing && check.CausedBy == "" && check.Remedy != "" {
			fprintf(table, "\t%s\t\tto do: %s\n", t.paint(plain, ""), printable(check.Remedy))
		}
	}
	_ = table.Flush()
	fprintf(w, "\n")

	table = newTable(w)
	if f := s.Functions; f != nil {
		fprintf(table, "functions\t%d of %d warm, %d on their way, %d failed\n", f.Warm, f.Total, f.Pulling, f.FailedCount)
		for _, failed := range f.Failed {
			serving := "none answers"
			if failed.Serving > 0 {
				serving = fmt.Sprintf("revision %d answers", failed.Serving)
			}
			fprintf(table, "\t%s revision %d (%s): %s\n", printable(failed.Name), failed.Revision, serving, printable(failed.Error.Detail))
		}
		if more := f.FailedCount - len(f.Failed); more > 0 {
			fprintf(table, "\tand %d more\n", more)
		}
	}
	if e := s.Engine; e != nil {
		if e.Reachable {
			fprintf(table, "engine\tanswers, %s\n", plural(len(e.Workers), "worker"))
		} else {
			fprintf(table, "engine\tdoes not answer\n")
		}
		for _, worker := range e.Workers {
			fprintf(table, "\tworker %s (tenant %s, process %d): %s for %s, %s, %s, restarts: %d\n", printable(worker.ID), printable(worker.Tenant),
				worker.PID, printable(worker.State), age(now, worker.Since), plural(worker.Functions, "function"), humanBytes(worker.RSSBytes), worker.Restarts)
		}
	}
	printNode(table, s, now)
	if st := s.Store; st != nil {
		budget := ""
		if st.BudgetBytes > 0 {
			budget = " of " + humanBytes(st.BudgetBytes)
		}
		fprintf(table, "store\t%s%s in %s, %d set aside\n", humanBytes(st.UsedBytes), budget, plural(st.Objects, "object"), st.Quarantined)
	}
	if d := s.Disk; d != nil {
		fprintf(table, "disk\t%s of %s free at %s\n", humanBytes(d.FreeBytes), humanBytes(d.TotalBytes), printable(d.Path))
	}
	fprintf(table, "version\t%s, up for %s\n", printable(versionLine(s.Versions)), age(now, s.StartedAt))
	_ = table.Flush()

	if len(s.LastErrors) > 0 {
		fprintf(w, "\nLast errors:\n")
		table = newTable(w)
		for _, e := range s.LastErrors {
			times := ""
			if e.Count > 1 {
				times = fmt.Sprintf(" (%d times)", e.Count)
			}
			subject := ""
			if e.Subject != "" {
				subject = e.Subject + ": "
			}
			fprintf(table, "  %s ago\t%s\t%s%s%s\n", age(now, e.Time), printable(e.Code), printable(subject), printable(e.Message), times)
		}
		_ = table.Flush()
	}
}

// printNode prints what only nodes of a cluster have.
func printNode(w io.Writer, s v1alpha1.NodeStatus, now time.Time) {
	if i := s.Instance; i != nil {
		fprintf(w, "instance\t%s, %s, %s, %s\n", printable(i.ID), printable(i.Type), printable(i.Zone), printable(i.LifeCycle))
	}
	for n, r := range s.Runtimes {
		title := ""
		if n == 0 {
			title = "runtimes"
		}
		handler, version := r.Handler, r.Version
		if handler == "" {
			handler = "(no handler)"
		}
		if version == "" {
			version = "version unknown"
		}
		word := "not proven"
		if r.Proven {
			word = "proven"
		}
		tried := "never tried"
		if r.ProvedAt != nil {
			tried = "tried " + age(now, *r.ProvedAt) + " ago"
		}
		fprintf(w, "%s\t%s: %s %s, %s, %s\n", title, printable(handler), printable(r.Name), printable(version), word, tried)
		if !r.Proven && r.Message != "" {
			fprintf(w, "\t  %s\n", printable(r.Message))
		}
		for _, problem := range r.Problems {
			fprintf(w, "\t  %s\n", printable(problem))
		}
	}
	if i := s.Images; i != nil {
		fprintf(w, "images\t%s\n", printable(i.Summary))
		for _, image := range i.Images {
			state := image.State
			if image.Percent != nil {
				state += fmt.Sprintf(" %d %%", *image.Percent)
			}
			if image.Error != nil {
				state += ": " + image.Error.Detail
			}
			if image.NextTry != nil && image.NextTry.After(now) {
				state += ", next try in " + age(*image.NextTry, now)
			}
			fprintf(w, "\t%s: %s\n", printable(image.Image), printable(state))
		}
	}
	if d := s.Interruption; d != nil {
		kind := d.Kind
		if d.Simulated {
			kind += " (simulated)"
		}
		deadline := ""
		if d.Deadline != nil {
			deadline = ", " + age(*d.Deadline, now) + " left"
		}
		fprintf(w, "leaving\t%s, %s: %d of %d pods gone, %d terminating, %d blocked%s\n", printable(kind), printable(d.Phase), d.Gone, d.Pods, d.Terminating, d.Blocked, deadline)
	}
}

func versionLine(v v1alpha1.Versions) string {
	s := "nodeagent " + v.Hearth
	for _, part := range []struct{ name, value string }{{"wazero", v.Wazero}, {"", v.Go}, {"", v.OS}, {"", v.Arch}, {"kernel", v.Kernel}} {
		if part.value != "" {
			s += ", "
			if part.name != "" {
				s += part.name + " "
			}
			s += part.value
		}
	}
	return s
}

func plural(n int, what string) string {
	if n == 1 {
		return "1 " + what
	}
	return fmt.Sprintf("%d %ss", n, what)
}
