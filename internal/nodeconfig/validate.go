package nodeconfig

import (
	"encoding/base64"
	"fmt"
	"net/netip"
	"net/url"
	"path"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"k8s.io/apimachinery/pkg/api/resource"
	"k8s.io/apimachinery/pkg/util/validation"

	"github.com/hearth-sh/hearth/api/v1alpha1"
)

const (
	roleServer = v1alpha1.RoleServer
	roleAgent  = v1alpha1.RoleAgent

	cniFlannel = "flannel"
)

// What enumerated fields may say. The JSON Schema is generated from these and
// the patterns below.
var (
	roles           = []v1alpha1.NodeRole{roleServer, roleAgent}
	pools           = []v1alpha1.NodePool{v1alpha1.PoolControlPlane, v1alpha1.PoolObservability, v1alpha1.PoolWasm, v1alpha1.PoolBuild, v1alpha1.PoolBackend}
	effects         = []string{"NoSchedule", "PreferNoSchedule", "NoExecute"}
	architectures   = []string{"arm64", "amd64"}
	formats         = []string{"raw", "gzip", "zstd", "tar", "tar+gzip", "tar+zstd"}
	cnis            = []string{cniFlannel, "calico", "cilium", "custom"}
	flannelBackends = []string{"vxlan", "host-gw", "wireguard-native", "none"}
)

// Pools lists the built-in profiles.
func Pools() []v1alpha1.NodePool { return slices.Clone(pools) }

const (
	dnsLabelPattern = `^[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?$`
	// storePattern: a bucket with a prefix, or a path of SSM parameters.
	storePattern = `^(s3://[a-z0-9][a-z0-9.-]{1,61}[a-z0-9](/[A-Za-z0-9!_.*'()=-]+)+/?|ssm:///[A-Za-z0-9_.-]+(/[A-Za-z0-9_.-]+)*)$`
	// bucketPattern: a bucket, with or without a prefix.
	bucketPattern = `^s3://[a-z0-9][a-z0-9.-]{1,61}[a-z0-9](/[A-Za-z0-9!_.*'()=-]+)*/?$`
	regionPattern = `^[a-z]{2,6}(-[a-z0-9]{1,12}){1,3}-[0-9]{1,2}$`
	// kmsKeyPattern: an alias, or the ARN or ID of a key.
	kmsKeyPattern     = `^(arn:aws[a-z-]*:kms:[a-z0-9-]+:[0-9]{12}:(key|alias)/[A-Za-z0-9/_-]{1,256}|alias/[A-Za-z0-9/_-]{1,250}|(mrk-)?[0-9a-f-]{32,36})$`
	serverPattern     = `^https://([A-Za-z0-9.-]{1,253}|\[[0-9A-Fa-f:.]+\]):[0-9]{1,5}$`
	k3sVersionPattern = `^v1\.[0-9]{1,3}\.[0-9]{1,3}(-(alpha|beta|rc)\.?[0-9]{1,3})?\+k3s[0-9]{1,3}(-[A-Za-z0-9.]{1,40})?$`
	digestPattern     = `^[0-9a-f]{64}$`
	publicKeyPattern  = `^ed25519:[A-Za-z0-9+/]{43}=$`
	artifactPattern   = `^[a-z0-9]([a-z0-9._-]{0,98}[a-z0-9])?$`
	versionPattern    = `^[A-Za-z0-9][A-Za-z0-9.+_~-]{0,99}$`
	modePattern       = `^0?[0-7]{3}$`
	handlerPattern    = `^[a-z0-9]([-a-z0-9]{0,38}[a-z0-9])?$`
	modulePattern     = `^[A-Za-z0-9_-]{1,63}$`
	sysctlPattern     = `^[a-z0-9_-]+([./][A-Za-z0-9_.:@-]+)+$`
	hookPattern       = `^[A-Za-z0-9_/-]{1,255}$`
	resourcePattern   = `^[A-Za-z0-9]{1,255}$`
	registryPattern   = `^([A-Za-z0-9]([A-Za-z0-9.-]{0,251}[A-Za-z0-9])?|\[[0-9A-Fa-f:]+\])(:[0-9]{1,5})?$`
	sourcePattern     = `^(https?|s3|file)://`
	durationPattern   = `^([0-9]+(\.[0-9]+)?(ns|us|µs|ms|s|m|h))+$`
)

var (
	storeSyntax      = regexp.MustCompile(storePattern)
	bucketSyntax     = regexp.MustCompile(bucketPattern)
	regionSyntax     = regexp.MustCompile(regionPattern)
	kmsKeySyntax     = regexp.MustCompile(kmsKeyPattern)
	serverSyntax     = regexp.MustCompile(serverPattern)
	k3sVersionSyntax = regexp.MustCompile(k3sVersionPattern)
	digestSyntax     = regexp.MustCompile(digestPattern)
	publicKeySyntax  = regexp.MustCompile(publicKeyPattern)
	artifactSyntax   = regexp.MustCompile(artifactPattern)
	versionSyntax    = regexp.MustCompile(versionPattern)
	modeSyntax       = regexp.MustCompile(modePattern)
	handlerSyntax    = regexp.MustCompile(handlerPattern)
	moduleSyntax     = regexp.MustCompile(modulePattern)
	sysctlSyntax     = regexp.MustCompile(sysctlPattern)
	hookSyntax       = regexp.MustCompile(hookPattern)
	resourceSyntax   = regexp.MustCompile(resourcePattern)
	registrySyntax   = regexp.MustCompile(registryPattern)
	clusterSyntax    = regexp.MustCompile(dnsLabelPattern)
	k3sKeySyntax     = regexp.MustCompile(`^[a-z][a-z0-9-]{0,63}$`)
	s3BucketSyntax   = regexp.MustCompile(`^[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]$`)
)

