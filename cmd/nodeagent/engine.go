package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math"
	"net"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/urfave/cli/v2"
	"golang.org/x/sys/unix"

	"github.com/hearth-sh/hearth/internal/command"
	"github.com/hearth-sh/hearth/internal/engine"
	"github.com/hearth-sh/hearth/internal/engine/worker"
	"github.com/hearth-sh/hearth/internal/paths"
	"github.com/hearth-sh/hearth/internal/sandbox"
)

// lifelineFlag tells a child at which descriptor it finds the pipe that ends
// it together with its parent.
func lifelineFlag() *cli.IntFlag {
	return &cli.IntFlag{
		Name:   "lifeline-fd",
		Usage:  "inherited descriptor of a pipe; this process ends when its other end closes (0: none)",
		Hidden: true,
	}
}

// holdLifeline obeys lifelineFlag.
func holdLifeline(c *cli.Context) error {
	if fd := c.Int("lifeline-fd"); fd > 0 {
		if err := sandbox.Lifeline(uintptr(fd)); err != nil {
			return fmt.Errorf("hold the lifeline: %w", err)
		}
	}
	return nil
}

func engineCommand() *cli.Command {
	dataDir := paths.DataDir()
	return &cli.Command{
		Name:     "engine",
		Category: "services",
		Usage:    "run the function engine: the HTTP gateway and the workers behind it",
		Description: "Started by `nodeagent dev`. The engine serves what the agent tells it to over --control-socket; " +
			"after a restart the agent tells it everything again.",
		Flags: []cli.Flag{
			&cli.StringFlag{Name: "listen", Usage: "`ADDRESS` on which functions (and the API, with --api-socket) are served", Value: "127.0.0.1:8080", EnvVars: []string{"HEARTH_LISTEN"}},
			&cli.IntFlag{Name: "listen-fd", Usage: "inherited descriptor of a listener, instead of --listen", Hidden: true},
			&cli.StringFlag{Name: "http-listen", Usage: "`ADDRESS` on which /livez, /readyz and /metrics answer, such as :9641; empty for none", EnvVars: []string{"HEARTH_ENGINE_HTTP_LISTEN"}},
			&cli.StringFlag{Name: "control-socket", Usage: "unix socket on which the agent feeds the engine", Value: paths.EngineSocket(dataDir)},
			&cli.StringFlag{Name: "api-socket", Usage: "unix socket of the submit API, to which /v1, /v2 and the like are passed on; empty for none"},
			&cli.StringFlag{Name: "base-domain", Usage: "`DOMAIN` below which each function has a host of its own", Value: "localhost", EnvVars: []string{"HEARTH_BASE_DOMAIN"}},
			&cli.StringFlag{Name: "store-dir", Usage: "the store of compiled functions (read only)", Value: filepath.Join(dataDir, "store")},
			&cli.StringFlag{Name: "log-dir", Usage: "where functions' logs are kept", Value: filepath.Join(dataDir, "logs")},
			&cli.BoolFlag{Name: "log-stdout", Usage: "write functions' logs to standard output as well, a JSON object a line, for those who collect logs of processes", EnvVars: []string{"HEARTH_ENGINE_LOG_STDOUT"}},
			isolationFlag(),
			workerMemoryFlag(),
			quotaInvocationsFlag(),
			endFlag("shutdown-delay", 0, 0, "how long to serve on, though not ready any more, when asked to end: load balancers learn of it with a delay"),
			endFlag("drain-limit", 5*time.Second, time.Second, "how long requests in flight may take after that"),
			command.LogLevelFlag("info"),
			lifelineFlag(),
		},
		Action: func(c *cli.Context) error {
			logger, err := command.Logger(c)
			if err != nil {
				return err
			}
			if err := holdLifeline(c); err != nil {
				return err
			}
			listener, err := listenerFrom(c)
			if err != nil {
				return err
			}
			probes, err := probeListener(c)
			if err != nil {
				_ = listener.Close() // the first error says it
				return err
			}
			if err := awaitDirectory(c.Context, filepath.Dir(c.String("control-socket")), logger); err != nil {
				return err
			}
			var logOutput io.Writer
			if c.Bool("log-stdout") {
				logOutput = os.Stdout
			}
			return engine.Run(c.Context, engine.Options{
				LogOutput:         logOutput,
				Listener:          listener,
				Probes:            probes,
				ControlSocket:     c.String("control-socket"),
				APISocket:         c.String("api-socket"),
				BaseDomain:        c.String("base-domain"),
				LogDir:            c.String("log-dir"),
				Isolation:         engine.Isolation(c.String("isolation")),
				WorkerCommand:     []string{sandbox.Executable(), "worker"},
				WorkerMemoryBytes: uint64(c.Int64("worker-memory")) << 20,
				TenantRate:        c.Float64("quota-invocations"),
				StoreDir:          filepath.Join(c.String("store-dir"), "objects"),
				ShutdownDelay:     c.Duration("shutdown-delay"),
				DrainLimit:        c.Duration("drain-limit"),
				Logger:            logger,
			})
		},
	}
}

