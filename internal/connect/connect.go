// Package connect reaches the submit API inside a cluster with nothing but a
// kubeconfig: it finds a ready pod of the API, opens a port-forward to it, and
// makes the token that the API asks for.
//
// It owns what lies between a kubeconfig and an http.RoundTripper: the choice
// of a context, the token and its renewal, the forwarded connection and its
// replacement when the pod goes. It must not know what is asked of the API,
// print, or write anything in the cluster (a token is made, not stored).
//
// What it needs to be allowed, all in the namespace of Hearth:
//
//	get     services         hearth-api
//	list    endpointslices   (discovery.k8s.io)
//	get     configmaps       hearth-api        (unless the authority is given)
//	create  serviceaccounts/token  hearth-cli  (unless a token is given)
//	get and create  pods/portforward
package connect

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"os"
	"regexp"
	"slices"
	"strings"
	"time"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"
	clientcmdapi "k8s.io/client-go/tools/clientcmd/api"

	"github.com/hearth-sh/hearth/api/v1alpha1"
)

// What Hearth calls its parts in a cluster, unless Options say otherwise.
const (
	// DefaultNamespace is where the API runs.
	DefaultNamespace = "hearth-system"
	// DefaultServiceAccount is whom tokens are made for, in DefaultNamespace.
	DefaultServiceAccount = "hearth-cli"
	// Service names the Service of the API and the ConfigMap with its
	// authority (key ca.crt).
	Service = "hearth-api"
	// Audience is what tokens of the API are for.
	Audience = v1alpha1.Group

	authorityKey = "ca.crt"
	// servicePort is the Service's port for https.
	servicePort = 443
)

const (
	// callTimeout bounds one call of the API server.
	callTimeout = 10 * time.Second
	// maxAuthority bounds ca.crt: a dozen certificates.
	maxAuthority = 64 << 10
	// contextsShown bounds the contexts that an error lists.
	contextsShown = 8
)

// Options say which cluster is meant and what Hearth is called in it. The zero
// value is the current context of the usual kubeconfig.
type Options struct {
	// Kubeconfig is a file; "" reads what the environment variable KUBECONFIG
	// names, else ~/.kube/config, as kubectl does.
	Kubeconfig string
	// Context of the kubeconfig; "" is its current one.
	Context string
	// Namespace where the API runs; "" is DefaultNamespace.
	Namespace string
	// ServiceAccount is whom tokens are made for: a name in Namespace, or
	// namespace/name. "" is DefaultServiceAccount.
	ServiceAccount string
	// UserAgent names the program in the API server's audit log.
	UserAgent string
	// NoPrompt keeps a credential plugin from asking a person.
	NoPrompt bool
}

// Error says in one sentence what failed, and in another what to do about it.
type Error struct {
	// Message begins in lower case and has no full stop.
	Message string
	// Remedy may be empty.
	Remedy string
	// Usage says that the options make no sense, Denied that the cluster
	// refused; otherwise something does not answer or is not there.
	Usage, Denied bool
	// Err is the cause; may be nil.
	Err error
}

func (e *Error) Error() string { return e.Message }

func (e *Error) Unwrap() error { return e.Err }

// Cluster is one context of a kubeconfig. It is safe for concurrent use; Close
// ends the connections it keeps.
type Cluster struct {
	config  *rest.Config
	http    *http.Client
	client  kubernetes.Interface
	context string
	tenant  string // the context's namespace

	system           string
	accountNamespace string
	account          string
}

