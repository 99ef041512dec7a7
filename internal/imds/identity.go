package imds

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"regexp"
	"strings"
	"time"

	"golang.org/x/sync/errgroup"
)

// Architecture is the instance's, in EC2's terms.
type Architecture string

// Architectures that run Linux.
const (
	ArchitectureARM64 Architecture = "arm64"
	ArchitectureAMD64 Architecture = "x86_64"
)

// GOARCH is Go's name of the architecture; EC2's own for those Go lacks here.
func (a Architecture) GOARCH() string {
	if a == ArchitectureAMD64 {
		return "amd64"
	}
	return string(a)
}

// LifeCycle says how the instance was bought, and so how it may end. EC2 may
// add values; compare with those that matter.
type LifeCycle string

// Life cycles known today.
const (
	LifeCycleOnDemand      LifeCycle = "on-demand"
	LifeCycleSpot          LifeCycle = "spot"
	LifeCycleScheduled     LifeCycle = "scheduled"
	LifeCycleCapacityBlock LifeCycle = "capacity-block"
)

// Identity is who this instance is. All of it stays the same until the
// instance stops, except Role, Hostname and the addresses.
type Identity struct {
	InstanceID   string // i-0123456789abcdef0
	InstanceType string // t4g.xlarge
	ImageID      string // ami-0123456789abcdef0
	AccountID    string // 12 digits
	Architecture Architecture
	LifeCycle    LifeCycle

	Region string // eu-central-1
	Zone   string // eu-central-1a; an account's own name for ZoneID
	ZoneID string // euc1-az2; the same in all accounts

	// Partition and ServicesDomain say which AWS this is: "aws" and
	// "amazonaws.com", "aws-cn" and "amazonaws.com.cn", ...
	Partition      string
	ServicesDomain string

	// LocalIPv4 and LocalIPv6 are the primary addresses of the primary network
	// interface; the zero Addr where the subnet has no such family. One is set.
	LocalIPv4 netip.Addr
	LocalIPv6 netip.Addr
	// Hostname is the private DNS name.
	Hostname string

	// Role is the IAM role whose credentials the instance gets; "" without one.
	Role string
	// PendingTime is when the instance was last started.
	PendingTime time.Time
}

// ProviderID is the identity as the Node object's spec.providerID has it:
// aws:///<zone>/<instance id>.
func (i Identity) ProviderID() string { return "aws:///" + i.Zone + "/" + i.InstanceID }

const (
	pathDocument   = "dynamic/instance-identity/document"
	pathInstanceID = "meta-data/instance-id"
	pathZone       = "meta-data/placement/availability-zone"
	pathZoneID     = "meta-data/placement/availability-zone-id"
	pathRegion     = "meta-data/placement/region"
	pathIPv4       = "meta-data/local-ipv4"
	pathIPv6       = "meta-data/ipv6"
	pathHostname   = "meta-data/local-hostname"
	pathLifeCycle  = "meta-data/instance-life-cycle"
	pathRoles      = "meta-data/iam/security-credentials/"
	pathPartition  = "meta-data/services/partition"
	pathDomain     = "meta-data/services/domain"
)

// concurrentReads bounds the requests that one snapshot has in flight. The
// service throttles by packets per second of the network interface.
const concurrentReads = 4

var (
	instanceIDPattern   = regexp.MustCompile(`^i-(?:[0-9a-f]{8}|[0-9a-f]{17})$`)
	imageIDPattern      = regexp.MustCompile(`^ami-(?:[0-9a-f]{8}|[0-9a-f]{17})$`)
	instanceTypePattern = regexp.MustCompile(`^[a-z0-9][a-z0-9-]{0,31}\.[a-z0-9][a-z0-9-]{0,31}$`)
	accountPattern      = regexp.MustCompile(`^[0-9]{12}$`)
	regionPattern       = regexp.MustCompile(`^[a-z]{2,6}(?:-[a-z]{2,12}){1,3}-[0-9]{1,2}$`)
	// After the region comes a letter, or the name of a Local or Wavelength
	// Zone and a letter or digit: us-west-2-lax-1a, us-east-1-wl1-bos-wlz-1.
	zonePattern         = regexp.MustCompile(`^(?:[a-z]|(?:-[a-z0-9]{1,12}){2,5})$`)
	zoneIDPattern       = regexp.MustCompile(`^[a-z]{2,8}[0-9]{1,2}(?:-[a-z0-9]{1,12}){1,5}$`)
	architecturePattern = regexp.MustCompile(`^[a-z0-9][a-z0-9_]{1,31}$`)
	lifeCyclePattern    = regexp.MustCompile(`^[a-z](?:-?[a-z]){0,63}$`)
	partitionPattern    = regexp.MustCompile(`^aws(?:-[a-z]{1,12}){0,3}$`)
	hostnamePattern     = regexp.MustCompile(`^[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?(?:\.[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?)*$`)
	rolePattern         = regexp.MustCompile(`^[A-Za-z0-9_+=,.@-]{1,64}$`)
)

