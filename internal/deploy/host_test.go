package deploy

import (
	"errors"
	"strings"
	"testing"

	networkingv1 "k8s.io/api/networking/v1"
)

func TestHostTemplatesThatMakeNoHostAreRefused(t *testing.T) {
	long := strings.Repeat("a", 60)
	for template, problem := range map[string]string{
		"":                        "",
		"{name}.{base}":           "",
		"{name}-{tenant}.{base}":  "",
		"{name}.{tenant}.{base}":  "",
		"fn-{name}.fn.{base}":     "",
		"{name}.fn.example.com":   "",
		"{tenant}.{base}":         "must contain {name} once",
		"{name}.{name}.{base}":    "must contain {name} once",
		"fn.{name}.{base}":        "first label",
		"{name}":                  "must have a domain",
		"{name}.{base}.{base}":    "at most once",
		"{name}.{base}.example":   "must end with .{base}",
		"{name}-{base}":           "must have a domain",
		"{name}.{region}.{base}":  "no other braces",
		"{name}.Example.com":      "does not make a DNS name",
		"{name}_x.{base}":         "does not make a DNS name",
		"{name}" + long + "aaa.b": "63",
	} {
		t.Run(template, func(t *testing.T) {
			_, err := ParseHostTemplate(template)
			if problem == "" && err != nil || problem != "" && (err == nil || !strings.Contains(err.Error(), problem)) {
				t.Errorf("got %v, want %q", err, problem)
			}
		})
	}
}

func TestHostsAreDNSNamesOrATypedError(t *testing.T) {
	long := strings.Repeat("a", 63)
	for name, tt := range map[string]struct {
		template                HostTemplate
		name, tenant, base      string
		host, wildcard, problem string
	}{
		"by default":             {DefaultHostTemplate, "user1", "team", "203.0.113.7.nip.io", "user1.203.0.113.7.nip.io", "*.203.0.113.7.nip.io", ""},
		"with the tenant":        {"{name}-{tenant}.{base}", "user1", "team", "example.com", "user1-team.example.com", "*.example.com", ""},
		"below the tenant":       {"{name}.{tenant}.{base}", "user1", "team", "example.com", "user1.team.example.com", "*.team.example.com", ""},
		"with 63 characters":     {DefaultHostTemplate, long, "t", "example.com", long + ".example.com", "*.example.com", ""},
		"a label of 64":          {"{name}-{tenant}.{base}", long, "", "example.com", "", "*.example.com", "63"},
		"more than 253 in all":   {DefaultHostTemplate, long, "t", strings.Repeat("b.", 100) + "example", "", "*." + strings.Repeat("b.", 100) + "example", "253"},
		"a base that is no name": {DefaultHostTemplate, "f", "t", "Example.com", "", "", "made of"},
	} {
		t.Run(name, func(t *testing.T) {
			host, err := tt.template.Host(tt.name, tt.tenant, tt.base)
			var bad *HostNameError
			if host != tt.host || (err != nil) != (tt.problem != "") || err != nil && (!errors.As(err, &bad) || !strings.Contains(err.Error(), tt.problem)) {
				t.Errorf("host %q, %v", host, err)
			}
			if wildcard, _ := tt.template.Wildcard(tt.tenant, tt.base); wildcard != tt.wildcard {
				t.Errorf("wildcard %q, want %q", wildcard, tt.wildcard)
			}
		})
	}
}

func FuzzHostTemplate(f *testing.F) {
	f.Add("{name}.{base}", "user1", "team", "example.com")
	f.Add("{name}-{tenant}.x.{base}", "a", "b", "1.2.3.4.nip.io")
	f.Fuzz(func(t *testing.T, template, name, tenant, base string) {
		parsed, err := ParseHostTemplate(template)
		if err != nil {
			return
		}
		host, err := parsed.Host(name, tenant, base)
		if err == nil && dnsProblem(host) != "" {
			t.Errorf("host %q: %s", host, dnsProblem(host))
		}
	})
}

func TestTheBaseDomainIsMadeOfTheLoadBalancersAddress(t *testing.T) {
	lb := func(ips ...string) (out []networkingv1.IngressLoadBalancerIngress) {
		for _, ip := range ips {
			if strings.HasSuffix(ip, ".com") {
				out = append(out, networkingv1.IngressLoadBalancerIngress{Hostname: ip})
			} else {
				out = append(out, networkingv1.IngressLoadBalancerIngress{IP: ip})
			}
		}
		return out
	}
	for name, tt := range map[string]struct {
		configured string
		addresses  []networkingv1.IngressLoadBalancerIngress
		want       string
		err        string
	}{
		"configured":               {"fn.example.com", lb("203.0.113.7"), "fn.example.com", ""},
		"configured, of one label": {"localhost", nil, "localhost", ""},
		"configured badly":         {"Example.com", nil, "", "is no DNS name"},
		"IPv4":                     {"", lb("203.0.113.7"), "203.0.113.7.nip.io", ""},
		"several":                  {"", lb("203.0.113.7", "203.0.113.8"), "203.0.113.7.nip.io", ""},
		"IPv4 in IPv6":             {"", lb("::ffff:203.0.113.7"), "203.0.113.7.nip.io", ""},
		"IPv6":                     {"", lb("2001:db8::7"), "2001-db8--7.sslip.io", ""},
		"IPv6 that begins so":      {"", lb("::7"), "0--7.sslip.io", ""},
		"IPv6 that ends so":        {"", lb("2001:db8::"), "2001-db8--0.sslip.io", ""},
		"IPv4 after IPv6":          {"", lb("2001:db8::7", "203.0.113.7"), "203.0.113.7.nip.io", ""},
		"an address after a name":  {"", lb("x.elb.amazonaws.com", "203.0.113.7"), "203.0.113.7.nip.io", ""},
		"a name alone":             {"", lb("x.elb.amazonaws.com"), "", "only the name x.elb.amazonaws.com"},
		"nothing":                  {"", nil, "", "no address yet"},
	} {
		t.Run(name, func(t *testing.T) {
			got, err := BaseDomainFrom(tt.configured, tt.addresses)
			if got != tt.want || (err != nil) != (tt.err != "") || err != nil && !strings.Contains(err.Error(), tt.err) {
				t.Errorf("got %q, %v", got, err)
			}
			if err == nil && dnsProblem("n."+got) != "" {
				t.Errorf("%q: %s", got, dnsProblem("n."+got))
			}
		})
	}
	_, err := BaseDomainFrom("", lb("x.elb.amazonaws.com"))
	var names *NoBaseDomainError
	if !errors.As(err, &names) || !strings.Contains(err.Error(), DefaultBaseDomainSetting) {
		t.Errorf("got %v, which does not say what to set", err)
	}
	if _, err := BaseDomainFrom("", nil); !errors.Is(err, ErrNoAddress) {
		t.Errorf("got %v", err)
	}
}
