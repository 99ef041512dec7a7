package dev

import (
	"context"
	"fmt"
	"io"
	"net/http"
	"sync"
	"time"

	"github.com/hearth-sh/hearth/internal/engine/control"
	"github.com/hearth-sh/hearth/internal/localsocket"
	"github.com/hearth-sh/hearth/internal/submit"
)

// readiness asks everything a submit needs beside the database (the API asks
// that itself), side by side, within the second that a probe waits.
type readiness struct {
	d     *dev
	agent *http.Client
}

// probeDeadline is below the second in which /readyz must answer.
const probeDeadline = 800 * time.Millisecond

func (r readiness) Ready(ctx context.Context) []submit.Check {
	ctx, cancel := context.WithTimeout(ctx, probeDeadline)
	defer cancel()
	asks := []struct {
		name   string
		ask    func(context.Context) error
		remedy string
	}{
		{"registry", r.d.embedded.Check, "look at the data directory's disk"},
		{"agent", r.askAgent, "it is restarted by itself; its log is logs/system/agent.log in the data directory"},
		{"engine", func(ctx context.Context) error {
			_, err := r.d.control.Status(ctx, 0, 0)
			return err
		}, "it is restarted by itself; its log is logs/system/engine.log in the data directory"},
	}
	checks := make([]submit.Check, len(asks))
	var wait sync.WaitGroup
	for i, a := range asks {
		wait.Go(func() {
			checks[i] = submit.Check{Name: a.name, OK: true}
			if err := a.ask(ctx); err != nil {
				checks[i].OK, checks[i].Message = false, fmt.Sprintf("%v; %s", err, a.remedy)
			}
		})
	}
	wait.Wait()
	return checks
}

// askAgent returns nil when the agent answers on its socket.
func (r readiness) askAgent(ctx context.Context) error {
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, localsocket.BaseURL+"/livez", nil)
	if err != nil {
		return err
	}
	response, err := r.agent.Do(request)
	if err != nil {
		return fmt.Errorf("ask the agent: %w", err)
	}
	defer response.Body.Close()
	text, _ := io.ReadAll(io.LimitReader(response.Body, 1<<10))
	if response.StatusCode != http.StatusOK {
		return fmt.Errorf("the agent says: %s", text)
	}
	return nil
}

// functionLogs are kept by the engine.
type functionLogs struct{ engine *control.Client }

func (l functionLogs) Logs(ctx context.Context, name string, follow bool, tail int, since time.Time) (io.ReadCloser, error) {
	if tail <= 0 {
		tail = -1 // none: to the engine, 0 means all
	}
	return l.engine.Logs(ctx, name, control.LogOptions{Follow: follow, Tail: tail, Since: since})
}