// maxHostnameBytes is the limit of DNS.
const maxHostnameBytes = 253

// Identity reads a consistent snapshot: keys that are also in the identity
// document must agree with it. Everything but Role and one of the addresses
// is required, and an absent key is then an error of kind ErrNotFound.
func (c *Client) Identity(ctx context.Context) (Identity, error) {
	// One read alone first: it gets the session token, which the concurrent
	// ones would otherwise queue for.
	document, err := c.read(ctx, pathDocument)
	if err != nil {
		return Identity{}, err
	}
	id, err := ParseDocument(document)
	if err != nil {
		return Identity{}, err
	}
	var instanceID, zone, region, ipv4 string
	keys := []struct {
		path     string
		pattern  *regexp.Regexp
		into     *string
		optional bool
	}{
		{pathInstanceID, instanceIDPattern, &instanceID, false},
		{pathZone, nil, &zone, false}, // compared with the document's
		{pathRegion, regionPattern, &region, false},
		{pathZoneID, zoneIDPattern, &id.ZoneID, false},
		{pathHostname, hostnamePattern, &id.Hostname, false},
		{pathLifeCycle, lifeCyclePattern, (*string)(&id.LifeCycle), false},
		{pathPartition, partitionPattern, &id.Partition, false},
		{pathDomain, hostnamePattern, &id.ServicesDomain, false},
		{pathIPv4, nil, &ipv4, true},
	}
	group, ctx := errgroup.WithContext(ctx)
	group.SetLimit(concurrentReads)
	for _, k := range keys {
		group.Go(func() error {
			value, err := c.value(ctx, k.path, k.pattern)
			if k.optional && errors.Is(err, ErrNotFound) {
				return nil
			}
			*k.into = value
			return err
		})
	}
	group.Go(func() (err error) {
		id.Role, err = c.Role(ctx)
		return err
	})
	group.Go(func() (err error) {
		id.LocalIPv6, err = c.ipv6(ctx)
		return err
	})
	if err := group.Wait(); err != nil {
		return Identity{}, err
	}
	switch {
	case instanceID != id.InstanceID:
		return Identity{}, malformed(pathInstanceID, "it is %s, but the identity document says %s", instanceID, id.InstanceID)
	case zone != id.Zone:
		return Identity{}, malformed(pathZone, "it is %s, but the identity document says %s", quote(zone), id.Zone)
	case region != id.Region:
		return Identity{}, malformed(pathRegion, "it is %s, but the identity document says %s", region, id.Region)
	case ipv4 != "" && ipv4 != id.LocalIPv4.String():
		// The document is written at start; the key follows the interface.
		addr, err := netip.ParseAddr(ipv4)
		if err != nil || !addr.Is4() {
			return Identity{}, malformed(pathIPv4, "%s is not an IPv4 address", quote(ipv4))
		}
		id.LocalIPv4 = addr
	}
	if !id.LocalIPv4.IsValid() && !id.LocalIPv6.IsValid() {
		return Identity{}, malformed(pathIPv4, "the instance has neither an IPv4 nor an IPv6 address")
	}
	if len(id.Hostname) > maxHostnameBytes || len(id.ServicesDomain) > maxHostnameBytes {
		return Identity{}, malformed(pathHostname, "a DNS name has more than %d bytes", maxHostnameBytes)
	}
	return id, nil
}