// listenerFrom opens or inherits the public listener.
func listenerFrom(c *cli.Context) (net.Listener, error) {
	if fd := c.Int("listen-fd"); fd > 0 {
		file := os.NewFile(uintptr(fd), "listener")
		defer file.Close()
		listener, err := net.FileListener(file)
		if err != nil {
			return nil, fmt.Errorf("use inherited listener: %w", err)
		}
		return listener, nil
	}
	listener, err := (&net.ListenConfig{}).Listen(c.Context, "tcp", c.String("listen"))
	if err != nil {
		return nil, fmt.Errorf("listen on %s: %w; stop what uses it or choose another --listen", c.String("listen"), err)
	}
	return listener, nil
}

// probeListener opens --http-listen; nil without.
func probeListener(c *cli.Context) (net.Listener, error) {
	address := c.String("http-listen")
	if address == "" {
		return nil, nil
	}
	listener, err := (&net.ListenConfig{}).Listen(c.Context, "tcp", address)
	if err != nil {
		return nil, fmt.Errorf("listen on %s: %w; stop what uses it or choose another --http-listen", address, err)
	}
	return listener, nil
}

// directoryPatience is how long the engine of a node waits for the agent to
// hand over the directory of its control socket.
const directoryPatience = 2 * time.Minute

// awaitDirectory waits while dir exists and this user may not make a socket
// in it: in a pod the directory is made as root, and the agent hands it over.
func awaitDirectory(ctx context.Context, dir string, logger *slog.Logger) error {
	deadline := time.Now().Add(directoryPatience)
	for said := false; ; {
		err := unix.Access(dir, unix.W_OK|unix.X_OK)
		if !errors.Is(err, unix.EACCES) {
			return nil // there, or to be made, or a better error follows
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("no socket can be made in %s: %w; the agent hands it over with --engine-user", dir, err)
		}
		if !said {
			logger.Info("waiting for the agent to hand over the directory of the control socket", "directory", dir)
			said = true
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(500 * time.Millisecond):
		}
	}
}

func isolationFlag() *cli.StringFlag {
	return &cli.StringFlag{
		Name:    "isolation",
		Usage:   "which functions share a worker process: tenant (those of one tenant), function (none), shared (all)",
		Value:   string(engine.IsolationTenant),
		EnvVars: []string{"HEARTH_ISOLATION"},
		Action: func(_ *cli.Context, value string) error {
			switch engine.Isolation(value) {
			case engine.IsolationTenant, engine.IsolationFunction, engine.IsolationShared:
				return nil
			}
			return cli.Exit(fmt.Sprintf("--isolation %q is not one of tenant, function, shared", value), exitUsage)
		},
	}
}

// endFlag is how long a part of the engine's end may take.
func endFlag(name string, value, least time.Duration, usage string) *cli.DurationFlag {
	const most = time.Hour
	return &cli.DurationFlag{
		Name: name, Value: value, Usage: usage, EnvVars: []string{"HEARTH_ENGINE_" + strings.ToUpper(strings.ReplaceAll(name, "-", "_"))},
		Action: func(_ *cli.Context, value time.Duration) error {
			if value < least || value > most {
				return cli.Exit(fmt.Sprintf("--%s %s is not between %s and %s", name, value, least, most), exitUsage)
			}
			return nil
		},
	}
}

func workerMemoryFlag() *cli.Int64Flag {
	return &cli.Int64Flag{
		Name:    "worker-memory",
		Usage:   "`MIB` of memory one worker process may use before it is replaced (0: half of the machine's)",
		EnvVars: []string{"HEARTH_WORKER_MEMORY"},
		Action: func(_ *cli.Context, value int64) error {
			if value < 0 {
				return cli.Exit("--worker-memory cannot be negative", exitUsage)
			}
			return nil
		},
	}
}

// quotaInvocationsFlag bounds what visitors of one tenant take from others.
func quotaInvocationsFlag() *cli.Float64Flag {
	return &cli.Float64Flag{
		Name:    "quota-invocations",
		Usage:   "requests that the functions of one tenant answer a second on this node, on average, two seconds' worth at once (0: no limit)",
		EnvVars: []string{"HEARTH_QUOTA_INVOCATIONS"},
		Action: func(_ *cli.Context, value float64) error {
			if !(value >= 0) || math.IsInf(value, 0) {
				return cli.Exit(fmt.Sprintf("--quota-invocations %v is no rate; give requests a second, or 0 for no limit", value), exitUsage)
			}
			return nil
		},
	}
}

func workerCommand() *cli.Command {
	return &cli.Command{
		Name:   "worker",
		Usage:  "run guests of one tenant (started by the engine, not by people)",
		Hidden: true,
		Action: func(c *cli.Context) error { return exitWith(worker.Main(c.Context)) },
	}
}

// exitWith turns a child's exit code into what run expects.
func exitWith(code int) error {
	if code == 0 {
		return nil
	}
	return cli.Exit("", code)
}