// Bounds of lists and values.
const (
	maxURLs         = 16
	maxFileEntries  = 64
	maxTLSSANs      = 64
	maxURLBytes     = 2048
	maxArtifactSize = 16 << 30
	maxRetention    = 1000
	maxSSMPath      = 512
)

// validator checks what fields mean, on the merged configuration.
type validator struct {
	ps       *problems
	tree     *node
	config   *v1alpha1.NodeConfig
	instance *Instance
	byPath   map[string]*node
}

func newValidator(ps *problems, tree *node, config *v1alpha1.NodeConfig, instance *Instance) *validator {
	v := &validator{ps: ps, tree: tree, config: config, instance: instance, byPath: map[string]*node{}}
	tree.index("", v.byPath)
	return v
}

// find returns the node at a path, or the nearest above it.
func (v *validator) find(path string) *node {
	for path != "" {
		if n := v.byPath[path]; n != nil {
			return n
		}
		path = path[:max(strings.LastIndexAny(path, ".["), 0)]
	}
	return v.tree
}

func (v *validator) validate() {
	v.profile()
	v.node()
	v.cluster()
	v.k3s()
	v.artifacts()
	v.shims()
	v.network()
	v.registries()
	v.addons()
	v.host()
	v.signal()
	v.timeouts()
	if m := v.config.Spec.Artifacts.Manifest; m == "" {
		v.artifactRules(fileNames(v.config.Spec.Artifacts.Files))
	}
}

// bad reports what somebody said.
func (v *validator) bad(path, format string, args ...any) {
	v.ps.addf(v.find(path).origin, path, format, args...)
}

// missing reports what nobody said.
func (v *validator) missing(path, format string, args ...any) {
	v.ps.add(Problem{Path: path, Message: fmt.Sprintf(format, args...), missing: true})
}

func (v *validator) match(path, value string, syntax *regexp.Regexp, want string) bool {
	if value == "" && v.find(path).value == nil || syntax.MatchString(value) {
		return true
	}
	v.bad(path, "%s is not %s", quote(value), want)
	return false
}

// said tells an empty text from none.
func (v *validator) said(path ...string) bool { return v.tree.at(path...) != nil }

func oneOf[T ~string](v *validator, path string, value T, known []T) {
	if slices.Contains(known, value) {
		return
	}
	words := make([]string, len(known))
	for i, k := range known {
		words[i] = string(k)
	}
	hint := ""
	if best := nearest(string(value), words); best != "" {
		hint = "; did you mean " + best + "?"
	}
	v.bad(path, "%s is not one of %s%s", quote(string(value)), strings.Join(words, ", "), hint)
}

func (v *validator) profile() {
	spec := &v.config.Spec
	oneOf(v, "spec.pool", spec.Pool, pools)
	if spec.Role == "" && !v.said("spec", "role") {
		v.ps.add(Problem{Path: "spec.role", Message: "no pool says what the role is", missing: true})
		return
	}
	oneOf(v, "spec.role", spec.Role, roles)
	if spec.Pool == v1alpha1.PoolControlPlane && spec.Role == roleAgent {
		v.bad("spec.role", "the pool control-plane is for servers; choose another pool for an agent")
	}
	if spec.Role == roleServer && v.instance != nil && v.instance.Spot && !spec.Node.AllowSpotServer {
		v.ps.add(Problem{Path: "spec.role", Origin: v.find("spec.role").origin, code: CodeSpotServer,
			Message: "a server must not run on a Spot instance, which may be taken away with its member of etcd; launch it on demand or set spec.node.allowSpotServer: true"})
	}
}

// kubeletLabels are those under kubernetes.io that NodeRestriction lets a
// kubelet set, beside two namespaces (k8s.io/kubelet/pkg/apis).
var kubeletNamespaces = []string{"kubelet.kubernetes.io", "node.kubernetes.io"}

// ownedLabels are set by kubelet or bootstrap.
var ownedLabels = []string{
	"kubernetes.io/hostname", "kubernetes.io/os", "kubernetes.io/arch", "beta.kubernetes.io/os", "beta.kubernetes.io/arch",
	"topology.kubernetes.io/zone", "topology.kubernetes.io/region", "node.kubernetes.io/instance-type",
	"failure-domain.beta.kubernetes.io/zone", "failure-domain.beta.kubernetes.io/region", "beta.kubernetes.io/instance-type",
}

