package main

import (
	"context"
	"fmt"
	"net/url"
	"os"
	"os/exec"
	"runtime"
	"time"

	"github.com/urfave/cli/v2"

	"github.com/hearth-sh/hearth/api/v1alpha1"
)

// openWait bounds the program that opens a browser: it hands over and ends.
const openWait = 10 * time.Second

func openCommand() *cli.Command {
	return &cli.Command{
		Name:      "open",
		Usage:     "print a function's URL, and open it in the browser where there is one",
		ArgsUsage: "NAME",
		Description: "Opens nothing where no display is there, or where the output goes to a file or a pipe, so that " +
			"`curl \"$(nodeagent open hello)\"` works.",
		Flags: append([]cli.Flag{
			&cli.BoolFlag{Name: "print", Usage: "only print the URL", DisableDefaultText: true},
		}, apiFlags(ownerUsage)...),
		Action:       action(openAction),
		BashComplete: completeFunctions,
	}
}

func openAction(c *cli.Context) error {
	return withFunction(c, func(cl *connection, name string, _ bool) error {
		f, _, err := cl.Get(c.Context, name)
		if err != nil {
			return err
		}
		if f.URL == "" {
			return noURL(f)
		}
		fprintf(c.App.Writer, "%s\n", printable(f.URL))
		if f.ActiveRevision == 0 {
			fprintf(c.App.ErrWriter, "%s does not answer yet: it is %s\n", printable(name), printable(string(f.State)))
			return nil
		}
		if c.Bool("print") || !terminalOf(c.App.Writer).tty {
			return nil
		}
		return openBrowser(c.Context, f, os.Getenv, exec.LookPath)
	})
}

// openBrowser opens the function's URL if this machine has a display.
func openBrowser(ctx context.Context, f v1alpha1.Function, env func(string) string, lookPath func(string) (string, error)) error {
	program := browserProgram(runtime.GOOS, env)
	if program == "" {
		return nil
	}
	// The URL comes from the server: only what is surely one is handed on.
	u, err := url.Parse(f.URL)
	if err != nil || u.Scheme != "http" && u.Scheme != "https" || u.Host == "" {
		return fail(exitFailure, fmt.Sprintf("%q is no address for a browser", f.URL), "")
	}
	path, err := lookPath(program)
	if err != nil {
		return nil // the URL is printed: who has no such program opens it otherwise
	}
	ctx, cancel := context.WithTimeout(ctx, openWait)
	defer cancel()
	if out, err := exec.CommandContext(ctx, path, u.String()).CombinedOutput(); err != nil {
		return fail(exitFailure, fmt.Sprintf("%s could not open the browser: %v", program, err), printable(string(out[:min(len(out), 200)])))
	}
	return nil
}

// browserProgram is what opens a URL, "" where nobody would see it.
func browserProgram(goos string, env func(string) string) string {
	switch {
	case goos == "darwin":
		return "open"
	case env("DISPLAY") != "" || env("WAYLAND_DISPLAY") != "":
		return "xdg-open"
	}
	return ""
}
