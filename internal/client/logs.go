package client

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"strconv"
	"time"

	"github.com/cenkalti/backoff/v5"

	"github.com/hearth-sh/hearth/api/v1alpha1"
)

const (
	// maxLogLine bounds one line of NDJSON: a guest's line is at most 16 KiB,
	// which JSON can blow up sixfold.
	maxLogLine = 256 << 10
	// reconnectTail is how many past lines a reconnect asks for, to find
	// those that were written meanwhile.
	reconnectTail = 1000
	// reconnectOverlap is how far out of order lines of concurrent requests
	// may be written.
	reconnectOverlap = 2 * time.Second
)

// LogOptions say which lines of a log are wanted.
type LogOptions struct {
	// Follow goes on with new lines until the context ends.
	Follow bool
	// Tail is how many past lines to begin with; negative: the server's default.
	Tail int
	// Since leaves out older lines unless it is zero.
	Since time.Time
}

// Logs calls line for each log line in order. With Follow it connects again
// when the connection breaks and goes on where it was, without repeating
// lines, until ctx ends (nil is returned then) or the server refuses.
func (c *Client) Logs(ctx context.Context, name string, o LogOptions, line func(v1alpha1.LogLine) error) error {
	seen := &position{}
	delays := &backoff.ExponentialBackOff{
		InitialInterval: firstDelay, RandomizationFactor: 0.3, Multiplier: 2, MaxInterval: maxDelay,
	}
	delays.Reset()
	connected := false
	for {
		got := false
		err := c.stream(ctx, name, o, func(l v1alpha1.LogLine) error {
			got = true
			if !seen.advance(l) {
				return nil
			}
			return line(l)
		}, &connected)
		var stop *callerError
		switch {
		case errors.As(err, &stop):
			return stop.err
		case ctx.Err() != nil && o.Follow:
			return nil
		case !o.Follow:
			return err
		case err != nil && !connected:
			return err
		}
		// A refusal is final; a server that is restarting is not.
		var problem *ProblemError
		if errors.As(err, &problem) && !problem.Retryable {
			return err
		}
		if got {
			delays.Reset()
		}
		delay := delays.NextBackOff()
		if err == nil {
			err = errors.New("the connection ended")
		}
		if c.o.OnRetry != nil {
			c.o.OnRetry(err, delay)
		}
		if c.o.Sleep(ctx, delay) != nil {
			return nil //nolint:nilerr // the caller ended following
		}
		seen.reconnect()
		if !seen.last.IsZero() {
			o.Since = seen.last.Add(-reconnectOverlap)
		}
		o.Tail = reconnectTail
	}
}

// callerError carries what the caller's function returned.
type callerError struct{ err error }

func (e *callerError) Error() string { return e.err.Error() }

func (c *Client) stream(ctx context.Context, name string, o LogOptions, line func(v1alpha1.LogLine) error, connected *bool) error {
	q := url.Values{"follow": {strconv.FormatBool(o.Follow)}}
	if o.Tail >= 0 {
		q.Set("tail", strconv.Itoa(o.Tail))
	}
	if !o.Since.IsZero() {
		q.Set("since", o.Since.UTC().Format(time.RFC3339Nano))
	}
	if !o.Follow {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, shortCall)
		defer cancel()
	}
	k := call{
		method: http.MethodGet, path: functionPath(name, "logs"), query: q,
		header: http.Header{"Accept": {"application/x-ndjson, application/problem+json"}},
	}
	resp, err := c.do(ctx, k)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	*connected = true
	scanner := bufio.NewScanner(resp.Body)
	scanner.Buffer(make([]byte, 0, 8<<10), maxLogLine)
	for scanner.Scan() {
		if len(scanner.Bytes()) == 0 {
			continue // keep-alive
		}
		var l v1alpha1.LogLine
		if err := json.Unmarshal(scanner.Bytes(), &l); err != nil {
			return fmt.Errorf("the log of %s has a line that is not JSON: %w", name, err)
		}
		if err := line(l); err != nil {
			return &callerError{err}
		}
	}
	if err := scanner.Err(); err != nil {
		if ctx.Err() != nil {
			return contextError(ctx, c.o.Name)
		}
		return &UnreachableError{URL: c.o.Name, Err: fmt.Errorf("the log broke off: %w", err)}
	}
	return nil
}

// position remembers the last lines passed on, so that those sent again after
// a reconnect are told from new ones. Times alone do not do: several lines can
// bear the same, and lines of concurrent requests may be slightly out of order.
type position struct {
	last   time.Time
	recent []lineKey // ring of the last reconnectTail lines
	next   int
	// repeats counts the lines that the present connection may send again.
	repeats map[lineKey]int
}

// lineKey is a LogLine that can be compared, which a time.Time cannot.
type lineKey struct {
	nanos                           int64
	revision                        int
	function, request, stream, line string
}

// reconnect prepares for lines that are sent again.
func (p *position) reconnect() {
	p.repeats = make(map[lineKey]int, len(p.recent))
	for _, k := range p.recent {
		p.repeats[k]++
	}
}

// advance says whether the line is new, and remembers it.
func (p *position) advance(l v1alpha1.LogLine) bool {
	k := lineKey{l.Time.UnixNano(), l.Revision, l.Function, l.Request, l.Stream, l.Line}
	if p.repeats[k] > 0 {
		p.repeats[k]--
		return false
	}
	if l.Time.After(p.last) {
		p.last = l.Time
	}
	if len(p.recent) < reconnectTail {
		p.recent = append(p.recent, k)
	} else {
		p.recent[p.next] = k
		p.next = (p.next + 1) % reconnectTail
	}
	return true
}
