package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"net/http"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/urfave/cli/v2"
	"golang.org/x/net/http/httpguts"

	"github.com/hearth-sh/hearth/api/v1alpha1"
	"github.com/hearth-sh/hearth/internal/client"
)

// invokeWait bounds one invocation: the longest deadline a function may have,
// and a little for its way there and back.
const invokeWait = v1alpha1.MaxTimeoutMS*time.Millisecond + 15*time.Second

func invokeCommand() *cli.Command {
	return &cli.Command{
		Name:      "invoke",
		Usage:     "send one request to a function and print its answer",
		ArgsUsage: "NAME [PATH]",
		Description: "On one machine the request goes through the gateway by path, so no name has to resolve; on a cluster it goes to the function's URL, whose name has to resolve unless its address is written in it (nip.io, sslip.io). The body goes to stdout as it is; " +
			"the exit code tells the status: 0 for 2xx and 3xx, 8 for 4xx, 9 for 5xx.\n\n" +
			"Examples:\n" +
			"   nodeagent invoke hello\n" +
			"   nodeagent invoke hello '/greet?name=Ada' -i\n" +
			"   echo '{\"n\": 1}' | nodeagent invoke hello /count -d @- -H 'Content-Type: application/json'",
		Flags: append([]cli.Flag{
			&cli.StringFlag{Name: "request", Aliases: []string{"X"}, Usage: "`METHOD` of the request (default GET, or POST with --data)"},
			&cli.StringFlag{Name: "data", Aliases: []string{"d"}, Usage: "`BODY` of the request; @FILE reads a file, @- or - reads stdin"},
			&cli.GenericFlag{Name: "header", Aliases: []string{"H"}, Value: &repeated{}, Usage: "`'NAME: VALUE'` of a header; repeatable"},
			&cli.BoolFlag{Name: "include", Aliases: []string{"i"}, Usage: "print status, headers and where the time went before the body", DisableDefaultText: true},
			&cli.DurationFlag{Name: "timeout", Value: invokeWait, Usage: "give up after this `DURATION`"},
		}, apiFlags(ownerUsage)...),
		Action:       action(invokeAction),
		BashComplete: completeFunctions,
	}
}

func invokeAction(c *cli.Context) error {
	if c.NArg() == 0 || c.NArg() > 2 {
		return usageError("say which function, and perhaps a path: nodeagent invoke NAME [PATH]")
	}
	name, path := c.Args().First(), c.Args().Get(1)
	if !strings.HasPrefix(path, "/") {
		path = "/" + path // "?a=b" and "" too
	}
	if c.Duration("timeout") <= 0 {
		return usageError("--timeout %v is not positive", c.Duration("timeout"))
	}
	ctx, cancel := context.WithTimeout(c.Context, c.Duration("timeout"))
	defer cancel()
	req, err := invokeRequest(ctx, c)
	if err != nil {
		return err
	}
	cl, err := connectAPI(ctx, c, newProgress(c.App.ErrWriter, true), true)
	if err != nil {
		return err
	}
	defer cl.Close()
	way, err := routeTo(ctx, cl, name)
	if err != nil {
		return err
	}
	started := time.Now()
	resp, err := way.send(ctx, req, path)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	first := time.Since(started)
	if c.Bool("include") {
		printHead(c.App.Writer, resp)
	}
	if problem, ok := client.ProblemOf(resp); ok {
		// The gateway's word, not the function's: an error rather than output.
		code := exitStatus5xx
		if resp.StatusCode < 500 {
			code = exitStatus4xx
		}
		remedy := problemRemedy(problem)
		if remedy == "" && resp.StatusCode >= 500 {
			remedy = "`nodeagent logs " + name + "` may say more"
		}
		return fail(code, printable(problem.Error()), remedy)
	}
	if _, err := io.Copy(c.App.Writer, resp.Body); err != nil {
		if c.Context.Err() != nil {
			return c.Context.Err()
		}
		if errors.Is(ctx.Err(), context.DeadlineExceeded) {
			return fail(exitUnreachable, fmt.Sprintf("%s was still answering after %s", name, humanDuration(c.Duration("timeout"))), "give it more with --timeout")
		}
		return fail(exitStatus5xx, fmt.Sprintf("the answer of %s broke off: %v", name, err), "`nodeagent logs "+name+"` says why")
	}
	if c.Bool("include") {
		fprintf(c.App.ErrWriter, "%s", timing(resp.Header, first, time.Since(started)))
	}
	switch {
	case resp.StatusCode >= 500:
		return cli.Exit("", exitStatus5xx)
	case resp.StatusCode >= 400:
		return cli.Exit("", exitStatus4xx)
	}
	return nil
}

// route is how a request reaches a function.
type route struct {
	api  *connection
	name string
	// url is the function's own; "" goes through the API's gateway by path.
	url string
}