// ParseDocument reads the fields of an instance identity document (JSON, at
// most 16 KiB; the format is in "Instance identity documents" of the EC2 User
// Guide) that Identity takes from it. Unknown fields are ignored, wrong ones
// are errors of kind ErrMalformed. The signature is not checked: what could
// forge the document on this machine could forge the check.
func ParseDocument(b []byte) (Identity, error) {
	if len(b) > maxAnswerBytes {
		return Identity{}, malformed(pathDocument, "it has %d bytes, more than %d", len(b), maxAnswerBytes)
	}
	var doc struct {
		AccountID        string    `json:"accountId"`
		Architecture     string    `json:"architecture"`
		AvailabilityZone string    `json:"availabilityZone"`
		ImageID          string    `json:"imageId"`
		InstanceID       string    `json:"instanceId"`
		InstanceType     string    `json:"instanceType"`
		PendingTime      time.Time `json:"pendingTime"`
		PrivateIP        *string   `json:"privateIp"` // null in a subnet with only IPv6
		Region           string    `json:"region"`
	}
	if err := json.Unmarshal(b, &doc); err != nil {
		return Identity{}, malformed(pathDocument, "%w", shortJSONError(err))
	}
	for _, f := range []struct {
		name, value string
		pattern     *regexp.Regexp
	}{
		{"accountId", doc.AccountID, accountPattern},
		{"architecture", doc.Architecture, architecturePattern},
		{"imageId", doc.ImageID, imageIDPattern},
		{"instanceId", doc.InstanceID, instanceIDPattern},
		{"instanceType", doc.InstanceType, instanceTypePattern},
		{"region", doc.Region, regionPattern},
	} {
		if !f.pattern.MatchString(f.value) {
			return Identity{}, malformed(pathDocument, "its field %s is %s", f.name, quote(f.value))
		}
	}
	suffix, ok := strings.CutPrefix(doc.AvailabilityZone, doc.Region)
	if !ok || !zonePattern.MatchString(suffix) {
		return Identity{}, malformed(pathDocument, "its zone %s is not in its region %s", quote(doc.AvailabilityZone), doc.Region)
	}
	id := Identity{
		InstanceID: doc.InstanceID, InstanceType: doc.InstanceType, ImageID: doc.ImageID, AccountID: doc.AccountID,
		Architecture: Architecture(doc.Architecture), Region: doc.Region, Zone: doc.AvailabilityZone, PendingTime: doc.PendingTime,
	}
	if doc.PrivateIP != nil && *doc.PrivateIP != "" {
		addr, err := netip.ParseAddr(*doc.PrivateIP)
		if err != nil || !addr.Is4() {
			return Identity{}, malformed(pathDocument, "its field privateIp is %s", quote(*doc.PrivateIP))
		}
		id.LocalIPv4 = addr
	}
	return id, nil
}

// shortJSONError cuts what encoding/json quotes of the input.
func shortJSONError(err error) error {
	if s := err.Error(); len(s) > 200 {
		return errors.New(s[:200])
	}
	return err
}

// value reads one line that must match the pattern, when there is one.
func (c *Client) value(ctx context.Context, path string, pattern *regexp.Regexp) (string, error) {
	b, err := c.read(ctx, path)
	if err != nil {
		return "", err
	}
	s := strings.TrimSuffix(string(b), "\n")
	if pattern != nil && !pattern.MatchString(s) {
		return "", malformed(path, "it is %s", quote(s))
	}
	return s, nil
}

// ipv6 reads the primary IPv6 address; the zero Addr without one.
func (c *Client) ipv6(ctx context.Context) (netip.Addr, error) {
	s, err := c.value(ctx, pathIPv6, nil)
	if errors.Is(err, ErrNotFound) {
		return netip.Addr{}, nil
	} else if err != nil {
		return netip.Addr{}, err
	}
	addr, err := netip.ParseAddr(s)
	if err != nil || !addr.Is6() || addr.Zone() != "" || addr.Is4In6() {
		return netip.Addr{}, malformed(pathIPv6, "%s is not an IPv6 address", quote(s))
	}
	return addr, nil
}

