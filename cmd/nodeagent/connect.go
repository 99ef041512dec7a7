package main

import (
	"context"
	"crypto/x509"
	"errors"
	"flag"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"strings"
	"time"

	"github.com/urfave/cli/v2"

	"github.com/hearth-sh/hearth/internal/client"
)

// Where the API is: one way to say it for every command that speaks to it.
//
// Without any option it is the one of `nodeagent dev` on this machine, whatever
// kubeconfig lies around: a cluster is only ever spoken to when --cluster,
// --context or --kubeconfig (or HEARTH_CONTEXT) says so. What the command line
// says goes before what the environment says.

// maxTokenBytes bounds a token's file: Kubernetes' own take about 1 KiB.
const maxTokenBytes = 64 << 10

// maxCABytes bounds the file of a certificate authority.
const maxCABytes = 1 << 20

// apiCategory is the heading of these options in a command's help.
const apiCategory = "Where the API is"

// apiFlags are the options of every command that speaks to the API. tenant is
// what --tenant means there.
func apiFlags(tenant string) []cli.Flag {
	return append([]cli.Flag{
		environment{&cli.StringFlag{Name: "tenant", Aliases: []string{"n"}, EnvVars: []string{"HEARTH_TENANT"}, Usage: tenant}},
		environment{&cli.StringFlag{Name: "api", Category: apiCategory, Aliases: []string{"url"}, EnvVars: []string{"HEARTH_API", "HEARTH_URL"}, DefaultText: `"` + client.DefaultURL + `"`,
			Usage: "`URL` of the API: http(s)://… or unix:///path/of/api.sock"}},
		environment{&cli.StringFlag{Name: "token", Category: apiCategory, EnvVars: []string{"HEARTH_TOKEN"}, Usage: "bearer `TOKEN` for the API (which others may see in the process list: rather --token-file or the environment)"}},
		environment{&cli.StringFlag{Name: "token-file", Category: apiCategory, EnvVars: []string{"HEARTH_TOKEN_FILE"}, Usage: "`FILE` with the token, read anew for every call"}},
		environment{&cli.StringFlag{Name: "ca-file", Category: apiCategory, EnvVars: []string{"HEARTH_CA_FILE"}, Usage: "`FILE` with the certificates (PEM) that verify the API's, instead of the system's"}},
	}, clusterFlags()...)
}

// clusterFlags say which cluster is meant.
func clusterFlags() []cli.Flag {
	return []cli.Flag{
		&cli.BoolFlag{Name: "cluster", Category: apiCategory, Usage: "use the API of a cluster: that of the kubeconfig's current context, unless --context names another", DisableDefaultText: true},
		environment{&cli.StringFlag{Name: "context", Category: apiCategory, EnvVars: []string{"HEARTH_CONTEXT"}, Usage: "use the API of the cluster of this context `NAME` of the kubeconfig"}},
		environment{&cli.StringFlag{Name: "kubeconfig", Category: apiCategory, Usage: "use the API of the cluster of this `FILE`", DefaultText: "with --cluster or --context: what $KUBECONFIG names, else ~/.kube/config"}},
		environment{&cli.StringFlag{Name: "system-namespace", Category: apiCategory, EnvVars: []string{"HEARTH_SYSTEM_NAMESPACE"}, Usage: "`NAMESPACE` of the cluster in which Hearth is installed", DefaultText: "hearth-system"}},
		environment{&cli.StringFlag{Name: "service-account", Category: apiCategory, EnvVars: []string{"HEARTH_SERVICE_ACCOUNT"}, Usage: "`[NAMESPACE/]NAME` of the cluster's ServiceAccount to make a token for", DefaultText: "hearth-cli"}},
	}
}

// environment is an option whose variables are documented by the library but
// read by chooseAPI: only so can it tell what the command line said.
type environment struct{ *cli.StringFlag }

// Apply leaves the variables alone.
func (e environment) Apply(set *flag.FlagSet) error {
	plain := *e.StringFlag
	plain.EnvVars = nil
	return plain.Apply(set)
}

// apiChoice is which API is meant, and what is shown to it.
type apiChoice struct {
	// URL is set unless Cluster is.
	URL string
	// Default says that nobody said anything: the API of this machine.
	Default bool
	// Cluster says that a kubeconfig leads to the API.
	Cluster                  bool
	Kubeconfig, Context      string
	SystemNamespace, Account string
	Token, TokenFile, CAFile string
	Tenant                   string // "" when nobody said
	clusterOption            string // the option or variable that chose a cluster
}