func (v *validator) node() {
	n := &v.config.Spec.Node
	for _, key := range keysOf(n.Labels) {
		at, value := joinKey("spec.node.labels", key), n.Labels[key]
		if errs := validation.IsQualifiedName(key); len(errs) > 0 {
			v.bad(at, "%s is not a label's key: %s", quote(key), errs[0])
			continue
		}
		if errs := validation.IsValidLabelValue(value); len(errs) > 0 {
			v.bad(at, "%s is not a label's value: %s", quote(value), errs[0])
		}
		namespace, _, _ := strings.Cut(key, "/")
		switch {
		case slices.Contains(ownedLabels, key):
			v.bad(at, "is set from instance metadata; remove it")
		case key == v1alpha1.Group+"/pool":
			if value != string(v.config.Spec.Pool) {
				v.bad(at, "follows spec.pool; set that instead")
			}
		case under(namespace, v1alpha1.Group):
			v.bad(at, "labels under %s are Hearth's own; choose another prefix", v1alpha1.Group)
		case under(namespace, "node-restriction.kubernetes.io"):
			v.bad(at, "a node may not set labels under node-restriction.kubernetes.io; set it with kubectl")
		case slices.ContainsFunc(kubeletNamespaces, func(allowed string) bool { return under(namespace, allowed) }):
		case under(namespace, "kubernetes.io"), under(namespace, "k8s.io"):
			v.bad(at, "a node may not set labels under %s (kubelet would not start); set it with kubectl, or use a prefix of your own", namespace)
		}
	}
	seen := map[string]bool{}
	for i, t := range n.Taints {
		at := joinIndex("spec.node.taints", i)
		if t.Key == "" {
			v.bad(at, "has no key; write key: NAME")
		} else if errs := validation.IsQualifiedName(t.Key); len(errs) > 0 {
			v.bad(at+".key", "%s is not a taint's key: %s", quote(t.Key), errs[0])
		}
		if errs := validation.IsValidLabelValue(t.Value); len(errs) > 0 {
			v.bad(at+".value", "%s is not a taint's value: %s", quote(t.Value), errs[0])
		}
		if t.Effect == "" {
			v.bad(at, "has no effect; write effect: one of %s", strings.Join(effects, ", "))
		} else {
			oneOf(v, at+".effect", t.Effect, effects)
		}
		if id := t.Key + ":" + t.Effect; seen[id] {
			v.bad(at, "the taint %s is there twice", quote(id))
		} else {
			seen[id] = true
		}
	}
}

func under(name, parent string) bool { return name == parent || strings.HasSuffix(name, "."+parent) }

func (v *validator) cluster() {
	c := &v.config.Spec.Cluster
	v.match("spec.cluster.name", c.Name, clusterSyntax, "a cluster's name: 1 to 63 small letters, digits and dashes, such as production")
	switch {
	case !v.said("spec", "cluster", "store"):
		v.missing("spec.cluster.store", "is missing: say where the first server is elected and credentials are kept, s3://BUCKET/PREFIX or ssm:///PATH, or set the tag %scluster-store", TagPrefix)
	case !storeSyntax.MatchString(c.Store):
		v.bad("spec.cluster.store", "%s is not s3://BUCKET/PREFIX or ssm:///PATH%s", quote(c.Store), storeHint(c.Store))
	case strings.HasPrefix(c.Store, "ssm:"):
		name := strings.TrimPrefix(c.Store, "ssm://")
		first := strings.ToLower(strings.SplitN(name, "/", 3)[1])
		switch {
		case strings.HasPrefix(first, "aws"), strings.HasPrefix(first, "ssm"):
			v.bad("spec.cluster.store", "SSM keeps paths that begin with aws or ssm for itself; choose another")
		case strings.Count(name, "/") > 8 || len(name) > maxSSMPath:
			v.bad("spec.cluster.store", "the path has more than 8 levels or %d characters", maxSSMPath)
		}
	}
	const region = "an AWS region, such as eu-central-1"
	v.match("spec.cluster.region", c.Region, regionSyntax, region)
	v.match("spec.cluster.kmsKey", c.KMSKey, kmsKeySyntax, "a key of AWS KMS: its ID, its ARN, or alias/NAME")
	if v.said("spec", "cluster", "server") {
		v.serverURL("spec.cluster.server", c.Server)
	}
	if len(c.TLSSANs) > maxTLSSANs {
		v.bad("spec.cluster.tlsSANs", "has %d entries; at most %d are allowed", len(c.TLSSANs), maxTLSSANs)
	}
	for i, san := range c.TLSSANs {
		if _, err := netip.ParseAddr(san); err == nil {
			continue
		}
		if len(validation.IsDNS1123Subdomain(strings.TrimPrefix(strings.ToLower(san), "*."))) > 0 {
			v.bad(joinIndex("spec.cluster.tlsSANs", i), "%s is neither a DNS name nor an IP address", quote(san))
		}
	}
	v.duration("spec.cluster.lease", c.Lease, 15*time.Second, 10*time.Minute)

	s := &c.Snapshots
	v.match("spec.cluster.snapshots.bucket", s.Bucket, bucketSyntax, "s3://BUCKET or s3://BUCKET/PREFIX")
	v.match("spec.cluster.snapshots.region", s.Region, regionSyntax, region)
	if err := checkCron(s.Schedule); err != nil {
		v.bad("spec.cluster.snapshots.schedule", "%s is not a schedule in cron's form: %v", quote(s.Schedule), err)
	}
	if s.Retention < 1 || s.Retention > maxRetention {
		v.bad("spec.cluster.snapshots.retention", "must be between 1 and %d", maxRetention)
	}
	if r := c.Restore; r != nil {
		if r.Generation < 1 {
			v.bad("spec.cluster.restore.generation", "must be the generation whose servers are lost, 1 or more; the store shows it")
		}
		switch {
		case r.Snapshot == "":
			v.bad("spec.cluster.restore.snapshot", "is missing: name the snapshot in the bucket, or its absolute path")
		case strings.HasPrefix(r.Snapshot, "/"):
			if path.Clean(r.Snapshot) != r.Snapshot {
				v.bad("spec.cluster.restore.snapshot", "%s is not a clean absolute path", quote(r.Snapshot))
			}
		case strings.ContainsAny(r.Snapshot, "/\x00 \n") || len(r.Snapshot) > 255:
			v.bad("spec.cluster.restore.snapshot", "%s is neither a snapshot's name nor an absolute path", quote(r.Snapshot))
		case s.Bucket == "":
			v.bad("spec.cluster.restore.snapshot", "is a name in a bucket, but spec.cluster.snapshots.bucket is not set; set it, or give an absolute path")
		}
	}
}

