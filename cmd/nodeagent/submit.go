package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/urfave/cli/v2"

	"github.com/hearth-sh/hearth/api/v1alpha1"
	"github.com/hearth-sh/hearth/internal/client"
)

// maxNameBytes is the length of a DNS label.
const maxNameBytes = 63

func submitCommand() *cli.Command {
	return &cli.Command{
		Name:      "submit",
		Usage:     "turn a module, a Go directory or an image into a function with a URL",
		ArgsUsage: "FILE|DIR|IMAGE",
		Description: "FILE is a WebAssembly core module for WASI preview 1 (wasip1) that speaks CGI: the request's body on " +
			"stdin, the answer on stdout. DIR is the directory of a Go main package, which is built first. IMAGE is an OCI " +
			"reference such as registry.example.org/team/hello:1. A function that exists gets a new revision; the old one " +
			"answers until the new one is warm. Settings that are not given stay as they are.\n\n" +
			"Examples:\n" +
			"   nodeagent submit hello.wasm\n" +
			"   nodeagent submit ./hello --env GREETING=hi --secret API_KEY\n" +
			"   nodeagent submit registry.example.org/team/hello@sha256:… --name hello",
		Flags: append(append(append([]cli.Flag{
			&cli.StringFlag{Name: "name", Usage: "`NAME` of the function (default: from the file, directory or image)"},
		}, settingsFlags()...), waitFlag(), outputFlag()),
			apiFlags("`TENANT` that owns a new function: functions of two tenants never share a process (on a cluster a namespace; default: the context's)")...),
		Action: action(submitAction),
	}
}

func submitAction(c *cli.Context) error {
	switch {
	case c.NArg() == 0:
		return usageError("say what to submit: nodeagent submit FILE|DIR|IMAGE")
	case c.NArg() > 1:
		return usageError("submit takes one FILE, DIR or IMAGE, not also %q", c.Args().Get(1))
	}
	asJSON, err := wantsJSON(c)
	if err != nil {
		return err
	}
	settings, err := settingsFrom(c)
	if err != nil {
		return err
	}
	target, err := parseTarget(c.Args().First())
	if err != nil {
		return err
	}
	name := c.String("name")
	if name == "" {
		if name = target.name(); name == "" {
			return usageError("no name can be made from %q; give one with --name", target.arg)
		}
	}
	p := newProgress(c.App.ErrWriter, asJSON)
	defer p.stop()
	cl, err := connectAPI(c.Context, c, p, true)
	if err != nil {
		return err
	}
	defer cl.Close()

	source, size, cleanup, err := target.source(c.Context, name, p)
	if err != nil {
		return err
	}
	defer cleanup()
	before, _, err := cl.Get(c.Context, name)
	var problem *client.ProblemError
	if err != nil && !errors.As(err, &problem) {
		return err // nobody there: say so before an upload is tried
	}
	change := client.Change{Settings: settings, Tenant: cl.tenant, Wait: c.Duration("wait")}
	f, err := put(c.Context, cl.Client, name, source, change, before, p)
	p.stop()
	if err != nil {
		return err
	}
	return reportChange(c, f, outcome{asJSON: asJSON, size: size, before: before, wait: c.Duration("wait")})
}

// put uploads and waits, while the progress line says where it is.
func put(ctx context.Context, cl *client.Client, name string, source client.Source, change client.Change, before v1alpha1.Function, p *progress) (v1alpha1.Function, error) {
	if source.Image != "" {
		p.start("fetching " + source.Image)
	} else {
		p.start(fmt.Sprintf("uploading %s", humanBytes(source.Size)))
	}
	watch, stop := context.WithCancel(ctx)
	var watcher sync.WaitGroup
	defer func() { stop(); watcher.Wait() }()
	var uploaded sync.Once
	follow := func() {
		p.start("checking and publishing")
		if p.term.tty { // the questions only serve the progress line
			watcher.Go(func() { watchRecord(watch, cl, name, before.Revision, p) })
		}
	}
	change.Progress = func(sent, total int64) {
		p.update(fmt.Sprintf("%d %%", sent*100/max(total, 1)))
		if sent == total {
			uploaded.Do(follow)
		}
	}
	started := time.Now()
	f, err := cl.Put(ctx, name, source, change)
	if err != nil || f.State != v1alpha1.StatePending || change.Wait <= time.Since(started) {
		return f, err
	}
	return waitReady(ctx, cl, f, change.Wait-time.Since(started), p)
}

