package deploy

import (
	"cmp"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"

	networkingv1 "k8s.io/api/networking/v1"
	"k8s.io/apimachinery/pkg/util/validation"
)

// DefaultHostTemplate gives http://hello.203.0.113.7.nip.io/ for hello.
const DefaultHostTemplate HostTemplate = "{name}.{base}"

// maxHost is the length of the longest DNS name (RFC 1035, 2.3.4).
const maxHost = 253

// HostTemplate makes a function's own host of its name: {name} stands for it,
// {tenant} for its namespace, {base} for the base domain. {name} is exactly
// once in the first label, so that one wildcard reaches all functions of a
// tenant; {base} is at most once, at the end.
type HostTemplate string

// ParseHostTemplate checks s; empty means DefaultHostTemplate.
func ParseHostTemplate(s string) (HostTemplate, error) {
	t := HostTemplate(cmp.Or(s, string(DefaultHostTemplate)))
	if err := t.Validate(); err != nil {
		return "", err
	}
	return t, nil
}

// Validate says what is wrong with the template in one sentence.
func (t HostTemplate) Validate() error {
	s := string(t)
	bad := func(format string, args ...any) error {
		return fmt.Errorf("host template %q %s; the default is %q", s, fmt.Sprintf(format, args...), DefaultHostTemplate)
	}
	if strings.Count(s, "{name}") != 1 {
		return bad("must contain {name} once")
	}
	first, rest, more := strings.Cut(s, ".")
	switch {
	case !strings.Contains(first, "{name}"):
		return bad("must have {name} in its first label")
	case !more || rest == "":
		return bad("must have a domain after its first label, such as {base}")
	case strings.Count(s, "{base}") > 1:
		return bad("must contain {base} at most once")
	case strings.Contains(s, "{base}") && !strings.HasSuffix(s, ".{base}"):
		return bad("must end with .{base}")
	}
	sample := strings.NewReplacer("{name}", "n", "{tenant}", "t", "{base}", "b.example").Replace(s)
	if strings.ContainsAny(sample, "{}") {
		return bad("may contain {name}, {tenant} and {base}, and no other braces")
	}
	if problem := dnsProblem(sample); problem != "" {
		return bad("does not make a DNS name: %s", problem)
	}
	return nil
}

// NeedsBase says whether a host cannot be made without a base domain.
func (t HostTemplate) NeedsBase() bool { return strings.Contains(string(t), "{base}") }

// Host returns the own host of function name of tenant, or a *HostNameError.
func (t HostTemplate) Host(name, tenant, base string) (string, error) {
	host := strings.NewReplacer("{name}", name, "{tenant}", tenant, "{base}", base).Replace(string(t))
	if problem := dnsProblem(host); problem != "" {
		return "", &HostNameError{Host: host, Template: t, Problem: problem}
	}
	return host, nil
}

// Wildcard returns the wildcard that covers the own hosts of a tenant's
// functions, such as "*.203.0.113.7.nip.io".
func (t HostTemplate) Wildcard(tenant, base string) (string, error) {
	_, rest, _ := strings.Cut(string(t), ".")
	domain := strings.NewReplacer("{tenant}", tenant, "{base}", base).Replace(rest)
	if problem := dnsProblem("n." + domain); problem != "" {
		return "", &HostNameError{Host: "*." + domain, Template: t, Problem: problem}
	}
	return "*." + domain, nil
}

// dnsProblem says why host is no DNS name in lower case with at least two
// labels (RFC 1123); empty: it is one.
func dnsProblem(host string) string {
	if len(host) > maxHost {
		return fmt.Sprintf("it has %d characters, and DNS allows %d", len(host), maxHost)
	}
	labels := strings.Split(host, ".")
	if len(labels) < 2 {
		return "it has only one label"
	}
	for _, label := range labels {
		if len(label) > validation.DNS1123LabelMaxLength {
			return fmt.Sprintf("its label %q has %d characters, and DNS allows %d", label, len(label), validation.DNS1123LabelMaxLength)
		}
		if len(validation.IsDNS1123Label(label)) > 0 {
			return fmt.Sprintf("its label %q is not made of a to z, 0 to 9 and hyphens inside", label)
		}
	}
	return ""
}

// BaseDomainFrom returns the domain below which functions answer: configured,
// or one made of the first address of a load balancer, IPv4 before IPv6, by a
// public DNS service that resolves names to the address written in them:
// <IPv4>.nip.io, and for IPv6 <address with dashes for colons>.sslip.io
// (2001-db8--1.sslip.io), because nip.io's dashes are documented for IPv4
// only. A dash at either end gets a 0 beside it, as no DNS label may begin or
// end with one.
//
// Without an address the error is ErrNoAddress while there is nothing, and a
// *NoBaseDomainError where there are only names: no wildcard can be had below
// a name that belongs to the load balancer's owner.
func BaseDomainFrom(configured string, addresses []networkingv1.IngressLoadBalancerIngress) (string, error) {
	if configured != "" {
		if problem := dnsProblem("n." + configured); problem != "" {
			return "", fmt.Errorf("base domain %q is no DNS name: %s", configured, problem)
		}
		return configured, nil
	}
	var v6 netip.Addr
	var names []string
	for _, a := range addresses {
		ip, err := netip.ParseAddr(a.IP)
		switch {
		case err == nil && ip.Unmap().Is4():
			return ip.Unmap().String() + ".nip.io", nil
		case err == nil && !v6.IsValid():
			v6 = ip.WithZone("")
		case a.Hostname != "":
			names = append(names, a.Hostname)
		}
	}
	if v6.IsValid() {
		label := strings.ReplaceAll(v6.String(), ":", "-")
		if strings.HasPrefix(label, "-") {
			label = "0" + label
		}
		if strings.HasSuffix(label, "-") {
			label += "0"
		}
		return label + ".sslip.io", nil
	}
	if len(names) > 0 {
		slices.Sort(names)
		return "", &NoBaseDomainError{Names: slices.Compact(names)}
	}
	return "", ErrNoAddress
}

// ErrNoAddress is what BaseDomainFrom's error wraps while the load balancer has
// no address yet.
var ErrNoAddress = errors.New("the ingress controller has given the functions' Ingress no address yet; wait, check its class, or set a base domain")