// chooseAPI decides. option is what the command line gave, env the
// environment. Its errors are wrong usage.
func chooseAPI(option func(string) (string, bool), env func(string) string) (apiChoice, error) {
	var a apiChoice
	given := func(name string) string { value, _ := option(name); return value }
	either := func(name, variable string) string {
		if value, ok := option(name); ok {
			return value
		}
		return env(variable)
	}
	for _, name := range []string{"kubeconfig", "context", "cluster"} {
		if _, ok := option(name); ok {
			a.clusterOption = "--" + name
		}
	}
	_, urlGiven := option("api")
	envURL, envURLName := env("HEARTH_API"), "HEARTH_API"
	if envURL == "" {
		envURL, envURLName = env("HEARTH_URL"), "HEARTH_URL"
	}
	switch {
	case urlGiven && a.clusterOption != "":
		return a, usageError("--api and %s each say where the API is; give one of them", a.clusterOption)
	case urlGiven:
		a.URL = given("api")
		if a.URL == "" {
			return a, usageError("--api is empty; give a URL such as %s", client.DefaultURL)
		}
	case a.clusterOption != "":
		a.Cluster = true
	case envURL != "" && env("HEARTH_CONTEXT") != "":
		return a, usageError("the environment's %s and HEARTH_CONTEXT each say where the API is; unset one, or give --api or --context", envURLName)
	case envURL != "":
		a.URL = envURL
	case env("HEARTH_CONTEXT") != "":
		a.Cluster, a.clusterOption = true, "HEARTH_CONTEXT"
	default:
		a.URL, a.Default = client.DefaultURL, true
	}

	a.Tenant = either("tenant", "HEARTH_TENANT")
	_, byToken := option("token")
	_, byFile := option("token-file")
	switch {
	case byToken && byFile:
		return a, usageError("--token and --token-file each give a token; give one of them")
	case byToken:
		a.Token = given("token")
	case byFile:
		a.TokenFile = given("token-file")
	case a.Cluster:
		// What the environment has is for the API of HEARTH_API; here one is
		// made, and another's token is shown to nobody.
	case env("HEARTH_TOKEN") != "" && env("HEARTH_TOKEN_FILE") != "":
		return a, usageError("the environment's HEARTH_TOKEN and HEARTH_TOKEN_FILE each give a token; unset one")
	default:
		a.Token, a.TokenFile = env("HEARTH_TOKEN"), env("HEARTH_TOKEN_FILE")
	}
	a.CAFile = given("ca-file")
	if a.CAFile == "" && !a.Cluster {
		a.CAFile = env("HEARTH_CA_FILE")
	}
	if !a.Cluster {
		for _, name := range []string{"system-namespace", "service-account"} {
			if _, ok := option(name); ok {
				return a, usageError("--%s is about a cluster; say which with --cluster, --context or --kubeconfig", name)
			}
		}
		if _, ok := option("ca-file"); ok && !strings.HasPrefix(a.URL, "https://") {
			return a, usageError("--ca-file is for an API with https; %s has not", a.URL)
		}
		return a, nil
	}
	a.Kubeconfig = given("kubeconfig")
	a.Context = given("context")
	if a.Context == "" && a.Kubeconfig == "" { // another file has other contexts
		a.Context = env("HEARTH_CONTEXT")
	}
	a.SystemNamespace = either("system-namespace", "HEARTH_SYSTEM_NAMESPACE")
	a.Account = either("service-account", "HEARTH_SERVICE_ACCOUNT")
	return a, nil
}

// apiOf is chooseAPI for a command line.
func apiOf(c *cli.Context) (apiChoice, error) {
	return chooseAPI(func(name string) (string, bool) {
		switch {
		case !c.IsSet(name):
			return "", false
		case name == "cluster":
			return "", c.Bool(name)
		}
		return c.String(name), true
	}, os.Getenv)
}

// connection is a client and what is known of where it leads.
type connection struct {
	*client.Client
	choice apiChoice
	// tenant is the one to work for: as given, else the namespace of the
	// kubeconfig's context; "" leaves it to the API.
	tenant string
}

// clusterWay is the way to an API inside a cluster.
type clusterWay struct {
	url, name, tenant string
	transport         http.RoundTripper
	token             func(ctx context.Context, rejected string) (string, error)
	closer            io.Closer
}

