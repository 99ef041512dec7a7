package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math"
	"os"
	"slices"
	"strings"
	"text/tabwriter"
	"time"
	"unicode"

	"github.com/urfave/cli/v2"
	"golang.org/x/term"

	"github.com/hearth-sh/hearth/api/v1alpha1"
	"github.com/hearth-sh/hearth/internal/client"
	"github.com/hearth-sh/hearth/internal/command"
	"github.com/hearth-sh/hearth/internal/localsocket"
)

// Exit codes of the commands that people and scripts use. They are a contract:
// see docs/cli.md. exitUsage (2) is main's.
const (
	exitFailure     = 1
	exitDegraded    = 3   // status: degraded; doctor: warnings only
	exitFailed      = 4   // status: failed; doctor: something is broken
	exitUnreachable = 5   // nothing answers where it was looked for
	exitRefused     = 6   // the server refused, or the revision failed
	exitNotReady    = 7   // accepted, but not ready within --wait
	exitStatus4xx   = 8   // invoke: the function answered 4xx
	exitStatus5xx   = 9   // invoke: the function, or the gateway for it, answered 5xx
	exitInterrupted = 130 // Ctrl-C, as shells say it (128 + SIGINT)
)

// exitCodes is the table in docs/cli.md.
var exitCodes = []struct {
	code    int
	meaning string
}{
	{0, "done; `status`: healthy; `doctor`: nothing to do"},
	{exitFailure, "failed for a reason of this machine: a file, a build, the disk"},
	{exitUsage, "the command line makes no sense"},
	{exitDegraded, "`status`: degraded; `doctor`: warnings"},
	{exitFailed, "`status`: failed; `doctor`: something is broken"},
	{exitUnreachable, "nothing answers at the URL or the socket"},
	{exitRefused, "the server refused the request, or the new revision cannot be served"},
	{exitNotReady, "accepted and durable, but not ready within `--wait`"},
	{exitStatus4xx, "`invoke`: the answer's status is 4xx"},
	{exitStatus5xx, "`invoke`: the answer's status is 5xx"},
	{exitInterrupted, "interrupted with Ctrl-C"},
}

// fail ends a command with an exit code and one sentence, followed by what to
// do about it on a line of its own.
func fail(code int, message, remedy string) error {
	if remedy != "" {
		message += "\n  " + remedy
	}
	return cli.Exit(message, code)
}

func usageError(format string, args ...any) error {
	return command.UsageError(format, args...)
}

// action turns what a command returns into an exit code and a sentence.
func action(f func(*cli.Context) error) cli.ActionFunc {
	return func(c *cli.Context) error { return explain(c.Context, f(c)) }
}

func explain(ctx context.Context, err error) error {
	if err == nil {
		return nil
	}
	var exit cli.ExitCoder
	if errors.As(err, &exit) {
		return err
	}
	var (
		problem     *client.ProblemError
		unreachable *client.UnreachableError
		socket      *localsocket.Error
	)
	switch {
	case ctx.Err() != nil && !errors.Is(ctx.Err(), context.DeadlineExceeded):
		return cli.Exit("interrupted", exitInterrupted)
	case errors.As(err, &problem):
		return fail(exitRefused, printable(problem.Error()), lines(problemRemedy(problem), asked(problem.API)))
	case errors.As(err, &unreachable):
		return fail(exitUnreachable, err.Error(), unreachableRemedy(unreachable))
	case errors.As(err, &socket):
		return fail(exitUnreachable, err.Error(), "")
	}
	return fail(exitFailure, err.Error(), "")
}

// lines joins what is not empty, each on a line of its own.
func lines(parts ...string) string {
	return strings.Join(slices.DeleteFunc(parts, func(s string) bool { return s == "" }), "\n  ")
}

