// Command imds-fake serves instance metadata for tests of whole machines: in a
// network namespace whose loopback has 169.254.169.254/32, cloud-init and the
// AWS SDKs find an EC2 instance.
//
//	imds-fake -listen 169.254.169.254:80 -config instance.json
//
// The file is imdstest.Config in JSON. SIGHUP reads it again, and with it the
// faults; tokens stay valid. Each request is one line on standard error.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"os"
	"os/signal"
	"strings"
	"syscall"

	"golang.org/x/sync/errgroup"

	"github.com/hearth-sh/hearth/internal/imds/imdstest"
)

func main() {
	if err := run(os.Args[1:]); err != nil && !errors.Is(err, flag.ErrHelp) {
		fmt.Fprintln(os.Stderr, "imds-fake:", err)
		os.Exit(1)
	}
}

func run(args []string) error {
	flags := flag.NewFlagSet("imds-fake", flag.ContinueOnError)
	listen := flags.String("listen", "127.0.0.1:1338", "comma-separated `addresses` to serve on")
	path := flags.String("config", "", "`file` that describes the instance (JSON); without one, a default arm64 Spot instance")
	if err := flags.Parse(args); err != nil {
		return err
	}
	if flags.NArg() > 0 {
		return fmt.Errorf("unknown argument %q; see -help", flags.Arg(0))
	}
	log := slog.New(slog.NewTextHandler(os.Stderr, nil))
	config, err := load(*path)
	if err != nil {
		return err
	}
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, syscall.SIGINT)
	defer stop()
	hangup := make(chan os.Signal, 1)
	signal.Notify(hangup, syscall.SIGHUP)
	defer signal.Stop(hangup)

	server := imdstest.New(config)
	logged := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		log.Info("request", "method", r.Method, "path", r.URL.Path, "from", r.RemoteAddr, "agent", r.UserAgent())
		server.ServeHTTP(w, r)
	})
	group, ctx := errgroup.WithContext(ctx)
	for address := range strings.SplitSeq(*listen, ",") {
		ln, err := (&net.ListenConfig{}).Listen(ctx, "tcp", address)
		if err != nil {
			return fmt.Errorf("listening: %w", err)
		}
		log.Info("serving instance metadata", "address", ln.Addr().String())
		group.Go(func() error { return imdstest.Serve(ctx, ln, logged, server.Close) })
	}
	group.Go(func() error {
		for {
			select {
			case <-ctx.Done():
				return nil
			case <-hangup:
				config, err := load(*path)
				if err != nil { // what was served stays right
					log.Error("the configuration was not read again", "error", err)
					continue
				}
				server.Reset(config)
				log.Info("read the configuration again")
			}
		}
	})
	return group.Wait()
}

// maxConfigBytes bounds the file.
const maxConfigBytes = 1 << 20

func load(path string) (imdstest.Config, error) {
	if path == "" {
		return imdstest.Default(), nil
	}
	b, err := os.ReadFile(path)
	if err != nil {
		return imdstest.Config{}, err
	}
	if len(b) > maxConfigBytes {
		return imdstest.Config{}, fmt.Errorf("%s has more than %d bytes", path, maxConfigBytes)
	}
	return imdstest.ParseConfig(b)
}