// routeTo chooses: through the API's own gateway by path, which the API of one
// machine has, else by the function's URL.
func routeTo(ctx context.Context, cl *connection, name string) (route, error) {
	r := route{api: cl, name: name}
	if cl.choice.Default && cl.choice.Tenant == "" {
		return r, nil // nothing to ask
	}
	f, _, err := cl.Get(ctx, name)
	if err == nil {
		err = checkTenant(cl, f)
	}
	switch {
	case err != nil:
		return r, err
	case f.PathURL != "" && !cl.choice.Cluster:
		return r, nil
	}
	if r.url = f.URL; r.url != "" {
		return r, nil
	}
	// A custom host does where there is no domain for all.
	if f.Settings.Host == "" {
		return r, noURL(f)
	}
	r.url = "http://" + f.Settings.Host
	return r, nil
}

// noURL says why no URL leads to a function.
func noURL(f v1alpha1.Function) error {
	for _, w := range f.Warnings {
		return fail(exitNotReady, printable(f.Name)+" has no URL: "+printable(w.Detail), "")
	}
	return fail(exitNotReady, printable(f.Name)+" has no URL yet: it is "+printable(string(f.State)), "`nodeagent functions get "+printable(f.Name)+"` says how far it is")
}

// send sends the request; the caller closes the answer's body.
func (r route) send(ctx context.Context, req *http.Request, path string) (*http.Response, error) {
	if r.url == "" {
		return r.api.Invoke(ctx, req, r.name, path)
	}
	resp, err := r.api.InvokeURL(ctx, req, r.url, path)
	var unreachable *client.UnreachableError
	if errors.As(err, &unreachable) && ctx.Err() == nil {
		return nil, fail(exitUnreachable, printable(err.Error()), "this machine has to reach the cluster's ingress, and the name has to resolve here: try `curl -v "+printable(r.url)+"`")
	}
	return resp, err
}

func invokeRequest(ctx context.Context, c *cli.Context) (*http.Request, error) {
	method := c.String("request")
	body, size, err := requestBody(c)
	if err != nil {
		return nil, err
	}
	if method == "" {
		method = http.MethodGet
		if body != nil {
			method = http.MethodPost
		}
	}
	req, err := http.NewRequestWithContext(ctx, method, "http://function.invalid/", body)
	if err != nil {
		return nil, usageError("-X %q is no method: %v", method, err)
	}
	req.Host = ""
	if body != nil {
		req.ContentLength = size
		req.Header.Set("Content-Type", "application/octet-stream")
	}
	for i, line := range repeatedOf(c, "header") {
		name, value, ok := strings.Cut(line, ":")
		name, value = strings.TrimSpace(name), strings.TrimSpace(value)
		switch {
		case !ok || !httpguts.ValidHeaderFieldName(name) || !httpguts.ValidHeaderFieldValue(value):
			return nil, usageError("-H number %d is no header; write 'NAME: VALUE'", i+1)
		case strings.EqualFold(name, "Host"):
			return nil, usageError("-H Host would reach another function: the function is chosen by NAME")
		case strings.EqualFold(name, "Content-Type"):
			req.Header.Set(name, value)
		default:
			req.Header.Add(name, value)
		}
	}
	return req, nil
}

// requestBody opens --data. size is -1 when it is not known before the end.
func requestBody(c *cli.Context) (body io.ReadCloser, size int64, err error) {
	data := c.String("data")
	switch {
	case !c.IsSet("data"):
		return nil, 0, nil
	case data == "-" || data == "@-":
		return io.NopCloser(c.App.Reader), -1, nil
	case strings.HasPrefix(data, "@"):
		f, err := os.Open(data[1:])
		if err != nil {
			return nil, 0, fail(exitFailure, err.Error(), "")
		}
		info, err := f.Stat()
		if err != nil || !info.Mode().IsRegular() {
			return f, -1, err
		}
		return f, info.Size(), nil
	}
	return io.NopCloser(strings.NewReader(data)), int64(len(data)), nil
}

func printHead(w io.Writer, resp *http.Response) {
	t := terminalOf(w)
	colour := green
	if resp.StatusCode >= 500 {
		colour = red
	} else if resp.StatusCode >= 400 {
		colour = yellow
	}
	fprintf(w, "%s %s\n", resp.Proto, t.paint(colour, printable(resp.Status)))
	for _, name := range slices.Sorted(maps.Keys(resp.Header)) {
		for _, value := range resp.Header[name] {
			fprintf(w, "%s: %s\n", printable(name), printable(value))
		}
	}
	fprintf(w, "\n")
}

// timing is the Server-Timing header (W3C) as a sentence, beside what was
// measured here.
func timing(h http.Header, first, total time.Duration) string {
	var parts []string
	for _, line := range h.Values("Server-Timing") {
		for metric := range strings.SplitSeq(line, ",") {
			fields := strings.Split(metric, ";")
			for _, parameter := range fields[1:] {
				if duration, ok := strings.CutPrefix(strings.TrimSpace(parameter), "dur="); ok {
					parts = append(parts, printable(strings.TrimSpace(fields[0]))+" "+printable(duration)+" ms")
				}
			}
		}
	}
	s := fmt.Sprintf("\nhere: first byte after %s, all after %s", humanDuration(first), humanDuration(total))
	if len(parts) > 0 {
		s += "; there: " + strings.Join(parts, ", ")
	}
	return s + "\n"
}