func storeHint(store string) string {
	switch {
	case strings.HasPrefix(store, "ssm:") && !strings.HasPrefix(store, "ssm:///"):
		return "; SSM's form has three slashes"
	case strings.HasPrefix(store, "s3://") && strings.Count(store, "/") == 2:
		return "; add a prefix, so that the bucket can serve other purposes"
	}
	return ""
}

func (v *validator) serverURL(at, s string) {
	u, err := url.Parse(s)
	switch {
	case err != nil || !strings.HasPrefix(s, "https://"):
		v.bad(at, "%s is not https://HOST:6443", quote(s))
	case u.Port() == "":
		v.bad(at, "%s has no port; write https://HOST:6443", quote(s))
	case !serverSyntax.MatchString(s) || !validPort(u.Port()):
		v.bad(at, "%s is not https://HOST:6443 without anything after it", quote(s))
	}
}

func validPort(s string) bool {
	port, err := strconv.Atoi(s)
	return err == nil && port >= 1 && port <= 65535
}

func (v *validator) duration(at string, d v1alpha1.Duration, low, high time.Duration) time.Duration {
	span, err := d.Span()
	switch {
	case err != nil:
		v.bad(at, "%s is not a time span; write it like 90s or 5m", quote(string(d)))
	case span < low || span > high:
		v.bad(at, "%s is not between %s and %s", quote(string(d)), shortDuration(low), shortDuration(high))
	}
	return span
}

func shortDuration(d time.Duration) string {
	s := d.String()
	if strings.HasSuffix(s, "m0s") {
		s = strings.TrimSuffix(s, "0s")
	}
	if strings.HasSuffix(s, "h0m") {
		s = strings.TrimSuffix(s, "0m")
	}
	return s
}

func (v *validator) k3s() {
	k := &v.config.Spec.K3s
	switch {
	case v.said("spec", "k3s", "version"):
		v.match("spec.k3s.version", k.Version, k3sVersionSyntax, "a release of k3s, such as v1.36.2+k3s1")
	case v.config.Spec.Artifacts.Manifest == "":
		v.missing("spec.k3s.version", "is missing: name the release, such as v1.36.2+k3s1")
	}
	for i, f := range v.config.Spec.Artifacts.Files {
		if f.Name == ArtifactK3s && f.Version != "" && k.Version != "" && f.Version != k.Version {
			v.bad(joinIndex("spec.artifacts.files", i)+".version", "%s is not spec.k3s.version, %s; make them the same", quote(f.Version), quote(k.Version))
		}
	}
	v.k3sConfig()
}

// fileURL checks where something can be had. Digests are known beforehand, so
// plain http is no danger to integrity, but nobody should find out what a
// machine runs: it is for servers on the machine itself.
func (v *validator) fileURL(at, s string, directory bool) {
	u, err := url.Parse(s)
	switch {
	case len(s) > maxURLBytes:
		v.bad(at, "the URL has more than %d bytes", maxURLBytes)
	case err != nil:
		v.bad(at, "%s is not a URL", quote(s))
	case u.User != nil || u.Fragment != "":
		v.bad(at, "a URL here has neither user nor fragment")
	case u.Scheme == "https" && u.Hostname() != "":
	case u.Scheme == "http" && (u.Hostname() == "localhost" || isLoopback(u.Hostname())):
	case u.Scheme == "http":
		v.bad(at, "http is for this machine only; use https")
	case u.Scheme == "s3" && !s3BucketSyntax.MatchString(u.Host):
		v.bad(at, "%s names no S3 bucket; write s3://BUCKET/KEY", quote(s))
	case u.Scheme == "s3" && !directory && strings.Trim(u.Path, "/") == "":
		v.bad(at, "%s names no object; write s3://BUCKET/KEY", quote(s))
	case u.Scheme == "s3":
	case u.Scheme == "file" && u.Host != "":
		v.bad(at, "%s names a host; a file's URL has three slashes", quote(s))
	case u.Scheme == "file" && strings.HasPrefix(u.Path, "/") && path.Clean(u.Path) == strings.TrimSuffix(u.Path, "/"):
	default:
		v.bad(at, "%s is not https://…, s3://BUCKET/KEY or file:///PATH", quote(s))
	}
}

