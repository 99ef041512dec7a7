package engine

import (
	"context"
	"errors"
	"net"
	"net/http"
	"testing"
	"time"

	"github.com/hearth-sh/hearth/internal/engine/control"
)

func TestAnEngineThatIsToEndServesOnUntilOthersKnow(t *testing.T) {
	t.Parallel()
	probes, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	n := startNode(t, func(o *Options) {
		o.Probes = probes
		// Longer than a busy machine takes for the two requests that follow.
		o.ShutdownDelay = 10 * time.Second
	})
	n.deploy(n.function("c", "c", nil))
	ready := func() int {
		r, err := http.NewRequestWithContext(t.Context(), http.MethodGet, "http://"+probes.Addr().String()+"/readyz", nil)
		if err != nil {
			t.Fatal(err)
		}
		r.Close = true
		response, err := n.http.Do(r)
		if err != nil {
			t.Fatal(err)
		}
		_ = response.Body.Close()
		return response.StatusCode
	}
	if status := ready(); status != http.StatusOK {
		t.Fatalf("ready before: %d", status)
	}
	n.end()
	n.eventually("it is not ready any more", func() bool { return ready() == http.StatusServiceUnavailable })
	if a := n.get("c", "/env"); a.StatusCode != http.StatusOK || !a.Close {
		t.Errorf("%s, connection closed: %t; want an answer and the end of the connection", a.Status, a.Close)
	}
}

func TestARequestInFlightMayFinishWithinTheDrainLimit(t *testing.T) {
	t.Parallel()
	n := startNode(t, func(o *Options) { o.DrainLimit = patience })
	n.deploy(n.function("c", "c", func(f *control.Function) { f.TimeoutMS = 5000 }))
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	request := n.request(ctx, http.MethodGet, "c.localhost", "/spin", nil)
	answered := make(chan error, 1)
	go func() {
		response, err := n.http.Do(request)
		if err == nil {
			if response.StatusCode != http.StatusGatewayTimeout {
				err = errors.New(response.Status)
			}
			_ = response.Body.Close()
		}
		answered <- err
	}()
	n.awaitInFlight("c", 1)
	n.end()
	n.eventually("nobody is let in any more", func() bool {
		c, err := net.Dial("tcp", n.address)
		if err == nil {
			_ = c.Close()
		}
		return err != nil
	})
	// The guest's own end, not the engine's.
	if err := <-answered; err != nil {
		t.Error(err)
	}
}
