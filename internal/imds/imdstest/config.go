package imdstest

import (
	"bytes"
	"encoding/json"
	"fmt"
	"maps"
	"time"
)

// Config is what an instance is. It is also the JSON of the command's file;
// durations there are in nanoseconds, times in RFC 3339. Zero values take
// those of Default, except where absence means something.
type Config struct {
	InstanceID     string `json:"instanceId,omitempty"`
	InstanceType   string `json:"instanceType,omitempty"`
	ImageID        string `json:"imageId,omitempty"`
	AccountID      string `json:"accountId,omitempty"`
	Architecture   string `json:"architecture,omitempty"`
	LifeCycle      string `json:"lifeCycle,omitempty"`
	Region         string `json:"region,omitempty"`
	Zone           string `json:"zone,omitempty"`
	ZoneID         string `json:"zoneId,omitempty"`
	Partition      string `json:"partition,omitempty"`
	ServicesDomain string `json:"servicesDomain,omitempty"`
	LocalIPv4      string `json:"localIpv4,omitempty"`
	LocalIPv6      string `json:"localIpv6,omitempty"` // none when empty
	Hostname       string `json:"hostname,omitempty"`
	MAC            string `json:"mac,omitempty"`
	// PublicKeys are OpenSSH keys by name.
	PublicKeys map[string]string `json:"publicKeys,omitempty"`

	// UserData is absent (404) when empty.
	UserData string `json:"userData,omitempty"`
	// Tags are absent (404) when nil.
	Tags map[string]string `json:"tags,omitempty"`
	// Role is the name of the instance's role; it has none when empty.
	Role string `json:"role,omitempty"`
	// Credentials of the role.
	Credentials Credentials `json:"credentials"`

	// What EC2 announces; absent (404) when zero, but Maintenance is then [].
	SpotAction  *SpotAction   `json:"spotAction,omitempty"`
	Rebalance   *time.Time    `json:"rebalance,omitempty"`
	Maintenance []Maintenance `json:"maintenance,omitempty"`
	TargetState string        `json:"targetLifecycleState,omitempty"`

	// Extra are further values, or others for those above, by their path below
	// /latest, such as "meta-data/ami-launch-index".
	Extra map[string]string `json:"extra,omitempty"`
	// Missing are paths that answer 404 with everything below them.
	Missing []string `json:"missing,omitempty"`

	// AllowV1 answers requests without a token, as an instance does whose
	// HttpTokens are optional.
	AllowV1 bool `json:"allowV1,omitempty"`
	// OnlyV1 answers as before there were tokens: 404 for the token path.
	OnlyV1 bool `json:"onlyV1,omitempty"`
	// Disabled answers 403 to everything (HttpEndpoint disabled).
	Disabled bool `json:"disabled,omitempty"`
	// HopLimitTooLow never answers token requests: what a client one network
	// hop too far away sees.
	HopLimitTooLow bool `json:"hopLimitTooLow,omitempty"`
	// Faults are in effect from the start.
	Faults []Fault `json:"faults,omitempty"`
}

// Credentials of an instance's role.
type Credentials struct {
	AccessKeyID     string `json:"accessKeyId,omitempty"`
	SecretAccessKey string `json:"secretAccessKey,omitempty"`
	SessionToken    string `json:"sessionToken,omitempty"`
	// Expiration, when zero, is always six hours away.
	Expiration time.Time `json:"expiration,omitzero"`
	// Code other than Success makes the credentials unusable.
	Code string `json:"code,omitempty"`
}

// SpotAction is an interruption notice.
type SpotAction struct {
	Action string    `json:"action"`
	Time   time.Time `json:"time"`
}

// Maintenance is a scheduled event.
type Maintenance struct {
	ID          string    `json:"id"`
	Code        string    `json:"code"`
	State       string    `json:"state"`
	Description string    `json:"description,omitempty"`
	NotBefore   time.Time `json:"notBefore"`
	NotAfter    time.Time `json:"notAfter,omitzero"`
}

