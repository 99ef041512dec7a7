//go:build !local

package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strings"
	"time"

	"github.com/urfave/cli/v2"

	"github.com/hearth-sh/hearth/api/v1alpha1"
	"github.com/hearth-sh/hearth/internal/clusternode"
	"github.com/hearth-sh/hearth/internal/command"
	"github.com/hearth-sh/hearth/internal/localsocket"
	"github.com/hearth-sh/hearth/internal/node"
)

const (
	// simulateWait bounds one request to the agent.
	simulateWait = 5 * time.Second
	// simulatePoll is how often the progress is asked for.
	simulatePoll = 500 * time.Millisecond
	// maxSimulateAnswer bounds what is read of an error.
	maxSimulateAnswer = 4 << 10
)

func simulateCommand() *cli.Command {
	in := &cli.DurationFlag{Name: "in", Value: 2 * time.Minute, Usage: "`TIME` until the machine would go, such as 90s"}
	detach := &cli.BoolFlag{Name: "detach", Aliases: []string{"d"}, Usage: "return at once instead of showing how the node is left"}
	one := func(kind node.NoticeKind, usage, description string, flags ...cli.Flag) *cli.Command {
		return &cli.Command{
			Name: string(kind), Usage: usage, Description: description,
			Flags:  append(append(flags, detach), append(socketFlags(), outputFlag())...),
			Action: action(func(c *cli.Context) error { return simulateAction(c, kind) }),
		}
	}
	return &cli.Command{
		Name:  "simulate",
		Usage: "show on a live node what happens when EC2 takes it, without EC2",
		Description: "The agent of this node acts exactly as on the real notice: it cordons, taints and drains the node and says so in events, metrics and " +
			"`nodeagent status`. The machine itself is left alone. `nodeagent simulate end` takes it back: the taint goes, the node takes pods again.",
		Subcommands: []*cli.Command{
			one(node.SpotInterruption, "the notice that a Spot instance is interrupted",
				"Pods get their grace periods as far as the time allows; budgets are respected until half a minute before the end.", in),
			one(node.Maintenance, "a scheduled event whose time has come", "Like an interruption, with more time as a rule.", in),
			one(node.Rebalance, "the recommendation to move work off a Spot instance",
				"The node takes no new pods; with --drain-on-rebalance the agent drains it as well."),
			{
				Name: "end", Usage: "take everything simulated back",
				Flags:  append(socketFlags(), outputFlag()),
				Action: action(simulateEndAction),
			},
		},
	}
}

func simulateAction(c *cli.Context, kind node.NoticeKind) error {
	if err := command.NoArguments(c); err != nil {
		return err
	}
	asJSON, err := wantsJSON(c)
	if err != nil {
		return err
	}
	s := clusternode.Simulation{Kind: kind}
	if kind != node.Rebalance {
		if s.Seconds = int(c.Duration("in").Seconds()); s.Seconds < 1 {
			return cli.Exit("--in must be at least one second", exitUsage)
		}
	}
	body, err := json.Marshal(s)
	if err != nil {
		return err
	}
	if err := askAgent(c.Context, agentSocket(c), http.MethodPost, body); err != nil {
		return err
	}
	if c.Bool("detach") {
		if !asJSON {
			fprintf(c.App.Writer, "The agent acts on it; `nodeagent status` shows how far it is, `nodeagent simulate end` takes it back.\n")
			return nil
		}
		return printJSON(c.App.Writer, s)
	}
	return watchDrain(c, asJSON)
}

// watchDrain shows each step until the node is left, or the notice gone.
func watchDrain(c *cli.Context, asJSON bool) error {
	var last string
	var seen bool
	start := time.Now()
	for {
		status, _, err := readStatus(c.Context, agentSocket(c))
		if err != nil {
			return err
		}
		d := status.Interruption
		switch {
		case d != nil:
			seen = true
			line := drainLine(*d)
			if line != last && !asJSON {
				fprintf(c.App.Writer, "%7.1fs  %s\n", time.Since(start).Seconds(), printable(line))
			}
			last = line
			if d.Phase == string(node.Drained) || d.Phase == string(node.DrainCordoned) && d.Kind == string(node.Rebalance) {
				if asJSON {
					return printJSON(c.App.Writer, d)
				}
				fprintf(c.App.Writer, "\nThe machine could go now. Take it back: nodeagent simulate end\n")
				return nil
			}
		case seen:
			return fail(exitFailed, "the notice was taken back before the node was left", "")
		case time.Since(start) > simulateWait:
			return fail(exitFailed, "the agent took the simulation but does not act on it", "see its log")
		}
		select {
		case <-c.Context.Done():
			return c.Context.Err()
		case <-time.After(simulatePoll):
		}
	}
}

func drainLine(d v1alpha1.InterruptionStatus) string {
	s := fmt.Sprintf("%s: %d of %d pods gone", d.Phase, d.Gone, d.Pods)
	if d.Terminating > 0 {
		s += fmt.Sprintf(", %d terminating", d.Terminating)
	}
	if d.Blocked > 0 {
		s += fmt.Sprintf(", %d held back by a disruption budget", d.Blocked)
	}
	if d.Forced > 0 {
		s += fmt.Sprintf(", %d deleted past their budget", d.Forced)
	}
	if len(d.Left) > 0 {
		s += " (" + strings.Join(d.Left, ", ") + ")"
	}
	if d.Error != "" {
		s += ": " + d.Error
	}
	return s
}

func simulateEndAction(c *cli.Context) error {
	if err := command.NoArguments(c); err != nil {
		return err
	}
	asJSON, err := wantsJSON(c)
	if err != nil {
		return err
	}
	if err := askAgent(c.Context, agentSocket(c), http.MethodDelete, nil); err != nil {
		return err
	}
	if asJSON {
		return printJSON(c.App.Writer, map[string]bool{"ended": true})
	}
	fprintf(c.App.Writer, "Taken back. What was evicted stays where it went.\n")
	return nil
}

// askAgent makes a request about simulations.
func askAgent(ctx context.Context, socket, method string, body []byte) error {
	ctx, cancel := context.WithTimeout(ctx, simulateWait)
	defer cancel()
	client := localsocket.HTTPClient(socket)
	defer client.CloseIdleConnections()
	req, err := http.NewRequestWithContext(ctx, method, localsocket.BaseURL+"/v1/simulation", bytes.NewReader(body))
	if err != nil {
		return err
	}
	req.Header.Set("Content-Type", "application/json")
	resp, err := client.Do(req)
	var socketErr *localsocket.Error
	switch {
	case errors.As(err, &socketErr):
		return fail(exitUnreachable, fmt.Sprintf("no agent answers: %v", socketErr), "")
	case err != nil:
		return fail(exitUnreachable, fmt.Sprintf("the agent on %s broke off: %v", socket, err), "")
	}
	defer resp.Body.Close()
	answer, _ := io.ReadAll(io.LimitReader(resp.Body, maxSimulateAnswer))
	switch {
	case resp.StatusCode == http.StatusNotFound:
		return fail(exitFailed, "this agent is not the agent of a cluster's node, so there is nothing to leave", "run this on a node")
	case resp.StatusCode/100 != 2:
		return fail(exitFailed, "the agent refuses: "+strings.TrimSpace(string(answer)), "")
	}
	return nil
}