// Role returns the name of the IAM role whose credentials the instance gets,
// or "" when it has none.
func (c *Client) Role(ctx context.Context) (string, error) {
	s, err := c.value(ctx, pathRoles, nil)
	if errors.Is(err, ErrNotFound) || err == nil && s == "" {
		return "", nil
	} else if err != nil {
		return "", err
	}
	if !rolePattern.MatchString(s) {
		return "", malformed(pathRoles, "%s is not one name of a role", quote(s))
	}
	return s, nil
}

// UserData returns the instance's user-data as it was given, at most 32 KiB,
// without undoing any compression; nil when there is none. Anyone on the
// instance can read it, so it is no place for secrets.
func (c *Client) UserData(ctx context.Context) ([]byte, error) {
	b, err := c.read(ctx, pathUserData)
	if errors.Is(err, ErrNotFound) {
		return nil, nil
	}
	return b, err
}

const (
	pathTags = "meta-data/tags/instance/"
	// maxTags is EC2's limit.
	maxTags = 50
	// maxTagKey and maxTagValue are EC2's limits in characters.
	maxTagKey   = 128
	maxTagValue = 256
)

// tagKeyPattern has the characters that EC2 allows in keys when tags are in
// metadata. The keys "." and ".." are excluded separately: they are paths.
var tagKeyPattern = regexp.MustCompile(`^[\p{L}\p{N}+\-=.,_:@]+$`)

// ErrNoTags is what Tags returns (with kind ErrNotFound) when metadata has no
// tags: none are set, or the instance does not allow them in metadata.
var ErrNoTags = errors.New("no tags in instance metadata")

// Tags returns the instance's tags, which the instance's metadata options must
// allow (InstanceMetadataTags). Changes show within minutes.
func (c *Client) Tags(ctx context.Context) (map[string]string, error) {
	list, err := c.read(ctx, pathTags)
	if errors.Is(err, ErrNotFound) {
		return nil, &Error{Kind: ErrNotFound, Path: pathTags, Status: 404, Err: ErrNoTags,
			sentence: "instance metadata has no tags (404); set them, and enable InstanceMetadataTags in the instance's metadata options"}
	} else if err != nil {
		return nil, err
	}
	keys, err := ParseTagKeys(list)
	if err != nil {
		return nil, err
	}
	values := make([]*string, len(keys))
	group, ctx := errgroup.WithContext(ctx)
	group.SetLimit(concurrentReads)
	for i, key := range keys {
		group.Go(func() error {
			path := pathTags + key
			b, err := c.read(ctx, path)
			if errors.Is(err, ErrNotFound) {
				return nil // removed since it was listed
			} else if err != nil {
				return err
			}
			value := string(b)
			if n := len([]rune(value)); n > maxTagValue {
				return malformed(pathTags, "the value of tag %s has %d characters, more than %d", quote(key), n, maxTagValue)
			}
			values[i] = &value
			return nil
		})
	}
	if err := group.Wait(); err != nil {
		return nil, err
	}
	tags := make(map[string]string, len(keys))
	for i, key := range keys {
		if values[i] != nil {
			tags[key] = *values[i]
		}
	}
	return tags, nil
}

// ParseTagKeys reads the listing of tag keys, one a line, at most 50. Keys that
// could be taken for paths are errors of kind ErrMalformed.
func ParseTagKeys(b []byte) ([]string, error) {
	var keys []string
	seen := map[string]bool{}
	for key := range strings.SplitSeq(strings.TrimSuffix(string(b), "\n"), "\n") {
		switch {
		case key == "" && len(b) <= 1:
			return nil, nil
		case key == "." || key == ".." || len([]rune(key)) > maxTagKey || !tagKeyPattern.MatchString(key):
			return nil, malformed(pathTags, "%s is not a tag's key", quote(key))
		case seen[key]:
			return nil, malformed(pathTags, "tag %s is there twice", quote(key))
		case len(keys) == maxTags:
			return nil, malformed(pathTags, "there are more than %d tags", maxTags)
		}
		seen[key] = true
		keys = append(keys, key)
	}
	return keys, nil
}

// String identifies the instance in logs.
func (i Identity) String() string {
	return fmt.Sprintf("%s (%s, %s, %s)", i.InstanceID, i.InstanceType, i.LifeCycle, i.Zone)
}