func isLoopback(host string) bool {
	a, err := netip.ParseAddr(host)
	return err == nil && a.IsLoopback()
}

func (v *validator) artifacts() {
	a := &v.config.Spec.Artifacts
	const base = "spec.artifacts"
	if v.said("spec", "artifacts", "manifest") {
		v.fileURL(base+".manifest", a.Manifest, false)
		if len(a.PublicKeys) == 0 {
			v.bad(base+".manifest", "needs spec.artifacts.publicKeys: name the keys one of which must have signed it")
		}
	} else if v.said("spec", "artifacts", "mirrors") && len(a.Files) == 0 {
		v.bad(base+".mirrors", "there is nothing to mirror: set spec.artifacts.manifest or files")
	}
	for i, key := range a.PublicKeys {
		at := joinIndex(base+".publicKeys", i)
		if !publicKeySyntax.MatchString(key) {
			v.bad(at, "%s is not a public key: write ed25519: and its 32 bytes in base64", quote(key))
			continue
		}
		if _, err := base64.StdEncoding.Strict().DecodeString(strings.TrimPrefix(key, "ed25519:")); err != nil {
			v.bad(at, "is not base64: %v", err)
		}
	}
	for _, l := range []struct {
		path string
		n    int
		most int
	}{{".publicKeys", len(a.PublicKeys), maxURLs}, {".mirrors", len(a.Mirrors), maxURLs}, {".files", len(a.Files), maxFileEntries}} {
		if l.n > l.most {
			v.bad(base+l.path, "has %d entries; at most %d are allowed", l.n, l.most)
		}
	}
	for i, m := range a.Mirrors {
		v.fileURL(joinIndex(base+".mirrors", i), m, true)
	}
	arches := map[string][]string{}
	for i := range a.Files {
		f := &a.Files[i]
		at := joinIndex(base+".files", i)
		v.file(at, f)
		if slices.Contains(arches[f.Name], f.Arch) {
			v.bad(at, "%s is there twice for the same arch", quote(f.Name))
		}
		arches[f.Name] = append(arches[f.Name], f.Arch)
	}
}

func (v *validator) file(at string, f *v1alpha1.ArtifactFile) {
	if f.Name == "" {
		v.bad(at, "has no name; write name: k3s or another that bootstrap knows")
	} else if !artifactSyntax.MatchString(f.Name) {
		v.bad(at+".name", "%s is not an artifact's name: small letters, digits, dots and dashes", quote(f.Name))
	}
	v.match(at+".version", f.Version, versionSyntax, "a version")
	if f.Arch != "" {
		oneOf(v, at+".arch", f.Arch, architectures)
	}
	if len(f.URLs) == 0 {
		v.bad(at, "has no urls; write where it can be had")
	}
	if len(f.URLs) > maxURLs {
		v.bad(at+".urls", "has %d entries; at most %d are allowed", len(f.URLs), maxURLs)
	}
	for i, u := range f.URLs {
		v.fileURL(joinIndex(at+".urls", i), u, false)
	}
	const digest = "a SHA-256 digest: 64 hexadecimal digits in small letters"
	switch {
	case f.SHA256 == "":
		v.bad(at, "has no sha256; the digest must be known before the download (sha256sum FILE)")
	case strings.HasPrefix(f.SHA256, "sha256:"):
		v.bad(at+".sha256", `write the 64 digits without "sha256:"`)
	default:
		v.match(at+".sha256", f.SHA256, digestSyntax, digest)
	}
	v.match(at+".installedSHA256", f.InstalledSHA256, digestSyntax, digest)
	if f.Size > maxArtifactSize {
		v.bad(at+".size", "%d is more than 16 GiB", f.Size)
	}
	oneOf(v, at+".format", f.Format, formats)
	isTar := strings.HasPrefix(f.Format, "tar")
	switch {
	case f.Format == "raw" && f.InstalledSHA256 != "" && f.InstalledSHA256 != f.SHA256:
		v.bad(at+".installedSHA256", "differs from sha256, which cannot be for the format raw; remove it or correct the format")
	case f.Format != "raw" && f.InstalledSHA256 == "":
		v.bad(at, "has no installedSHA256; the format %s needs the digest of the unpacked file", f.Format)
	}
	switch {
	case isTar && f.Member == "":
		v.bad(at, "has no member; say which file of the archive to install")
	case isTar && (path.IsAbs(f.Member) || path.Clean(f.Member) != f.Member || strings.HasPrefix(f.Member, "..")):
		v.bad(at+".member", "%s is not a relative path of a file, without a leading ./", quote(f.Member))
	case !isTar && f.Member != "":
		v.bad(at+".member", "is for archives only; set format: tar+gzip or remove it")
	}
	if f.Path != "" && (!path.IsAbs(f.Path) || path.Clean(f.Path) != f.Path || f.Path == "/" || strings.ContainsRune(f.Path, 0)) {
		v.bad(at+".path", "%s is not a clean absolute path of a file", quote(f.Path))
	}
	v.match(at+".mode", f.Mode, modeSyntax, `a mode in octal, such as "0755"`)
	if m, err := strconv.ParseUint(f.Mode, 8, 16); err == nil && m&0o022 != 0 {
		v.bad(at+".mode", "lets others than root write what root runs; use 0755 or 0644")
	}
}