// remedies are by problem code; see submit.Problems.
var remedies = map[string]string{
	"invalid-name":           "a name has up to 63 lower case letters, digits and hyphens, and begins with a letter",
	"function-not-found":     "`nodeagent functions list` shows what there is",
	"revision-not-found":     "`nodeagent functions revisions NAME` shows what there is",
	"name-taken":             "choose another name with --name, or give the tenant it belongs to with --tenant",
	"no-rollback-target":     "`nodeagent functions revisions NAME` shows what there is; choose one with --to",
	"precondition-failed":    "somebody else changed it meanwhile: look at it, then try again",
	"module-too-large":       "strip it, e.g. -ldflags='-s -w' with Go or wasm-opt -Oz",
	"not-wasm":               "submit a .wasm file, or the directory of a Go module",
	"component-unsupported":  "build a core module for wasip1 instead, e.g. GOOS=wasip1 GOARCH=wasm go build",
	"native-artifact":        "submit the .wasm it was compiled from",
	"malformed-module":       "the file may be cut short: build or copy it again",
	"invalid-module":         "build it again with a released compiler",
	"unsupported-import":     "build for WASI preview 1 (wasip1), without other host functions",
	"unsupported-feature":    "switch the feature off when compiling",
	"memory-over-limit":      "raise the limit with --memory, or build with a smaller initial memory",
	"no-start-function":      "build a command with a main function (it exports _start), not a library",
	"image-not-found":        "look at the image's name; the server, not this machine, has to reach its registry",
	"registry-unauthorized":  "make the image public, or pull it here and submit the .wasm file",
	"disk-full":              "free some space on the server's disk, then try again",
	"registry-unavailable":   "see `nodeagent status` on the server, then try again",
	"not-ready":              "see `nodeagent status` on the server, then try again",
	"revision-failed":        "see `nodeagent functions get NAME`; submit what is put right, or go back with `nodeagent functions rollback NAME`",
	"function-not-ready":     "try again in a moment; `nodeagent functions get NAME` says how far it is",
	"function-out-of-memory": "raise the limit with `nodeagent functions set NAME --memory SIZE`",
	"deadline-exceeded":      "raise the limit with `nodeagent functions set NAME --timeout DURATION`, or make it faster",
	"too-many-requests":      "try again later, or raise `nodeagent functions set NAME --concurrency N`",
	"idempotency-mismatch":   "try again",
	"unauthorized":           "give a token with --token-file or HEARTH_TOKEN (`nodeagent token` makes one), or a kubeconfig with --cluster",
	"forbidden":              "an administrator of the tenant's namespace can grant it, on functions.hearth.sh; --tenant names another tenant",
	"quota-exceeded":         "delete functions that are not needed, or ask an administrator for more",
	"tenant-not-found":       "on a cluster a tenant is a namespace: choose one that exists with --tenant, or have it made",
	"runtime-unsupported":    "leave out --runtime, --host, --route, --node-selector and what is about pods, or submit to a cluster that has them (--cluster)",
	"too-many-changes":       "try again later",
	"too-many-api-requests":  "try again later, or ask an administrator for more",
	"access-unavailable":     "try again in a moment; if it stays so, the cluster's API server does not answer the API",
	"not-installed":          "install Hearth's chart, which brings the custom resources",
	"unsupported-media-type": "the server may be older than this command: compare `nodeagent --version` on both",
	"unknown-parameter":      "the server may be older than this command: compare `nodeagent --version` on both",
}

// problemRemedy says what a person can do about a refusal. The document's
// detail says what is wrong; this is the next step.
func problemRemedy(p *client.ProblemError) string {
	remedy := remedies[p.Code()]
	switch {
	case strings.Contains(p.Detail, "`nodeagent "):
		return "" // it says so itself
	case remedy != "":
		return remedy
	case p.RetryAfter > 0:
		return fmt.Sprintf("try again in %s", humanDuration(p.RetryAfter))
	case p.Retryable:
		return "the same command can succeed later: try again"
	case p.Instance != "":
		return "look for " + printable(p.Instance) + " in the server's log"
	}
	return ""
}

// terminal is what is known of where a command writes.
type terminal struct {
	tty    bool
	colour bool
	width  int
}