// Default is an arm64 Spot instance with a role and tags, without user-data
// and notices.
func Default() Config {
	return Config{
		InstanceID: "i-0123456789abcdef0", InstanceType: "t4g.xlarge", ImageID: "ami-0123456789abcdef0",
		AccountID: "123456789012", Architecture: "arm64", LifeCycle: "spot",
		Region: "eu-central-1", Zone: "eu-central-1a", ZoneID: "euc1-az2",
		Partition: "aws", ServicesDomain: "amazonaws.com",
		LocalIPv4: "10.0.1.23", Hostname: "ip-10-0-1-23.eu-central-1.compute.internal", MAC: "02:00:0a:00:01:17",
		Tags: map[string]string{"Name": "worker-1", "hearth.sh:pool": "wasm"},
		Role: "hearth-node",
		Credentials: Credentials{AccessKeyID: "ASIAEXAMPLEEXAMPLE00", SecretAccessKey: "example-secret-access-key", SessionToken: "example-session-token",
			Code: "Success"},
	}
}

// ParseConfig reads a command's file. Fields it does not know are errors.
func ParseConfig(b []byte) (Config, error) {
	c := Default()
	c.Tags = nil // JSON would merge its tags into the default's
	d := json.NewDecoder(bytes.NewReader(b))
	d.DisallowUnknownFields()
	if err := d.Decode(&c); err != nil {
		return Config{}, fmt.Errorf("reading the instance's configuration: %w", err)
	}
	return c, nil
}

// clone has no map or slice in common with c.
func (c Config) clone() Config {
	c.Tags, c.Extra, c.PublicKeys = maps.Clone(c.Tags), maps.Clone(c.Extra), maps.Clone(c.PublicKeys)
	c.Maintenance = append([]Maintenance(nil), c.Maintenance...)
	c.Missing = append([]string(nil), c.Missing...)
	c.Faults = append([]Fault(nil), c.Faults...)
	return c
}

const eventTime = "2 Jan 2006 15:04:05 GMT"