// Load reads the kubeconfig. It connects to nothing. Errors are *Error.
func Load(o Options) (*Cluster, error) {
	rules := clientcmd.NewDefaultClientConfigLoadingRules()
	rules.ExplicitPath = o.Kubeconfig
	rules.WarnIfAllMissing = false
	raw, err := rules.Load()
	if err != nil {
		return nil, kubeconfigError(err)
	}
	c := &Cluster{context: o.Context, system: o.Namespace, accountNamespace: o.Namespace, account: o.ServiceAccount}
	if c.context == "" {
		c.context = raw.CurrentContext
	}
	if c.system == "" {
		c.system, c.accountNamespace = DefaultNamespace, DefaultNamespace
	}
	if namespace, name, qualified := strings.Cut(c.account, "/"); qualified {
		c.accountNamespace, c.account = namespace, name
		if namespace == "" || name == "" || strings.Contains(name, "/") {
			return nil, &Error{Usage: true, Message: fmt.Sprintf("%q is no ServiceAccount", o.ServiceAccount), Remedy: "write NAME or NAMESPACE/NAME"}
		}
	}
	if c.account == "" {
		c.account = DefaultServiceAccount
	}
	if err := checkContext(raw, c.context, o); err != nil {
		return nil, err
	}
	overrides := &clientcmd.ConfigOverrides{CurrentContext: c.context}
	chosen := clientcmd.NewNonInteractiveClientConfig(*raw, c.context, overrides, rules)
	if c.config, err = chosen.ClientConfig(); err != nil {
		return nil, &Error{Usage: true, Message: fmt.Sprintf("the context %q of the kubeconfig cannot be used: %v", c.context, err), Remedy: "`kubectl config view` shows what it says", Err: err}
	}
	if c.tenant, _, err = chosen.Namespace(); err != nil {
		return nil, kubeconfigError(err)
	}
	c.config.UserAgent = o.UserAgent
	c.config.WarningHandlerWithContext = rest.NoWarnings{}
	c.config.Timeout = callTimeout
	if o.NoPrompt && c.config.ExecProvider != nil {
		c.config.ExecProvider.InteractiveMode = clientcmdapi.NeverExecInteractiveMode
	}
	if c.http, err = rest.HTTPClientFor(c.config); err != nil {
		return nil, &Error{Usage: true, Message: fmt.Sprintf("the credentials of the context %q cannot be used: %v", c.context, err), Remedy: "`kubectl config view` shows where they come from", Err: err}
	}
	if c.client, err = kubernetes.NewForConfigAndClient(c.config, c.http); err != nil {
		return nil, &Error{Usage: true, Message: fmt.Sprintf("the context %q of the kubeconfig cannot be used: %v", c.context, err), Err: err}
	}
	return c, nil
}

func checkContext(raw *clientcmdapi.Config, name string, o Options) error {
	names := make([]string, 0, len(raw.Contexts))
	for known := range raw.Contexts {
		names = append(names, known)
	}
	slices.Sort(names)
	list := strings.Join(names[:min(len(names), contextsShown)], ", ")
	if more := len(names) - contextsShown; more > 0 {
		list += fmt.Sprintf(" and %d more", more)
	}
	switch {
	case len(names) == 0 && o.Kubeconfig != "":
		return &Error{Usage: true, Message: "the kubeconfig " + o.Kubeconfig + " has no contexts"}
	case len(names) == 0:
		return &Error{Usage: true, Message: "there is no kubeconfig: neither KUBECONFIG nor ~/.kube/config names a cluster",
			Remedy: "give the file with --kubeconfig (on a server of k3s it is /etc/rancher/k3s/k3s.yaml), or the API's address with --api"}
	case name == "":
		return &Error{Usage: true, Message: "the kubeconfig has no current context", Remedy: "choose one with --context: " + list}
	case raw.Contexts[name] == nil:
		return &Error{Usage: true, Message: fmt.Sprintf("the kubeconfig has no context %q", name), Remedy: "it has " + list}
	}
	return nil
}

func kubeconfigError(err error) error {
	remedy := "give another file with --kubeconfig"
	if errors.Is(err, os.ErrPermission) {
		remedy = "ask its owner for a copy, or run the command as the user who may read it"
	}
	return &Error{Usage: true, Message: "the kubeconfig cannot be read: " + oneLine(err.Error()), Remedy: remedy, Err: err}
}

// Close ends idle connections to the API server.
func (c *Cluster) Close() { c.http.CloseIdleConnections() }