func terminalOf(w io.Writer) terminal {
	f, ok := w.(*os.File)
	if !ok || !term.IsTerminal(int(f.Fd())) {
		return terminal{}
	}
	t := terminal{tty: true, width: 80}
	if width, _, err := term.GetSize(int(f.Fd())); err == nil && width > 0 {
		t.width = width
	}
	// https://no-color.org: any value but the empty one counts.
	t.colour = os.Getenv("NO_COLOR") == "" && os.Getenv("TERM") != "dumb"
	return t
}

// ANSI colours; all codes have the same length, which keeps tabwriter's
// columns straight as long as a column has one in every cell.
const (
	plain  = 39
	red    = 31
	green  = 32
	yellow = 33
	cyan   = 36
)

func (t terminal) paint(colour int, s string) string {
	if !t.colour {
		return s
	}
	return fmt.Sprintf("\x1b[%dm%s\x1b[0m", colour, s)
}

func stateColour(state string) int {
	switch state {
	case "ready", "ok", "healthy", "running":
		return green
	case "pending", "unknown", "degraded", "warning", "skipped":
		return yellow
	case "failed", "failing", "broken":
		return red
	}
	return plain
}

// newTable writes columns two spaces apart; the caller flushes it.
func newTable(w io.Writer) *tabwriter.Writer { return tabwriter.NewWriter(w, 0, 4, 2, ' ', 0) }

// printJSON writes v for scripts. Nothing of HTML is escaped: URLs with & stay
// readable.
func printJSON(w io.Writer, v any) error {
	encoder := json.NewEncoder(w)
	encoder.SetEscapeHTML(false)
	encoder.SetIndent("", "  ")
	return encoder.Encode(v)
}

func outputFlag() cli.Flag {
	return &cli.StringFlag{Name: "output", Aliases: []string{"o"}, Value: "text", Usage: "`FORMAT` of what is printed: text or json"}
}

// wantsJSON reads --output.
func wantsJSON(c *cli.Context) (bool, error) {
	switch c.String("output") {
	case "text":
		return false, nil
	case "json":
		return true, nil
	}
	return false, usageError("--output %q is not one of text, json", c.String("output"))
}

// urlFlag is for commands that ask about the API of this machine only.
func urlFlag() cli.Flag {
	return &cli.StringFlag{
		Name: "api", Aliases: []string{"url"}, EnvVars: []string{"HEARTH_API", "HEARTH_URL"}, Value: client.DefaultURL,
		Usage: "`URL` of this machine's API: http(s)://… or unix:///path/of/api.sock",
	}
}

func waitFlag() cli.Flag {
	return &cli.DurationFlag{Name: "wait", Value: time.Minute, Usage: "how long to wait until it is ready, a `DURATION`; 0 returns as soon as it is durable"}
}

// machineClient speaks to the API of this machine, as urlFlag says.
func machineClient(c *cli.Context) (*client.Client, error) {
	cl, err := client.New(client.Options{URL: c.String("api"), UserAgent: "nodeagent/" + c.App.Version})
	if err != nil {
		return nil, cli.Exit(err.Error(), exitUsage)
	}
	return cl, nil
}

// functionArgument is the command's only argument.
func functionArgument(c *cli.Context) (string, error) {
	switch {
	case c.NArg() == 0 || c.Args().First() == "":
		return "", usageError("say which function: %s NAME", c.Command.HelpName)
	case c.NArg() > 1:
		return "", usageError("%s takes one function, not also %q", c.Command.HelpName, c.Args().Get(1))
	}
	return c.Args().First(), nil
}

// nowOf is the app's clock, which tests set.
func nowOf(c *cli.Context) time.Time {
	if now, ok := c.App.Metadata["now"].(func() time.Time); ok {
		return now()
	}
	return time.Now()
}