// watchRecord shows that the new revision is durable and being compiled.
func watchRecord(ctx context.Context, cl *client.Client, name string, before int, p *progress) {
	const interval = 150 * time.Millisecond
	ticker := time.NewTicker(interval)
	defer ticker.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-ticker.C:
		}
		f, _, err := cl.Get(ctx, name)
		if err != nil || f.Revision <= before {
			continue
		}
		if ctx.Err() == nil {
			p.start(deployStep(f))
		}
		if f.Warm == "" {
			return // one machine has no more to tell
		}
		ticker.Reset(nodesInterval)
	}
}

// nodesInterval is between two looks at how many nodes are warm.
const nodesInterval = 500 * time.Millisecond

// deployStep says what is done with a revision once it is durable.
func deployStep(f v1alpha1.Function) string {
	switch {
	case f.Settings.Runtime == v1alpha1.RuntimeSpin:
		return fmt.Sprintf("deploying revision %d: starting its pods", f.Revision)
	case f.Warm != "":
		return fmt.Sprintf("deploying revision %d: warm on %s nodes", f.Revision, printable(f.Warm))
	}
	return fmt.Sprintf("compiling and loading revision %d", f.Revision)
}

// waitReady goes on waiting when the server's own wait has ended. A revision
// that is still pending then is returned without an error.
func waitReady(ctx context.Context, cl *client.Client, f v1alpha1.Function, wait time.Duration, p *progress) (v1alpha1.Function, error) {
	p.start(deployStep(f))
	bounded, cancel := context.WithTimeout(ctx, wait)
	defer cancel()
	latest, err := cl.Wait(bounded, f.Name, func(f v1alpha1.Function) {
		if f.State == v1alpha1.StatePending {
			p.start(deployStep(f))
		}
	})
	if err != nil && bounded.Err() != nil && ctx.Err() == nil {
		return f, nil // still pending
	}
	if err != nil {
		return f, err
	}
	return latest, nil
}

type outcome struct {
	asJSON bool
	size   int64 // 0: not known
	before v1alpha1.Function
	wait   time.Duration
}

// reportChange prints a function after a change and returns the exit code.
func reportChange(c *cli.Context, f v1alpha1.Function, o outcome) error {
	if o.asJSON {
		if err := printJSON(c.App.Writer, f); err != nil {
			return err
		}
	} else {
		printChange(c.App.Writer, f, o)
	}
	printWarnings(c.App.ErrWriter, f)
	switch f.State {
	case v1alpha1.StateReady:
		return nil
	case v1alpha1.StateFailed:
		message, remedy := fmt.Sprintf("revision %d of %s cannot be served", f.Revision, f.Name), ""
		if f.Error != nil {
			message += ": " + printable(strings.TrimSuffix(f.Error.Detail, "."))
			remedy = problemRemedy(&client.ProblemError{Problem: v1alpha1.Problem{Type: f.Error.Code}})
		}
		if f.ActiveRevision > 0 && f.ActiveRevision != f.Revision {
			message += fmt.Sprintf("; revision %d goes on answering", f.ActiveRevision)
		}
		return fail(exitRefused, message, remedy)
	}
	if o.wait <= 0 {
		return nil // that is what was asked for
	}
	why := ""
	if f.Error != nil {
		why = ": " + printable(strings.TrimSuffix(f.Error.Detail, "."))
	}
	return fail(exitNotReady, fmt.Sprintf("revision %d of %s is durable but not ready after %s%s", f.Revision, f.Name, humanDuration(o.wait), why),
		"see how far it is with `nodeagent functions get "+f.Name+"`")
}

