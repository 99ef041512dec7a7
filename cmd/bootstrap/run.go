package main

import (
	"encoding/json"
	"fmt"
	"io"
	"strings"
	"sync"
	"time"

	"github.com/urfave/cli/v2"

	"github.com/hearth-sh/hearth/internal/bootstrap"
	"github.com/hearth-sh/hearth/internal/command"
	"github.com/hearth-sh/hearth/internal/imds"
	"github.com/hearth-sh/hearth/internal/systemd"
)

func runCommand() *cli.Command {
	return &cli.Command{
		Name:  "run",
		Usage: "turn this instance into a proven node; on one that is a node already, make it so again where it is not",
		Description: "Prints a line per step, which the unit hearth-bootstrap.service sends to the journal and the serial console. " +
			"The result is kept as result.json in --state-dir, whatever happens. Exit codes: docs/bootstrap.md.",
		Flags: []cli.Flag{configFlag(), stateDirFlag(), outputFlag(), logLevelFlag()},
		Action: func(c *cli.Context) error {
			o, asJSON, done, err := runOptions(c)
			if err != nil {
				return err
			}
			defer done()
			progress := c.App.Writer
			if asJSON {
				progress = c.App.ErrWriter
			}
			teller := &teller{w: progress}
			o.Tell = teller.tell
			result, err := bootstrap.Run(c.Context, o)
			teller.end(result, err)
			if asJSON {
				return printJSON(c.App.Writer, result, result.ExitCode)
			}
			if err != nil {
				// The last line said it.
				return cli.Exit("", result.ExitCode)
			}
			return nil
		},
	}
}

// runOptions are those that run and plan share. done closes what they hold.
func runOptions(c *cli.Context) (o bootstrap.Options, asJSON bool, done func(), err error) {
	if err = command.NoArguments(c); err != nil {
		return o, false, nil, err
	}
	if asJSON, err = wantsJSON(c); err != nil {
		return o, false, nil, err
	}
	logger, err := command.Logger(c)
	if err != nil {
		return o, false, nil, err
	}
	metadata, err := imds.New(imds.Options{Logger: logger})
	if err != nil {
		return o, false, nil, err
	}
	return bootstrap.Options{
		ConfigFiles: c.StringSlice("config"), StateDir: c.String("state-dir"), Metadata: metadata, Version: buildVersion(), Logger: logger,
	}, asJSON, metadata.Close, nil
}

// teller prints lines for people, which under systemd end in the journal and on
// the console, and adds an entry with fields to the journal for the end of every
// phase and of the run: fields cannot be printed.
type teller struct {
	mu sync.Mutex
	w  io.Writer
}

func (t *teller) tell(l bootstrap.Line) {
	t.mu.Lock()
	defer t.mu.Unlock()
	text := strings.Map(printable, l.Text)
	switch {
	case l.Failed:
		text = "FAILED: " + text
	case l.Warning:
		text = "warning: " + text
	}
	fmt.Fprintf(t.w, "hearth %7.2fs %-9s %s\n", l.At.Seconds(), l.Phase, text)
	if !l.Done {
		return
	}
	fields := map[string]string{"HEARTH_PHASE": string(l.Phase)}
	for k, v := range l.Fields {
		fields[k] = v
	}
	priority := systemd.PriorityInfo
	if l.Failed {
		priority = systemd.PriorityError
	}
	_ = systemd.Send(priority, fmt.Sprintf("phase %s: %s", l.Phase, text), fields)
}

// printable keeps what comes from elsewhere from moving the cursor.
func printable(r rune) rune {
	if r < ' ' || r == 0x7f || r >= 0x80 && r < 0xa0 {
		return ' '
	}
	return r
}

func (t *teller) end(r bootstrap.Result, err error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	document, _ := json.Marshal(r)
	fields := map[string]string{
		"HEARTH_OUTCOME": string(r.Outcome), "HEARTH_RUN": r.Run, "HEARTH_CODE": string(r.Code), "HEARTH_RESULT": string(document),
		"HEARTH_DURATION_MS": fmt.Sprint(r.DurationMS),
	}
	took := (time.Duration(r.DurationMS) * time.Millisecond).Round(10 * time.Millisecond)
	if err != nil {
		fmt.Fprintf(t.w, "hearth failed after %s in phase %s with code %s: %s\n", took, r.Phase, r.Code, strings.Map(printable, r.Message))
		if r.Remedy != "" {
			fmt.Fprintf(t.w, "hearth what to do: %s (bootstrap explain %s)\n", strings.Map(printable, r.Remedy), r.Code)
		}
		_ = systemd.Send(systemd.PriorityError, "bootstrap failed: "+r.Message, fields)
		return
	}
	what := "nothing had to be changed"
	if r.Changed {
		what = "the machine is a node now"
	}
	fmt.Fprintf(t.w, "hearth done in %s: %s is %s of cluster %s, %s\n", took, r.Node.Name, r.Node.Role, r.Node.Cluster, what)
	_ = systemd.Send(systemd.PriorityNotice, "bootstrap succeeded", fields)
}