// Tenant is the namespace of the context, "default" when it names none.
func (c *Cluster) Tenant() string { return c.tenant }

// String names the cluster for people.
func (c *Cluster) String() string {
	return fmt.Sprintf("context %q (%s)", c.context, c.server())
}

// server is the API server's address without what may be secret in it.
func (c *Cluster) server() string {
	if u, err := url.Parse(c.config.Host); err == nil && u.Host != "" {
		return (&url.URL{Scheme: u.Scheme, Host: u.Host, Path: u.Path}).String()
	}
	return c.config.Host
}

// forbiddenUser finds the user in the API server's own words, such as
// `pods is forbidden: User "jane" cannot list resource "pods" …`.
var forbiddenUser = regexp.MustCompile(`User "([^"]*)"`)

// missing is what explain says of an object that is not there.
type missing struct{ message, remedy string }

// explain turns an error of the API server into an *Error. doing completes
// "may not …"; right is what has to be granted.
func (c *Cluster) explain(err error, doing, right string, absent missing) *Error {
	var already *Error
	if errors.As(err, &already) {
		return already
	}
	switch {
	case apierrors.IsForbidden(err):
		who := "the user of this kubeconfig"
		if m := forbiddenUser.FindStringSubmatch(err.Error()); m != nil {
			who = fmt.Sprintf("the user %q", m[1])
		}
		return &Error{Denied: true, Err: err,
			Message: fmt.Sprintf("%s may not %s in %s", who, doing, c),
			Remedy:  fmt.Sprintf("an administrator can grant it: %s in the namespace %s; or use the API's address with --api and --token-file", right, c.namespaceOf(right))}
	case apierrors.IsUnauthorized(err):
		return &Error{Denied: true, Err: err,
			Message: fmt.Sprintf("the API server of %s does not accept the credentials of the kubeconfig", c),
			Remedy:  "they may have expired: log in to the cluster again, or get a new kubeconfig"}
	case apierrors.IsNotFound(err):
		return &Error{Message: absent.message, Remedy: absent.remedy, Err: err}
	case errors.Is(err, context.Canceled):
		return &Error{Message: "interrupted", Err: err}
	case errors.Is(err, context.DeadlineExceeded), os.IsTimeout(err):
		return &Error{Err: err, Message: fmt.Sprintf("the API server of %s did not answer in time", c), Remedy: "look whether `kubectl get nodes` answers with the same context"}
	}
	var status apierrors.APIStatus
	if errors.As(err, &status) {
		return &Error{Err: err, Message: fmt.Sprintf("the API server of %s refused to %s: %s", c, doing, oneLine(status.Status().Message))}
	}
	return &Error{Err: err, Message: fmt.Sprintf("the API server of %s does not answer: %s", c, oneLine(cause(err).Error())),
		Remedy: "look whether `kubectl get nodes` answers with the same context"}
}

// namespaceOf is where a right is needed: that for tokens follows the account.
func (c *Cluster) namespaceOf(right string) string {
	if strings.Contains(right, "serviceaccounts/token") {
		return c.accountNamespace
	}
	return c.system
}

// notInstalled is what is said when the cluster has no Hearth.
func (c *Cluster) notInstalled() missing {
	return missing{
		message: fmt.Sprintf("there is no Service %s in the namespace %s of %s", Service, c.system, c),
		remedy:  "Hearth's chart is not installed there, or in another namespace (--system-namespace): `helm list -A` shows it",
	}
}

// cause drops the layers that only repeat method and URL.
func cause(err error) error {
	var urlErr *url.Error
	if errors.As(err, &urlErr) {
		return urlErr.Err
	}
	return err
}

func oneLine(s string) string {
	const longest = 400
	s = strings.Join(strings.Fields(s), " ")
	if len(s) > longest {
		s = strings.ToValidUTF8(s[:longest], "") + "…"
	}
	return strings.TrimSuffix(s, ".")
}
