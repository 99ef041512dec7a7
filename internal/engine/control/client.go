package control

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"strconv"
	"time"

	dto "github.com/prometheus/client_model/go"
	"github.com/prometheus/common/expfmt"
	"github.com/prometheus/common/model"

	"github.com/hearth-sh/hearth/api/v1alpha1"
	"github.com/hearth-sh/hearth/internal/localsocket"
)

const (
	// callTimeout bounds calls that only touch memory on the other side. The
	// engine shares two cores with guests; five seconds is far beyond any
	// scheduling delay and still short for a person who waits.
	callTimeout = 5 * time.Second
	// maxStatusBytes and maxMetricsBytes bound answers; the engine is trusted,
	// a wrong socket is not.
	maxStatusBytes  = 64 << 20
	maxMetricsBytes = 16 << 20
	// maxProblemBytes bounds an error answer.
	maxProblemBytes = 64 << 10
)

// LogOptions selects lines of a function's log.
type LogOptions struct {
	// Follow keeps the stream open for new lines.
	Follow bool
	// Tail gives only the newest lines kept, at most MaxLogTail; 0 means all
	// that are kept, a negative value none (only new ones, with Follow).
	Tail int
	// Since drops older lines when not zero.
	Since time.Time
}

// Error is an answer of the engine other than success.
type Error struct {
	v1alpha1.Problem
}

// Error gives the problem's detail, or its title where there is none.
func (e *Error) Error() string {
	if e.Detail != "" {
		return e.Detail
	}
	return e.Title
}

// Client speaks with one engine. It is safe for concurrent use and holds no
// connection that needs closing beyond CloseIdle.
type Client struct {
	socket string
	http   *http.Client
}

// NewClient makes a client of the engine behind the unix socket. Nothing is
// opened until the first call.
func NewClient(socket string) *Client {
	return &Client{
		socket: socket,
		http: &http.Client{Transport: &http.Transport{
			DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
				return localsocket.Dial(ctx, socket)
			},
			MaxIdleConnsPerHost: 2,
			// Below the engine's own idle timeout, so that it is this side
			// that closes and a call never races with a close.
			IdleConnTimeout: 15 * time.Second,
		}},
	}
}

// CloseIdle closes connections that are not in use.
func (c *Client) CloseIdle() { c.http.CloseIdleConnections() }

// PutState replaces everything the engine serves. It returns when the engine
// accepted the State, long before functions are warm: watch Status for that.
func (c *Client) PutState(ctx context.Context, s State) error {
	body, err := json.Marshal(s)
	if err != nil {
		return fmt.Errorf("encode the engine's state: %w", err)
	}
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	resp, err := c.do(ctx, http.MethodPut, PathState, bytes.NewReader(body))
	if err != nil {
		return err
	}
	return resp.Body.Close()
}

// Status answers at once when the engine's status version differs from after,
// else when it changes or wait (at most MaxStatusWait) is over. after 0 never
// waits.
func (c *Client) Status(ctx context.Context, after uint64, wait time.Duration) (Status, error) {
	wait = min(max(wait, 0), MaxStatusWait)
	ctx, cancel := context.WithTimeout(ctx, wait+callTimeout)
	defer cancel()
	q := url.Values{}
	q.Set("after", strconv.FormatUint(after, 10))
	q.Set("wait", wait.String())
	resp, err := c.do(ctx, http.MethodGet, PathStatus+"?"+q.Encode(), nil)
	if err != nil {
		return Status{}, err
	}
	defer resp.Body.Close()
	var s Status
	if err := json.NewDecoder(io.LimitReader(resp.Body, maxStatusBytes)).Decode(&s); err != nil {
		return Status{}, fmt.Errorf("read the engine's status: %w", err)
	}
	return s, nil
}

// Logs streams a function's log as NDJSON, one v1alpha1.LogLine a line, oldest
// first. The stream ends when ctx does, when Close is called, and, unless
// Follow is set, after the last line kept. A follower that does not read loses
// lines rather than slow the engine down.
func (c *Client) Logs(ctx context.Context, function string, o LogOptions) (io.ReadCloser, error) {
	q := url.Values{}
	if o.Follow {
		q.Set("follow", "true")
	}
	if o.Tail != 0 {
		q.Set("tail", strconv.Itoa(min(o.Tail, MaxLogTail)))
	}
	if !o.Since.IsZero() {
		q.Set("since", o.Since.UTC().Format(time.RFC3339Nano))
	}
	resp, err := c.do(ctx, http.MethodGet, PathLogs+url.PathEscape(function)+"?"+q.Encode(), nil)
	if err != nil {
		return nil, err
	}
	return resp.Body, nil
}

// Metrics gathers the engine's metrics.
func (c *Client) Metrics(ctx context.Context) ([]*dto.MetricFamily, error) {
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	resp, err := c.do(ctx, http.MethodGet, PathMetrics, nil)
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	parser := expfmt.NewTextParser(model.UTF8Validation)
	families, err := parser.TextToMetricFamilies(io.LimitReader(resp.Body, maxMetricsBytes))
	if err != nil {
		return nil, fmt.Errorf("read the engine's metrics: %w", err)
	}
	all := make([]*dto.MetricFamily, 0, len(families))
	for _, f := range families {
		all = append(all, f)
	}
	return all, nil
}

func (c *Client) do(ctx context.Context, method, path string, body io.Reader) (*http.Response, error) {
	req, err := http.NewRequestWithContext(ctx, method, "http://engine"+path, body)
	if err != nil {
		return nil, fmt.Errorf("ask the engine: %w", err)
	}
	if body != nil {
		req.Header.Set("Content-Type", "application/json")
	}
	resp, err := c.http.Do(req)
	if err != nil {
		// The URL in the client's error is an invention; the socket is what
		// a person can look at.
		if u := (*url.Error)(nil); errors.As(err, &u) {
			err = u.Err
		}
		return nil, fmt.Errorf("ask the engine at %s: %w", c.socket, err)
	}
	if resp.StatusCode >= 200 && resp.StatusCode < 300 {
		return resp, nil
	}
	defer resp.Body.Close()
	e := &Error{}
	raw, _ := io.ReadAll(io.LimitReader(resp.Body, maxProblemBytes))
	if json.Unmarshal(raw, &e.Problem) != nil || e.Title == "" {
		e.Problem = v1alpha1.Problem{Title: resp.Status}
	}
	e.Status = resp.StatusCode
	return nil, e
}
