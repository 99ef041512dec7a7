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

// APIClient speaks with the API's node endpoints over its unix socket. It is
// both the Source and the Reporter of a node.
type APIClient struct {
	socket string
	http   *http.Client
}

var (
	_ Source   = (*APIClient)(nil)
	_ Reporter = (*APIClient)(nil)
)

// NewAPIClient makes a client of the API behind socket. Nothing is opened
// until the first call.
func NewAPIClient(socket string) *APIClient {
	return &APIClient{socket: socket, http: &http.Client{
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
	return d, err
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
	req, err := http.NewRequestWithContext(ctx, method, "http://api"+path, rd)
	if err != nil {
		return nil, err
	}
	if body != nil {
		req.Header.Set("Content-Type", "application/json")
	}
	resp, err := c.http.Do(req)
	if err != nil {
		// The URL is an invention; the socket is what a person can look at.
		if u := (*url.Error)(nil); errors.As(err, &u) {
			err = u.Err
		}
		return nil, fmt.Errorf("socket %s: %w", c.socket, err)
	}
	if resp.StatusCode/100 == 2 || resp.StatusCode == http.StatusNotModified {
		return resp, nil
	}
	defer resp.Body.Close()
	raw, _ := io.ReadAll(io.LimitReader(resp.Body, maxErrorBytes))
	var p v1alpha1.Problem
	if json.Unmarshal(raw, &p) == nil && p.Title != "" {
		return nil, fmt.Errorf("%s: %s %s", resp.Status, p.Title, p.Detail)
	}
	return nil, errors.New(resp.Status)
}