// tree is every value by its path below /latest/. A directory is listed from
// the paths below it.
func (c Config) tree(now time.Time) map[string]string {
	t := map[string]string{}
	put := func(path, value string) {
		if value != "" {
			t[path] = value
		}
	}
	js := func(path string, v any) {
		b, err := json.MarshalIndent(v, "", "  ")
		if err != nil { // a value of Config cannot fail to encode
			panic(err)
		}
		t[path] = string(b)
	}
	const m = "meta-data/"
	put(m+"instance-id", c.InstanceID)
	put(m+"instance-type", c.InstanceType)
	put(m+"instance-life-cycle", c.LifeCycle)
	put(m+"instance-action", "none")
	put(m+"ami-id", c.ImageID)
	put(m+"ami-launch-index", "0")
	put(m+"ami-manifest-path", "(unknown)")
	put(m+"hostname", c.Hostname)
	put(m+"local-hostname", c.Hostname)
	put(m+"local-ipv4", c.LocalIPv4)
	put(m+"ipv6", c.LocalIPv6)
	put(m+"mac", c.MAC)
	put(m+"profile", "default-hvm")
	put(m+"reservation-id", "r-0123456789abcdef0")
	put(m+"security-groups", "default")
	put(m+"system", "nitro")
	put(m+"placement/availability-zone", c.Zone)
	put(m+"placement/availability-zone-id", c.ZoneID)
	put(m+"placement/region", c.Region)
	put(m+"services/domain", c.ServicesDomain)
	put(m+"services/partition", c.Partition)
	put(m+"block-device-mapping/ami", "/dev/xvda")
	put(m+"block-device-mapping/root", "/dev/xvda")

	if c.MAC != "" {
		nic := m + "network/interfaces/macs/" + c.MAC + "/"
		put(nic+"device-number", "0")
		put(nic+"interface-id", "eni-0123456789abcdef0")
		put(nic+"mac", c.MAC)
		put(nic+"local-hostname", c.Hostname)
		put(nic+"local-ipv4s", c.LocalIPv4)
		put(nic+"ipv6s", c.LocalIPv6)
		put(nic+"owner-id", c.AccountID)
		put(nic+"subnet-id", "subnet-0123456789abcdef0")
		put(nic+"vpc-id", "vpc-0123456789abcdef0")
		if c.LocalIPv4 != "" {
			put(nic+"subnet-ipv4-cidr-block", "10.0.0.0/16")
			put(nic+"vpc-ipv4-cidr-block", "10.0.0.0/16")
		}
	}
	i := 0
	for _, name := range sortedKeys(c.PublicKeys) {
		// The listing has "0=name", the key is below "0".
		put(fmt.Sprintf("%spublic-keys/%d/openssh-key", m, i), c.PublicKeys[name])
		i++
	}
	for k, v := range c.Tags {
		t[m+"tags/instance/"+k] = v // an empty value is one
	}

	document := map[string]any{
		"accountId": c.AccountID, "architecture": c.Architecture, "availabilityZone": c.Zone, "billingProducts": nil,
		"devpayProductCodes": nil, "marketplaceProductCodes": nil, "imageId": c.ImageID, "instanceId": c.InstanceID,
		"instanceType": c.InstanceType, "kernelId": nil, "pendingTime": "2026-01-02T03:04:05Z", "privateIp": nil,
		"ramdiskId": nil, "region": c.Region, "version": "2017-09-30",
	}
	if c.LocalIPv4 != "" {
		document["privateIp"] = c.LocalIPv4
	}
	js("dynamic/instance-identity/document", document)

	if c.Role != "" {
		cr := c.Credentials
		if cr.Expiration.IsZero() {
			cr.Expiration = now.Add(6 * time.Hour)
		}
		stamp := now.UTC().Format(time.RFC3339)
		js(m+"iam/info", map[string]any{"Code": "Success", "LastUpdated": stamp,
			"InstanceProfileArn": "arn:" + c.Partition + ":iam::" + c.AccountID + ":instance-profile/" + c.Role, "InstanceProfileId": "AIPAEXAMPLEEXAMPLE000"})
		js(m+"iam/security-credentials/"+c.Role, map[string]any{"Code": cr.Code, "LastUpdated": stamp, "Type": "AWS-HMAC",
			"AccessKeyId": cr.AccessKeyID, "SecretAccessKey": cr.SecretAccessKey, "Token": cr.SessionToken, "Expiration": cr.Expiration.UTC().Format(time.RFC3339)})
	}

	events := make([]map[string]any, 0, len(c.Maintenance))
	for _, e := range c.Maintenance {
		ev := map[string]any{"EventId": e.ID, "Code": e.Code, "State": e.State, "Description": e.Description, "NotBefore": e.NotBefore.UTC().Format(eventTime)}
		if !e.NotAfter.IsZero() {
			ev["NotAfter"] = e.NotAfter.UTC().Format(eventTime)
		}
		events = append(events, ev)
	}
	js(m+"events/maintenance/history", []string{})
	js(m+"events/maintenance/scheduled", events)
	if c.SpotAction != nil {
		js(m+"spot/instance-action", map[string]string{"action": c.SpotAction.Action, "time": c.SpotAction.Time.UTC().Format(time.RFC3339)})
		put(m+"spot/termination-time", c.SpotAction.Time.UTC().Format(time.RFC3339))
	}
	if c.Rebalance != nil {
		js(m+"events/recommendations/rebalance", map[string]string{"noticeTime": c.Rebalance.UTC().Format(time.RFC3339)})
	}
	put(m+"autoscaling/target-lifecycle-state", c.TargetState)
	put("user-data", c.UserData)
	for k, v := range c.Extra {
		t[k] = v
	}
	return t
}
