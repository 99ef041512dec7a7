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
	return cli.Exit(fmt.Sprintf(format, args...), exitUsage)
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
		return fail(exitRefused, printable(problem.Error()), problemRemedy(problem))
	case errors.As(err, &unreachable):
		remedy := "start it with `nodeagent dev`, or say where it is with --url or HEARTH_URL"
		if errors.Is(err, context.DeadlineExceeded) {
			remedy = "`nodeagent status` says how the machine is; `nodeagent doctor` what to do about it"
		}
		return fail(exitUnreachable, err.Error(), remedy)
	case errors.As(err, &socket):
		return fail(exitUnreachable, err.Error(), "")
	}
	return fail(exitFailure, err.Error(), "")
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
	"function-not-ready":     "try again in a moment; `nodeagent functions get NAME` says how far it is",
	"function-out-of-memory": "raise the limit with `nodeagent functions set NAME --memory SIZE`",
	"deadline-exceeded":      "raise the limit with `nodeagent functions set NAME --timeout DURATION`, or make it faster",
	"too-many-requests":      "try again later, or raise `nodeagent functions set NAME --concurrency N`",
	"idempotency-mismatch":   "try again",
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

func urlFlag() cli.Flag {
	return &cli.StringFlag{
		Name: "url", EnvVars: []string{"HEARTH_URL"}, Value: client.DefaultURL,
		Usage: "`URL` of the server: http(s)://… or unix:///path/of/api.sock",
	}
}

func tenantFlag(usage string) cli.Flag {
	return &cli.StringFlag{Name: "tenant", EnvVars: []string{"HEARTH_TENANT"}, Usage: usage}
}

func waitFlag() cli.Flag {
	return &cli.DurationFlag{Name: "wait", Value: time.Minute, Usage: "how long to wait until it is ready, a `DURATION`; 0 returns as soon as it is durable"}
}

