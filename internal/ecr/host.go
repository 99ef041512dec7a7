package ecr

import (
	"regexp"
	"strings"
)

// Registry is what a host name of Amazon ECR says.
type Registry struct {
	// Account is the registry's AWS account, 12 digits; "" when Public.
	Account string
	// Region is where the registry is, and where its tokens are issued. Public
	// registries' tokens are issued in us-east-1.
	Region string
	// Public says that it is the public registry, which also answers without
	// credentials, at a lower rate.
	Public bool
	// FIPS and DualStack say at which kind of endpoint the host is; tokens are
	// taken from the same kind.
	FIPS      bool
	DualStack bool
}

// publicRegion is the only region that issues tokens for public registries to
// clients of every region.
const publicRegion = "us-east-1"

// domains of private registries; it is to them alone that credentials go.
var domains = []struct {
	suffix    string
	dualStack bool
}{
	{".amazonaws.com", false},
	{".amazonaws.com.cn", false},
	{".amazonaws.eu", false},   // European Sovereign Cloud
	{".c2s.ic.gov", false},     // ISO
	{".sc2s.sgov.gov", false},  // ISO-B
	{".cloud.adc-e.uk", false}, // ISO-E
	{".csp.hci.ic.gov", false}, // ISO-F
	{".on.aws", true},          // dual stack
	{".on.amazonwebservices.com.cn", true},
	{".on.amazonwebservices.eu", true},
}

var (
	registryPattern = regexp.MustCompile(`^([0-9]{12})\.dkr([.-])ecr(-fips)?\.([a-z]{2,6}(?:-[a-z]{2,12}){1,3}-[0-9]{1,2})$`)
	publicHosts     = map[string]bool{"public.ecr.aws": false, "ecr-public.aws.com": true}
)

// ParseHost recognises the hosts of ECR, as they are in image references:
// lower case, with no scheme and no port but 443. It answers false for every
// other host, and for those that only look alike.
func ParseHost(host string) (Registry, bool) {
	host = strings.TrimSuffix(host, ":443")
	if dual, ok := publicHosts[host]; ok {
		return Registry{Region: publicRegion, Public: true, DualStack: dual}, true
	}
	for _, d := range domains {
		rest, ok := strings.CutSuffix(host, d.suffix)
		if !ok {
			continue
		}
		m := registryPattern.FindStringSubmatch(rest)
		// account.dkr.ecr.region of the first kind, account.dkr-ecr.region of
		// the second.
		if m == nil || (m[2] == "-") != d.dualStack {
			continue
		}
		return Registry{Account: m[1], Region: m[4], FIPS: m[3] != "", DualStack: d.dualStack}, true
	}
	return Registry{}, false
}

// SameRegistry says whether two hosts lead to the same registry of ECR: each has
// several names, for FIPS endpoints and dual stack.
func SameRegistry(a, b string) bool {
	x, ok := ParseHost(a)
	y, also := ParseHost(b)
	return ok && also && x.Account == y.Account && x.Region == y.Region && x.Public == y.Public
}