func printChange(w io.Writer, f v1alpha1.Function, o outcome) {
	t := terminalOf(w)
	name := printable(f.Name)
	switch {
	case f.State == v1alpha1.StateFailed:
		return // the error says it all
	case f.State == v1alpha1.StatePending:
		fprintf(w, "%s is %s: revision %d is durable and on its way\n", name, t.paint(yellow, "pending"), f.Revision)
	case o.before.Revision == f.Revision && o.before.Name == f.Name:
		fprintf(w, "%s is %s and unchanged: revision %d\n", name, t.paint(green, "ready"), f.Revision)
	default:
		fprintf(w, "%s is %s: revision %d\n", name, t.paint(green, "ready"), f.Revision)
	}
	fprintf(w, "\n")
	for _, url := range addresses(f) {
		fprintf(w, "  %s\n", printable(url))
	}
	if len(addresses(f)) == 0 {
		fprintf(w, "  no URL leads to it yet\n")
	}
	fprintf(w, "\n")
	table := newTable(w)
	size := ""
	if o.size > 0 {
		size = ", " + humanBytes(o.size)
	}
	fprintf(table, "  module\t%s%s\n", shortDigest(f.Digest), size)
	if f.Warm != "" {
		fprintf(table, "  warm\t%s\n", warmText(f))
	}
	exposureRows(func(name, value string) { fprintf(table, "  %s\t%s\n", name, value) }, f.Settings)
	fprintf(table, "  limits\t%s\n", limitsLine(f.Settings))
	if len(f.Phases) > 0 {
		fprintf(table, "  time\t%s\n", phaseLine(f.Phases))
	}
	_ = table.Flush()
	fprintf(w, "\nTry next:\n")
	if urls := addresses(f); len(urls) > 0 {
		fprintf(w, "  curl %s\n", printable(urls[0]))
	} else {
		fprintf(w, "  nodeagent functions get %s\n", name)
	}
	fprintf(w, "  nodeagent logs %s --follow\n", name)
	if f.Revision > 1 {
		fprintf(w, "  nodeagent functions rollback %s\n", name)
	}
}

// addresses are the URLs of a function, the best one first. A function of a
// cluster has none while nobody knows a domain for it, unless it has a host of
// its own.
func addresses(f v1alpha1.Function) []string {
	var urls []string
	for _, url := range []string{f.URL, f.PathURL, hostURL(f.Settings)} {
		if url != "" && !slices.Contains(urls, url) {
			urls = append(urls, url)
		}
	}
	return urls
}

func hostURL(s v1alpha1.Settings) string {
	if s.Host == "" {
		return ""
	}
	route := "/"
	if len(s.Routes) > 0 {
		route = s.Routes[0]
	}
	return "http://" + s.Host + route
}

// printWarnings says what is not as it was asked for.
func printWarnings(w io.Writer, f v1alpha1.Function) {
	t := terminalOf(w)
	for _, warning := range f.Warnings {
		fprintf(w, "%s %s\n", t.paint(yellow, "warning:"), printable(warning.Detail))
	}
}

func limitsLine(s v1alpha1.Settings) string {
	if s.Runtime == v1alpha1.RuntimeSpin { // which knows no deadline of a request
		return fmt.Sprintf("%d MiB, %d at once", s.MemoryMiB, s.Concurrency)
	}
	return fmt.Sprintf("%d MiB, %s a request, %d at once", s.MemoryMiB, humanDuration(time.Duration(s.TimeoutMS)*time.Millisecond), s.Concurrency)
}

// fprintf writes to a terminal or pipe; when that is gone nobody is left to tell.
func fprintf(w io.Writer, format string, args ...any) { _, _ = fmt.Fprintf(w, format, args...) }

// target is what the argument of submit names.
type target struct {
	arg  string
	kind string // "file", "directory", "image"
	size int64
}

// imageReference matches what is surely an OCI reference and no local path:
// its first element is a host (a dot, a port, or localhost), and names are
// lower case.
var imageReference = regexp.MustCompile(`^(localhost|[a-z0-9-]+(\.[a-z0-9-]+)+|[a-z0-9.-]+:[0-9]+)(:[0-9]+)?/[a-z0-9]+([._/-]+[a-z0-9]+)*(:[A-Za-z0-9_][A-Za-z0-9_.-]{0,127})?(@sha256:[0-9a-f]{64})?$`)

