package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"time"

	"github.com/urfave/cli/v2"

	"github.com/hearth-sh/hearth/api/v1alpha1"
	"github.com/hearth-sh/hearth/internal/client"
)

func logsCommand() *cli.Command {
	return &cli.Command{
		Name:      "logs",
		Usage:     "show what a function wrote to stderr, and why requests failed",
		ArgsUsage: "NAME",
		Description: "Each line has its time, the revision and the request that wrote it (as in the answer's Hearth-Request-Id). " +
			"Lines marked ! are Hearth's own, on requests that failed. -o json prints one JSON object a line.",
		Flags: append([]cli.Flag{
			&cli.BoolFlag{Name: "follow", Aliases: []string{"f"}, Usage: "go on with new lines until Ctrl-C, across restarts of the server", DisableDefaultText: true},
			&cli.IntFlag{Name: "tail", Value: 100, Usage: "`N` past lines to begin with"},
			&cli.StringFlag{Name: "since", Usage: "leave out lines before `TIME`: a duration such as 10m, or RFC 3339"},
			outputFlag(),
		}, apiFlags(ownerUsage)...),
		Action:       action(logsAction),
		BashComplete: completeFunctions,
	}
}

func logsAction(c *cli.Context) error {
	o := client.LogOptions{Follow: c.Bool("follow"), Tail: c.Int("tail")}
	if o.Tail < 0 {
		return usageError("--tail %d is negative", o.Tail)
	}
	if since := c.String("since"); since != "" {
		var err error
		if o.Since, err = parseSince(since, nowOf(c)); err != nil {
			return usageError("--since %v", err)
		}
	}
	return withFunction(c, func(cl *connection, name string, asJSON bool) error {
		t := terminalOf(c.App.Writer)
		encoder := json.NewEncoder(c.App.Writer)
		encoder.SetEscapeHTML(false)
		lines := 0
		err := cl.Logs(c.Context, name, o, func(l v1alpha1.LogLine) error {
			lines++
			if asJSON {
				return encoder.Encode(l)
			}
			_, err := fmt.Fprintln(c.App.Writer, logText(t, l))
			return err
		})
		if err == nil && lines == 0 && !asJSON && c.Context.Err() == nil {
			fprintf(c.App.ErrWriter, "%s has written nothing to stderr yet\n", printable(name))
		}
		return err
	})
}

func logText(t terminal, l v1alpha1.LogLine) string {
	request := printable(l.Request)
	if len(request) > 8 {
		request = request[:8]
	}
	mark, colour := " ", plain
	if l.Stream == "system" {
		mark, colour = "!", yellow
	}
	return fmt.Sprintf("%s r%d %-8s %s %s", l.Time.UTC().Format("2006-01-02T15:04:05.000Z"), l.Revision, request, mark, t.paint(colour, printable(l.Line)))
}

// parseSince reads a duration before now, or a time.
func parseSince(s string, now time.Time) (time.Time, error) {
	if d, err := time.ParseDuration(s); err == nil {
		if d < 0 {
			return time.Time{}, errors.New("must be a duration that is not negative, such as 10m")
		}
		return now.Add(-d), nil
	}
	t, err := time.Parse(time.RFC3339Nano, s)
	if err != nil {
		return time.Time{}, fmt.Errorf("%q is neither a duration such as 10m nor a time such as 2026-01-31T12:00:00Z", s)
	}
	return t, nil
}