func fileNames(files []v1alpha1.ArtifactFile) []string {
	out := make([]string, len(files))
	for i, f := range files {
		out[i] = f.Name
	}
	return out
}

func (v *validator) shims() {
	seen := map[string]bool{}
	for i, s := range v.config.Spec.Shims {
		at := joinIndex("spec.shims", i)
		switch {
		case s.Name == "":
			v.bad(at, "has no name; write name: spin or another handler's")
			continue
		case !handlerSyntax.MatchString(s.Name):
			v.bad(at+".name", "%s is not a runtime handler's name, such as spin", quote(s.Name))
		case seen[s.Name]:
			v.bad(at+".name", "%s is there twice", quote(s.Name))
		}
		seen[s.Name] = true
		v.match(at+".artifact", s.Artifact, artifactSyntax, "an artifact's name, such as containerd-shim-spin-v2")
	}
}

func (v *validator) network() {
	n := &v.config.Spec.Network
	oneOf(v, "spec.network.cni", n.CNI, cnis)
	oneOf(v, "spec.network.flannelBackend", n.FlannelBackend, flannelBackends)
	if n.CNI == cniFlannel && n.FlannelBackend == "none" {
		v.bad("spec.network.flannelBackend", "leaves pods without a network; set spec.network.cni to calico, cilium or custom")
	}
	if n.CNI != cniFlannel && n.FlannelBackend != "none" && slices.Contains(cnis, n.CNI) {
		v.bad("spec.network.flannelBackend", "is for flannel; the network is handed to %s, so remove it", n.CNI)
	}
	pods := v.cidrs("spec.network.clusterCIDR", n.ClusterCIDR)
	services := v.cidrs("spec.network.serviceCIDR", n.ServiceCIDR)
	if pods == nil || services == nil {
		return
	}
	at := "spec.network.serviceCIDR"
	if v.find(at).origin.Source == defaultSource {
		at = "spec.network.clusterCIDR" // which somebody said
	}
	if len(pods) != len(services) || pods[0].Addr().Is4() != services[0].Addr().Is4() {
		v.bad(at, "serviceCIDR %s must have the same address families in the same order as clusterCIDR %s; set both", quote(n.ServiceCIDR), quote(n.ClusterCIDR))
	}
	for _, p := range pods {
		for _, s := range services {
			if p.Overlaps(s) {
				v.bad(at, "serviceCIDR %s overlaps with clusterCIDR %s", s, p)
			}
		}
	}
}

// cidrs returns nil for what is wrong.
func (v *validator) cidrs(at, s string) []netip.Prefix {
	var out []netip.Prefix
	for part := range strings.SplitSeq(s, ",") {
		p, err := netip.ParsePrefix(strings.TrimSpace(part))
		if err != nil || len(out) == 2 {
			v.bad(at, "%s is not a CIDR such as 10.42.0.0/16, or one of each family separated by a comma", quote(s))
			return nil
		}
		if p.Masked() != p {
			v.bad(at, "%s has bits set beyond the prefix; write %s", quote(part), p.Masked())
			return nil
		}
		out = append(out, p)
	}
	if len(out) == 2 && out[0].Addr().Is4() == out[1].Addr().Is4() {
		v.bad(at, "%s has two networks of the same family", quote(s))
		return nil
	}
	return out
}