// connectAPI makes the client. Retries are told on stderr: waiting in silence
// looks like a hang.
//
// interactive lets a credential plugin of the kubeconfig ask a person.
func connectAPI(ctx context.Context, c *cli.Context, p *progress, interactive bool) (*connection, error) {
	choice, err := apiOf(c)
	if err != nil {
		return nil, err
	}
	k := &connection{choice: choice, tenant: choice.Tenant}
	o := client.Options{
		URL:       choice.URL,
		UserAgent: "nodeagent/" + c.App.Version,
		OnRetry: func(err error, delay time.Duration) {
			if p != nil {
				p.note(fmt.Sprintf("%s; trying again in %s", printable(err.Error()), humanDuration(delay)))
			}
		},
		Token: tokenSource(choice),
	}
	if choice.CAFile != "" {
		if o.RootCAs, err = readCertificates(choice.CAFile); err != nil {
			return nil, err
		}
	}
	if choice.Cluster {
		if p != nil && p.term.tty { // elsewhere it would be noise: it takes a second at most
			p.start("connecting to the cluster")
		}
		way, err := connectCluster(ctx, choice, o, interactive)
		if err != nil {
			return nil, err
		}
		o.URL, o.Name, o.Transport, o.Token, o.Closer = way.url, way.name, way.transport, way.token, way.closer
		if k.tenant == "" {
			k.tenant = way.tenant
		}
	}
	if k.Client, err = client.New(o); err != nil {
		if o.Closer != nil {
			_ = o.Closer.Close()
		}
		return nil, cli.Exit(err.Error(), exitUsage)
	}
	if o.Token != nil && inTheClear(k.URL()) && p != nil {
		p.note("the token goes to " + printable(k.URL()) + " unencrypted: use https if the API has it")
	}
	return k, nil
}

// inTheClear says whether others can read along on the way to the API.
func inTheClear(target string) bool {
	u, err := url.Parse(target)
	if err != nil || u.Scheme != "http" {
		return false
	}
	host := u.Hostname()
	ip := net.ParseIP(host)
	return host != "localhost" && !strings.HasSuffix(host, ".localhost") && (ip == nil || !ip.IsLoopback())
}

// tokenSource gives the token that was chosen; nil when none was.
func tokenSource(a apiChoice) func(ctx context.Context, rejected string) (string, error) {
	switch {
	case a.Token != "":
		return func(context.Context, string) (string, error) { return strings.TrimSpace(a.Token), nil }
	case a.TokenFile != "":
		return func(context.Context, string) (string, error) { return readToken(a.TokenFile) }
	}
	return nil
}

// readToken reads a token's file. Its errors never contain the token.
func readToken(path string) (string, error) {
	data, err := readBounded(path, maxTokenBytes)
	if err != nil {
		return "", fail(exitFailure, "the token cannot be read: "+err.Error(), "")
	}
	token := strings.TrimSpace(string(data))
	if token == "" || strings.ContainsAny(token, " \t\r\n") {
		return "", fail(exitFailure, path+" holds no token: it should be one word", "`nodeagent token` prints one")
	}
	return token, nil
}

func readCertificates(path string) (*x509.CertPool, error) {
	data, err := readBounded(path, maxCABytes)
	if err != nil {
		return nil, fail(exitFailure, "the certificates cannot be read: "+err.Error(), "")
	}
	pool := x509.NewCertPool()
	if !pool.AppendCertsFromPEM(data) {
		return nil, fail(exitFailure, path+" holds no certificate in PEM", "")
	}
	return pool, nil
}

func readBounded(path string, limit int64) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	data, err := io.ReadAll(io.LimitReader(f, limit+1))
	if err == nil && int64(len(data)) > limit {
		err = fmt.Errorf("%s is larger than %s", path, humanBytes(limit))
	}
	return data, err
}

// asked names the API in an error, unless it is the one that everybody expects.
func asked(api string) string {
	if api == "" || api == client.DefaultURL {
		return ""
	}
	return "asked was " + printable(api)
}

// unreachableRemedy says what to do when the API does not answer.
func unreachableRemedy(err *client.UnreachableError) string {
	var unknown x509.UnknownAuthorityError
	var host x509.HostnameError
	var invalid x509.CertificateInvalidError
	if remedy, known := laterRemedy(err); known {
		return remedy
	}
	switch {
	case errors.As(err, &unknown):
		return "its certificate is not from an authority that this machine trusts: give the authority's with --ca-file"
	case errors.As(err, &host), errors.As(err, &invalid):
		return "its certificate is not for this name or not valid now: compare the URL with how the API was set up, and this machine's clock"
	case errors.Is(err, context.DeadlineExceeded):
		return "`nodeagent status` says how the machine is; `nodeagent doctor` what to do about it"
	case err.URL == client.DefaultURL && os.Getenv("KUBECONFIG") != "":
		return "start it with `nodeagent dev`, say where it is with --api or HEARTH_API, or reach the cluster of your kubeconfig with --cluster"
	}
	return "start it with `nodeagent dev`, or say where it is with --api or HEARTH_API"
}