func parseTarget(arg string) (target, error) {
	info, err := os.Stat(arg)
	switch {
	case err == nil && info.IsDir():
		return target{arg: arg, kind: "directory"}, nil
	case err == nil && info.Mode().IsRegular():
		if filepath.Ext(arg) == ".go" {
			return target{}, fail(exitUsage, arg+" is source code", "submit its directory, which is built first: nodeagent submit "+filepath.Dir(arg))
		}
		if info.Size() > v1alpha1.MaxModuleBytes {
			return target{}, fail(exitRefused, fmt.Sprintf("%s is %s, more than the %d MiB a module may have", arg, humanBytes(info.Size()), v1alpha1.MaxModuleBytes>>20),
				"strip it, e.g. -ldflags='-s -w' with Go or wasm-opt -Oz")
		}
		return target{arg: arg, kind: "file", size: info.Size()}, nil
	case err == nil:
		return target{}, fail(exitUsage, arg+" is neither a regular file nor a directory", "")
	case imageReference.MatchString(arg) && errors.Is(err, os.ErrNotExist) && filepath.Ext(arg) != ".wasm":
		return target{arg: arg, kind: "image"}, nil
	case errors.Is(err, os.ErrNotExist):
		return target{}, fail(exitUsage, fmt.Sprintf("there is no file or directory %q", arg),
			"an image is written with its registry, such as registry.example.org/team/hello:1")
	}
	return target{}, fail(exitFailure, err.Error(), "")
}

// name is a valid function name made from the target, or "".
func (t target) name() string {
	base := t.arg
	switch t.kind {
	case "image":
		base, _, _ = strings.Cut(base, "@")
		base = base[strings.LastIndexByte(base, '/')+1:]
		base, _, _ = strings.Cut(base, ":")
	case "directory":
		if abs, err := filepath.Abs(base); err == nil {
			base = abs
		}
		base = filepath.Base(base)
	default:
		base = strings.TrimSuffix(filepath.Base(base), filepath.Ext(base))
	}
	return sanitizeName(base)
}

// sanitizeName makes a DNS label of s: lower case letters, digits and single
// hyphens, beginning with a letter. It returns "" when nothing is left.
func sanitizeName(s string) string {
	var b strings.Builder
	for _, r := range strings.ToLower(s) {
		switch {
		case r >= 'a' && r <= 'z', r >= '0' && r <= '9' && b.Len() > 0:
			b.WriteRune(r)
		case b.Len() > 0 && !strings.HasSuffix(b.String(), "-"):
			b.WriteByte('-')
		}
		if b.Len() == maxNameBytes {
			break
		}
	}
	return strings.TrimRight(b.String(), "-")
}

// source opens the module, after building it if need be. cleanup removes what
// was built.
func (t target) source(ctx context.Context, name string, p *progress) (src client.Source, size int64, cleanup func(), err error) {
	path, cleanup := t.arg, func() {}
	switch t.kind {
	case "image":
		return client.Source{Image: t.arg}, 0, cleanup, nil
	case "directory":
		// Before anything is shown as going on.
		if err := buildable(t.arg); err != nil {
			return src, 0, cleanup, fail(exitFailure, err.message, err.remedy)
		}
		dir, err := os.MkdirTemp("", "hearth-build-")
		if err != nil {
			return src, 0, cleanup, err
		}
		cleanup = func() { _ = os.RemoveAll(dir) }
		path = filepath.Join(dir, "module.wasm")
		p.start("building " + name)
		if err := buildGo(ctx, t.arg, path); err != nil {
			cleanup()
			p.stop()
			var failed *buildError
			if errors.As(err, &failed) {
				return src, 0, func() {}, fail(exitFailure, failed.Error(), failed.remedy)
			}
			return src, 0, func() {}, err
		}
		info, err := os.Stat(path)
		if err != nil {
			cleanup()
			return src, 0, func() {}, err
		}
		t.size = info.Size()
	}
	return client.Source{Module: func() (io.ReadCloser, error) { return os.Open(path) }, Size: t.size}, t.size, cleanup, nil
}