func (v *validator) registries() {
	r := &v.config.Spec.Registries
	if v.said("spec", "registries", "systemDefault") {
		const at = "spec.registries.systemDefault"
		host, repository, _ := strings.Cut(r.SystemDefault, "/")
		switch {
		case strings.Contains(r.SystemDefault, "://"):
			v.bad(at, "write the registry without https://")
		case !registrySyntax.MatchString(host) || strings.HasSuffix(r.SystemDefault, "/") || strings.ContainsAny(repository, " \t\n@:"):
			v.bad(at, "%s is not a registry's host, with a path if need be", quote(r.SystemDefault))
		case isDockerHub(host):
			v.bad(at, "Docker Hub's rate limits stop clusters that scale out; use a mirror, such as an ECR pull-through cache")
		}
	}
	for _, name := range keysOf(r.Mirrors) {
		at := joinKey("spec.registries.mirrors", name)
		v.registryName(at, name)
		m := r.Mirrors[name]
		if len(m.Endpoints) == 0 {
			v.bad(at, "has no endpoints; write where images come from instead")
		}
		if len(m.Endpoints) > maxURLs {
			v.bad(at+".endpoints", "has %d entries; at most %d are allowed", len(m.Endpoints), maxURLs)
		}
		for i, e := range m.Endpoints {
			u, err := url.Parse(e)
			if err != nil || u.Scheme != "https" && u.Scheme != "http" || u.Hostname() == "" || u.User != nil || u.RawQuery != "" || u.Fragment != "" {
				v.bad(joinIndex(at+".endpoints", i), "%s is not https://HOST or http://HOST, with a path if need be", quote(e))
			}
		}
		for _, pattern := range keysOf(m.Rewrite) {
			if _, err := regexp.Compile(pattern); err != nil {
				v.bad(joinKey(at+".rewrite", pattern), "is not a regular expression of Go: %s", shorten(err.Error()))
			}
		}
	}
	for _, name := range keysOf(r.CAFiles) {
		at := joinKey("spec.registries.caFiles", name)
		v.registryName(at, name)
		if f := r.CAFiles[name]; !path.IsAbs(f) || path.Clean(f) != f {
			v.bad(at, "%s is not a clean absolute path", quote(f))
		}
	}
}

func (v *validator) registryName(at, name string) {
	if name != "*" && !registrySyntax.MatchString(name) {
		v.bad(at, `%s is not a registry's host, such as docker.io, nor "*"`, quote(name))
	}
}

func isDockerHub(host string) bool {
	return slices.Contains([]string{"docker.io", "index.docker.io", "registry-1.docker.io"}, strings.ToLower(host))
}

func (v *validator) addons() {
	a := &v.config.Spec.Addons
	for _, addon := range []struct {
		name string
		v1alpha1.AddonConfig
	}{{"hearth", a.Hearth}, {"spinkube", a.SpinKube}, {"certManager", a.CertManager}} {
		at := "spec.addons." + addon.name
		if addon.Chart != "" {
			u, err := url.Parse(addon.Chart)
			switch {
			case err != nil || u.Scheme != "oci" && u.Scheme != "https" || u.Hostname() == "" || u.User != nil:
				v.bad(at+".chart", "%s is not oci://HOST/NAME nor the https URL of a chart's archive", quote(addon.Chart))
			case u.Scheme == "oci" && isDockerHub(u.Hostname()):
				v.bad(at+".chart", "Docker Hub's rate limits stop clusters that scale out; copy the chart to another registry")
			}
		}
		v.match(at+".version", addon.Version, versionSyntax, "a chart's version")
	}
	if on(a.SpinKube) && !on(a.CertManager) && v.tree.at("spec", "addons", "certManager", "enabled") == nil {
		v.bad("spec.addons.spinkube", "needs cert-manager for its webhooks")
	}
}

func on(a v1alpha1.AddonConfig) bool { return a.Enabled != nil && *a.Enabled }

func (v *validator) host() {
	h := &v.config.Spec.Host
	if q, err := resource.ParseQuantity(h.MinDiskFree); len(h.MinDiskFree) > 32 || err != nil || q.Sign() < 0 {
		v.bad("spec.host.minDiskFree", "%s is not an amount of bytes such as 8Gi", quote(h.MinDiskFree))
	}
	v.duration("spec.host.maxClockOffset", h.MaxClockOffset, time.Second, 5*time.Minute)
	for _, key := range keysOf(h.Sysctls) {
		at := joinKey("spec.host.sysctls", key)
		if !sysctlSyntax.MatchString(key) || strings.Contains(key, "..") {
			v.bad(at, "%s is not a sysctl's name, such as vm.max_map_count", quote(key))
		}
		if value := h.Sysctls[key]; value == "" || len(value) > 256 || strings.ContainsAny(value, "\x00\n\r") {
			v.bad(at, "its value must be one line of 1 to 256 characters")
		}
	}
	for i, m := range h.Modules {
		v.matchItem(joinIndex("spec.host.modules", i), m, moduleSyntax, "a kernel module's name, such as br_netfilter")
	}
}

// matchItem is match for what may not be empty.
func (v *validator) matchItem(at, value string, syntax *regexp.Regexp, want string) {
	if !syntax.MatchString(value) {
		v.bad(at, "%s is not %s", quote(value), want)
	}
}

func (v *validator) signal() {
	s := &v.config.Spec.Signal
	v.match("spec.signal.lifecycleHook", s.LifecycleHook, hookSyntax, "a lifecycle hook's name")
	if s.AutoScalingGroup != "" && (len(s.AutoScalingGroup) > 255 || strings.ContainsAny(s.AutoScalingGroup, ":\n\r\x00")) {
		v.bad("spec.signal.autoScalingGroup", "%s is not the name of an Auto Scaling group", quote(s.AutoScalingGroup))
	}
	if s.LifecycleHook != "" && s.AutoScalingGroup == "" && v.instance != nil {
		v.bad("spec.signal.lifecycleHook", "its Auto Scaling group is not known: enable InstanceMetadataTags in the launch template, or set spec.signal.autoScalingGroup")
	}
	if c := s.CloudFormation; c != nil {
		if c.Stack == "" || len(c.Stack) > 2048 || strings.ContainsAny(c.Stack, " \n\r\x00") {
			v.bad("spec.signal.cloudFormation", "needs stack: the stack's name or ARN")
		}
		if !resourceSyntax.MatchString(c.Resource) {
			v.bad("spec.signal.cloudFormation", "needs resource: the logical ID of the resource that waits, of letters and digits")
		}
	}
}