// printable makes text from elsewhere safe for a terminal: control characters
// become visible instead of moving the cursor or worse.
func printable(s string) string {
	if !strings.ContainsFunc(s, unprintable) {
		return s
	}
	var b strings.Builder
	for _, r := range s {
		if unprintable(r) {
			fmt.Fprintf(&b, `\x%02x`, r)
		} else {
			b.WriteRune(r)
		}
	}
	return b.String()
}

func unprintable(r rune) bool {
	// Format characters include those that reverse the writing direction.
	return r != '\t' && (unicode.IsControl(r) || unicode.Is(unicode.Cf, r))
}

func humanBytes[N int | int64 | uint64](n N) string {
	v := float64(n)
	for _, unit := range []string{"B", "KiB", "MiB", "GiB", "TiB"} {
		if v < 1024 || unit == "TiB" {
			if unit == "B" || v >= 99.95 {
				return fmt.Sprintf("%.0f %s", v, unit)
			}
			return fmt.Sprintf("%.1f %s", v, unit)
		}
		v /= 1024
	}
	return ""
}

func humanMilliseconds(ms float64) string {
	switch {
	case ms < 0.95:
		return fmt.Sprintf("%.2f ms", ms)
	case ms < 9.95:
		return fmt.Sprintf("%.1f ms", ms)
	case ms < 999.5:
		return fmt.Sprintf("%.0f ms", ms)
	}
	return fmt.Sprintf("%.1f s", ms/1000)
}

// humanDuration is short and has one or two units.
func humanDuration(d time.Duration) string {
	switch {
	case d < time.Second:
		return humanMilliseconds(float64(d) / float64(time.Millisecond))
	case d < time.Minute:
		return fmt.Sprintf("%d s", int(math.Round(d.Seconds())))
	case d < time.Hour:
		return fmt.Sprintf("%d min", int(d.Minutes()))
	case d < 48*time.Hour:
		return fmt.Sprintf("%d h %d min", int(d.Hours()), int(d.Minutes())%60)
	}
	return fmt.Sprintf("%d days", int(d.Hours()/24))
}

func age(now, t time.Time) string {
	if t.IsZero() {
		return "-"
	}
	return humanDuration(max(0, now.Sub(t)))
}

func phaseLine(phases []v1alpha1.Phase) string {
	parts := make([]string, 0, len(phases)+1)
	var total float64
	for _, p := range phases {
		parts = append(parts, printable(p.Name)+" "+humanMilliseconds(p.Milliseconds))
		total += p.Milliseconds
	}
	if len(phases) > 1 {
		parts = append(parts, "together "+humanMilliseconds(total))
	}
	return strings.Join(parts, " · ")
}

// shortDigest keeps enough of a digest to tell revisions apart.
func shortDigest(digest string) string {
	if algorithm, hex, ok := strings.Cut(digest, ":"); ok && len(hex) > 12 {
		return printable(algorithm + ":" + hex[:12])
	}
	return printable(digest)
}

// completeFunctions offers the names of functions to the shell.
func completeFunctions(c *cli.Context) {
	// The library looks there, too: a word that was begun is not in c.
	if n := len(os.Args); n > 2 && strings.HasPrefix(os.Args[n-2], "-") {
		cli.DefaultCompleteWithFlags(c.Command)(c)
		return
	}
	if c.NArg() > 0 {
		return
	}
	// A shell that waits for a server is worse than no suggestion. The way to
	// a cluster is longer, and worth a moment.
	const (
		completionWait        = 300 * time.Millisecond
		clusterCompletionWait = 2 * time.Second
	)
	wait := completionWait
	if choice, err := apiOf(c); err != nil {
		return
	} else if choice.Cluster {
		wait = clusterCompletionWait
	}
	ctx, cancel := context.WithTimeout(c.Context, wait)
	defer cancel()
	cl, err := connectAPI(ctx, c, nil, false)
	if err != nil {
		return
	}
	defer cl.Close()
	list, err := cl.List(ctx, cl.tenant)
	if err != nil {
		return
	}
	for _, f := range list.Items {
		_, _ = fmt.Fprintln(c.App.Writer, printable(f.Name))
	}
}
