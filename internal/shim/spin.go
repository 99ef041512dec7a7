package shim

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"time"
)

const (
	// askInterval is between attempts while Spin is starting.
	askInterval = 100 * time.Millisecond
	// askDeadline bounds one request; the proof's own deadline bounds all.
	askDeadline = 5 * time.Second
)

// httpAnswer is what a runtime said over HTTP.
type httpAnswer struct {
	body      []byte
	truncated bool
	err       error
}

// freeAddress finds a port of the loopback interface that nobody uses now.
// Another process may take it before the runtime does; the proof then fails
// as "start-failed" or, at worst, gets a wrong answer, and is tried again.
func freeAddress(ctx context.Context) (string, error) {
	listener, err := (&net.ListenConfig{}).Listen(ctx, "tcp", "127.0.0.1:0")
	if err != nil {
		return "", fmt.Errorf("finding a free port for the probe: %w", err)
	}
	defer listener.Close()
	return listener.Addr().String(), nil
}

// ask puts the nonce to the runtime's HTTP server as the query string until
// there is an answer: the wagi executor makes arguments of it. Refused and
// broken connections are a runtime that is still starting. At most maxOutput
// bytes are read.
func ask(ctx context.Context, address, nonce string) httpAnswer {
	transport := &http.Transport{DisableKeepAlives: true, Proxy: nil}
	client := &http.Client{Transport: transport, Timeout: askDeadline}
	defer transport.CloseIdleConnections()
	for {
		answer, err := askOnce(ctx, client, "http://"+address+"/?"+nonce)
		if err == nil {
			return answer
		}
		if pause(ctx, askInterval) != nil {
			return httpAnswer{err: fmt.Errorf("asking the runtime over HTTP: %w", errors.Join(context.Cause(ctx), err))}
		}
	}
}

func askOnce(ctx context.Context, client *http.Client, url string) (httpAnswer, error) {
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return httpAnswer{}, err
	}
	response, err := client.Do(request)
	if err != nil {
		return httpAnswer{}, err
	}
	defer response.Body.Close()
	body, err := io.ReadAll(io.LimitReader(response.Body, maxOutput+1))
	if err != nil {
		return httpAnswer{}, err
	}
	if response.StatusCode != http.StatusOK {
		// Something answers; asking again would not change its mind.
		return httpAnswer{err: fmt.Errorf("the runtime answered with HTTP status %d", response.StatusCode)}, nil
	}
	if len(body) > maxOutput {
		return httpAnswer{body: body[:maxOutput], truncated: true}, nil
	}
	return httpAnswer{body: body}, nil
}