func (v *validator) timeouts() {
	t := &v.config.Spec.Timeouts
	const low, high = 10 * time.Second, 24 * time.Hour
	total := v.duration("spec.timeouts.total", t.Total, low, high)
	for _, phase := range []struct {
		name string
		d    v1alpha1.Duration
	}{{"fetch", t.Fetch}, {"join", t.Join}, {"ready", t.Ready}, {"prove", t.Prove}} {
		at := "spec.timeouts." + phase.name
		span := v.duration(at, phase.d, low, high)
		if total >= low && span > total && span <= high {
			v.bad(at, "%s is longer than spec.timeouts.total, %s", quote(string(phase.d)), t.Total)
		}
	}
}

// CheckArtifacts checks the rules of a configuration that depend on which
// artifacts there are, once the manifest that names them is known. Names are
// those of the manifest's entries that fit this machine; entries of
// spec.artifacts.files are added. Its error is like that of Resolve.
func CheckArtifacts(r Resolved, names []string) error {
	var ps problems
	v := newValidator(&ps, r.tree, r.Config, r.instance)
	v.artifactRules(slices.Concat(names, fileNames(r.Config.Spec.Artifacts.Files)))
	return ps.err()
}

// ofManifest are the names of those artifacts without which a manifest would be
// refused for this configuration.
func ofManifest(r Resolved) []string {
	if r.Config.Spec.Artifacts.Manifest == "" {
		return nil
	}
	all := []string{ArtifactK3s, ArtifactAirgap, ArtifactHearthImage, ArtifactECRProvider, ArtifactCNIManifest}
	for _, s := range r.Config.Spec.Shims {
		all = append(all, s.Artifact)
	}
	return slices.DeleteFunc(slices.Clone(all), func(name string) bool {
		return CheckArtifacts(r, slices.DeleteFunc(slices.Clone(all), func(n string) bool { return n == name })) == nil
	})
}

func (v *validator) artifactRules(names []string) {
	spec := &v.config.Spec
	known := func(name string) bool {
		if !slices.Contains(names, name) {
			return false
		}
		if v.instance == nil || v.instance.Arch == "" {
			return true
		}
		fits, listed := false, false
		for _, f := range spec.Artifacts.Files {
			listed = listed || f.Name == name
			fits = fits || f.Name == name && (f.Arch == "" || f.Arch == v.instance.Arch)
		}
		return fits || !listed
	}
	add := "; add it to spec.artifacts.files, or set spec.artifacts.manifest to a signed list that has it"
	forArch := ""
	if v.instance != nil && v.instance.Arch != "" {
		forArch = " for " + v.instance.Arch
	}
	if !known(ArtifactK3s) {
		v.missing("spec.artifacts.files", "there is no artifact k3s%s, whose digest must be known%s", forArch, add)
	}
	for i, s := range spec.Shims {
		if s.Artifact != "" && !known(s.Artifact) {
			v.missing(joinIndex("spec.shims", i), "there is no artifact %s%s for the shim %s%s", s.Artifact, forArch, s.Name, add)
		}
	}
	if spec.Network.CNI != cniFlannel && slices.Contains(cnis, spec.Network.CNI) && !known(ArtifactCNIManifest) {
		v.missing("spec.network.cni", "handing the network to %s needs the artifact cni-manifest%s", spec.Network.CNI, add)
	}
	if spec.Registries.ECR != nil && *spec.Registries.ECR && !known(ArtifactECRProvider) {
		v.missing("spec.registries.ecr", "needs the artifact ecr-credential-provider%s%s", forArch, add)
	}
	// Agents without shims have no taint that waits for the pods.
	if on(spec.Addons.Hearth) && (spec.Role == roleServer || len(spec.Shims) > 0) && !PullsHearth(spec) && !known(ArtifactHearthImage) {
		v.missing("spec.addons.hearth", "its pods need an image that no public registry has, and without them nodes stay tainted; add the artifact hearth-image%s, or set values.image.repository to your registry's, or enabled to false", forArch)
	}
	_, all := spec.Registries.Mirrors["*"]
	_, hub := spec.Registries.Mirrors["docker.io"]
	// On agents systemDefault is the owner's word for what servers hand to them
	// (SystemDefaultRegistry in pkg/agent/config of k3s).
	if spec.Registries.SystemDefault == "" && !all && !hub && !known(ArtifactAirgap) {
		v.missing("spec.registries", "k3s's own images would come from Docker Hub, whose rate limits stop clusters that scale out; set systemDefault, a mirror of docker.io, or add the artifact k3s-airgap-images")
	}
}