// newClient connects to --url. Retries are told on stderr: waiting in silence
// looks like a hang.
func newClient(c *cli.Context, p *progress) (*client.Client, error) {
	cl, err := client.New(client.Options{
		URL:       c.String("url"),
		UserAgent: "nodeagent/" + c.App.Version,
		OnRetry: func(err error, delay time.Duration) {
			if p != nil {
				p.note(fmt.Sprintf("%s; trying again in %s", printable(err.Error()), humanDuration(delay)))
			}
		},
	})
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

func noArguments(c *cli.Context) error {
	if c.NArg() > 0 {
		return usageError("%s takes no argument such as %q", c.Command.HelpName, c.Args().First())
	}
	return nil
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
	if c.NArg() > 0 {
		return
	}
	// A shell that waits for a server is worse than no suggestion.
	const completionWait = 300 * time.Millisecond
	ctx, cancel := context.WithTimeout(c.Context, completionWait)
	defer cancel()
	cl, err := newClient(c, nil)
	if err != nil {
		return
	}
	defer cl.Close()
	list, err := cl.List(ctx, "")
	if err != nil {
		return
	}
	for _, f := range list.Items {
		_, _ = fmt.Fprintln(c.App.Writer, printable(f.Name))
	}
}

// reorder moves options that come after arguments before them, so that
// `logs hello --follow` works: the flag package stops at the first argument. It
// also gives every option its full name.
// What follows -- stays as it is.
func reorder(app *cli.App, args []string) []string {
	if len(args) == 0 || args[len(args)-1] == generateCompletion {
		return args // the shell's request has to stay last
	}
	return append(args[:1:1], reorderLevel(app.Flags, app.Commands, args[1:])...)
}

func reorderLevel(flags []cli.Flag, commands []*cli.Command, args []string) []string {
	var options, arguments []string
	for i := 0; i < len(args); i++ {
		arg := args[i]
		if arg == "--" {
			arguments = append(arguments, args[i:]...)
			break
		}
		if len(arg) > 1 && arg[0] == '-' {
			name, value, explicit := strings.Cut(strings.TrimLeft(arg, "-"), "=")
			f := flagNamed(flags, name)
			if f == nil {
				options = append(options, arg)
				continue
			}
			// The library refuses two forms of one option (-e A=1 --env B=2).
			arg = "--" + f.Names()[0]
			if explicit {
				arg += "=" + value
			}
			options = append(options, arg)
			if _, isBool := f.(*cli.BoolFlag); !isBool && !explicit && i+1 < len(args) {
				i++
				options = append(options, args[i])
			}
			continue
		}
		if len(commands) > 0 {
			// The rest belongs to the command.
			rest := args[i+1:]
			for _, command := range commands {
				if command.HasName(arg) {
					rest = reorderLevel(command.Flags, command.Subcommands, rest)
					break
				}
			}
			return slices.Concat(options, []string{arg}, rest)
		}
		arguments = append(arguments, arg)
	}
	if slices.Contains(options, "--help") || slices.Contains(options, "-h") {
		arguments = nil // the library would take one for a topic of its help
	}
	if len(options) > 0 && len(arguments) > 0 && strings.HasPrefix(arguments[0], "-") && arguments[0] != "--" {
		arguments = slices.Concat([]string{"--"}, arguments)
	}
	return slices.Concat(options, arguments)
}

func flagNamed(flags []cli.Flag, name string) cli.Flag {
	for _, f := range flags {
		if slices.Contains(f.Names(), name) {
			return f
		}
	}
	return nil
}

// prepare gives every command the same manners: wrong usage is one sentence
// and exit code 2 instead of a page of help, and a group of commands without
// a command shows what there is.
func prepare(app *cli.App) *cli.App {
	app.HideHelpCommand = true
	app.Suggest = false // the library's own comes with a page of help on stdout
	app.ExitErrHandler = func(*cli.Context, error) {}
	app.OnUsageError = usageHint
	app.Action = groupAction(app.Name, app.Commands, cli.ShowAppHelp)
	var walk func(prefix string, commands []*cli.Command)
	walk = func(prefix string, commands []*cli.Command) {
		for _, command := range commands {
			name := prefix + " " + command.Name
			command.OnUsageError = usageHint
			command.HideHelpCommand = true
			if len(command.Subcommands) > 0 && command.Action == nil {
				command.Action = groupAction(name, command.Subcommands, cli.ShowSubcommandHelp)
			}
			walk(name, command.Subcommands)
		}
	}
	walk(app.Name, app.Commands)
	return app
}

func usageHint(c *cli.Context, err error, _ bool) error {
	name := c.App.Name
	if c.Command != nil && c.Command.HelpName != "" {
		name = c.Command.HelpName
	}
	return fail(exitUsage, err.Error(), "see `"+name+" --help`")
}

func groupAction(name string, commands []*cli.Command, help func(*cli.Context) error) cli.ActionFunc {
	return func(c *cli.Context) error {
		if c.NArg() == 0 {
			return help(c)
		}
		remedy := "see `" + name + " --help`"
		if nearest := nearestCommand(commands, c.Args().First()); nearest != "" {
			remedy = fmt.Sprintf("did you mean `%s %s`?", name, nearest)
		}
		return fail(exitUsage, fmt.Sprintf("%s has no command %q", name, c.Args().First()), remedy)
	}
}

// nearestCommand returns the visible command that is one or two typing
// mistakes away, or "".
func nearestCommand(commands []*cli.Command, typed string) string {
	best, nearest := 3, ""
	for _, command := range commands {
		if command.Hidden {
			continue
		}
		for _, name := range command.Names() {
			if d := editDistance(typed, name); d < best && d < len(name) {
				best, nearest = d, command.Name
			}
		}
	}
	return nearest
}

// editDistance is the Levenshtein distance in bytes; inputs are a command's
// name and what was typed instead, cut to a length where it could matter.
func editDistance(a, b string) int {
	const longest = 32
	a, b = a[:min(len(a), longest)], b[:min(len(b), longest)]
	row := make([]int, len(b)+1)
	for j := range row {
		row[j] = j
	}
	for i := range len(a) {
		diagonal := row[0]
		row[0] = i + 1
		for j := range len(b) {
			cost := diagonal
			if a[i] != b[j] {
				cost++
			}
			diagonal = row[j+1]
			row[j+1] = min(cost, row[j]+1, row[j+1]+1)
		}
	}
	return row[len(b)]
}
