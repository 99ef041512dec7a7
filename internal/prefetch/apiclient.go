package prefetch

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
	"time"

	"github.com/hearth-sh/hearth/api/v1alpha1"
	"github.com/hearth-sh/hearth/internal/localsocket"
)

// pollWait is how long the API is asked to hold a poll for the desired state.
const pollWait = 30 * time.Second

// maxErrorBytes bounds what is read of an error answer.
const maxErrorBytes = 16 << 10

// APIClient speaks with the API's node endpoints: over its unix socket on one
// machine, over HTTPS on a cluster. It is both the Source and the Reporter of a
// node.
type APIClient struct {
	base  string // scheme and host
	where string // what a person can look at, for errors
	agent string // User-Agent; empty for Go's
	token *tokenFile
	http  *http.Client
}

var (
	_ Source   = (*APIClient)(nil)
	_ Reporter = (*APIClient)(nil)
)

// NewAPIClient makes a client of the API behind socket. Nothing is opened
// until the first call.
func NewAPIClient(socket string) *APIClient {
	return &APIClient{base: "http://api", where: "socket " + socket, http: &http.Client{
		Transport: &http.Transport{
			DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
				return localsocket.Dial(ctx, socket)
			},
			MaxIdleConnsPerHost: 2,
			IdleConnTimeout:     15 * time.Second,
		},
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}}
}

// Close drops idle connections.
func (c *APIClient) Close() { c.http.CloseIdleConnections() }

// Desired implements Source: GET /node/v1/desired.
func (c *APIClient) Desired(ctx context.Context, after uint64) (v1alpha1.Desired, error) {
	path := fmt.Sprintf("/node/v1/desired?after=%d&wait=%s", after, pollWait)
	resp, err := c.do(ctx, http.MethodGet, path, nil)
	if err != nil {
		return v1alpha1.Desired{}, fmt.Errorf("ask the API for the desired state: %w", err)
	}
	defer resp.Body.Close()
	if resp.StatusCode == http.StatusNoContent || resp.StatusCode == http.StatusNotModified {
		return v1alpha1.Desired{Generation: after}, nil
	}
	raw, err := io.ReadAll(io.LimitReader(resp.Body, maxDesiredBytes+1))
	if err != nil {
		return v1alpha1.Desired{}, fmt.Errorf("ask the API for the desired state: %w", err)
	}
	if len(raw) > maxDesiredBytes {
		return v1alpha1.Desired{}, fmt.Errorf("the desired state has more than %d bytes", maxDesiredBytes)
	}
	d, _, err := parseDesired(raw)
	if err == nil && d.Generation == 0 {
		err = errors.New("no generation")
	}
	if err != nil {
		// A document of something else, taken for an empty state, would end
		// every function.
		return v1alpha1.Desired{}, fmt.Errorf("the API at %s answered with what is no desired state: %w", c.where, err)
	}
	return d, nil
}

// Report implements Reporter: POST /node/v1/report.
func (c *APIClient) Report(ctx context.Context, r v1alpha1.NodeReport) error {
	body, err := json.Marshal(r)
	if err != nil {
		return fmt.Errorf("encode report: %w", err)
	}
	resp, err := c.do(ctx, http.MethodPost, "/node/v1/report", body)
	if err != nil {
		return fmt.Errorf("report to the API: %w", err)
	}
	return resp.Body.Close()
}

func (c *APIClient) do(ctx context.Context, method, path string, body []byte) (*http.Response, error) {
	var rd io.Reader
	if body != nil {
		rd = bytes.NewReader(body)
	}
	req, err := http.NewRequestWithContext(ctx, method, c.base+path, rd)
	if err != nil {
		return nil, err
	}
	if c.agent != "" {
		req.Header.Set("User-Agent", c.agent)
	}
	if c.token != nil {
		token, err := c.token.read()
		if err != nil {
			return nil, err
		}
		req.Header.Set("Authorization", "Bearer "+token)
	}
	if body != nil {
		req.Header.Set("Content-Type", "application/json")
	}
	resp, err := c.http.Do(req)
	if err != nil {
		// Of the URL of a socket only the socket is something to look at.
		if u := (*url.Error)(nil); errors.As(err, &u) {
			err = u.Err
		}
		return nil, fmt.Errorf("%s: %w", c.where, err)
	}
	if resp.StatusCode/100 == 2 || resp.StatusCode == http.StatusNotModified {
		return resp, nil
	}
	defer resp.Body.Close()
	raw, _ := io.ReadAll(io.LimitReader(resp.Body, maxErrorBytes))
	reason := errors.New(resp.Status)
	var p v1alpha1.Problem
	if json.Unmarshal(raw, &p) == nil && p.Title != "" {
		reason = fmt.Errorf("%s: %.200s %.1000s", resp.Status, p.Title, p.Detail)
	}
	if c.token == nil {
		return nil, reason
	}
	switch resp.StatusCode {
	case http.StatusUnauthorized:
		c.token.forget()
		return nil, fmt.Errorf("the API does not take this node's token: it is expired, for another audience, or of another cluster (%s): %w", c.token.path, reason)
	case http.StatusForbidden:
		return nil, fmt.Errorf("the API takes this node's token for one that may not speak for it: the agent runs as another ServiceAccount, or under a name (--node-name) that is not its node's: %w", reason)
	}
	return nil, fmt.Errorf("%s: %w", c.where, reason)
}
