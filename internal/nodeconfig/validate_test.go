package nodeconfig

import (
	"strings"
	"testing"

	"github.com/hearth-sh/hearth/internal/bootstrap/fault"
)

const file = "artifacts: {files: [{name: x, urls: [https://x.example/x], sha256: " + digest

// TestWhatIsRefused: each document is valid but for one thing, which the
// schema sees too where it can.
func TestWhatIsRefused(t *testing.T) {
	validate := schemaValidator(t)
	const bySchema, beyondSchema = true, false
	for name, c := range map[string]struct {
		document string
		path     string
		want     string
		schema   bool
	}{
		// Structure.
		"a field that does not exist": {spec("k3s: {versino: v1.36.2+k3s1}"), "spec.k3s.versino", "did you mean version?", bySchema},
		"other capitals":              {spec("network: {clusterCidr: 10.0.0.0/8}"), "spec.network.clusterCidr", "did you mean clusterCIDR?", bySchema},
		"letters swapped":             {spec("rloe: agent"), "spec.rloe", "did you mean role?", bySchema},
		"a field at the wrong level":  {head + "pool: wasm\nspec: {}\n", "pool", "it belongs below spec", bySchema},
		"nothing like it":             {spec("signal: {whatever: 1}"), "spec.signal.whatever", "known are autoScalingGroup, cloudFormation, lifecycleHook", bySchema},
		"a key twice":                 {spec("pool: wasm", "pool: build"), "spec.pool", "twice, the first time in line 4", beyondSchema},
		"text for a list":             {spec("cluster: {tlsSANs: a.example}"), "spec.cluster.tlsSANs", `must be a list, not the text "a.example"; write it as "- …"`, bySchema},
		"a list for a map":            {spec("node: [a]"), "spec.node", "must be a map of fields, not a list", bySchema},
		"a list for labels":           {spec("node: {labels: [a]}"), "spec.node.labels", "must be a map, not a list", bySchema},
		"a number for text":           {spec("host: {sysctls: {vm.max_map_count: 262144}}"), `spec.host.sysctls["vm.max_map_count"]`, "must be text, not the number 262144; put it in quotes", bySchema},
		"an octal number for a mode":  {spec(file + ", mode: 0755}]}"), "spec.artifacts.files[0].mode", "put it in quotes", bySchema},
		"a boolean for text":          {spec("node: {labels: {a: true}}"), "spec.node.labels.a", "must be text, not true; put it in quotes", bySchema},
		"yes for a boolean":           {spec("node: {allowSpotServer: yes}"), "spec.node.allowSpotServer", `not the text "yes"; write true`, beyondSchema},
		"a number for a time span":    {spec("timeouts: {join: 90}"), "spec.timeouts.join", "write a time span such as 90s or 5m", bySchema},
		"text for a number":           {spec(`cluster: {snapshots: {retention: "5"}}`), "spec.cluster.snapshots.retention", "must be a whole number", bySchema},
		"a fraction for a number":     {spec("cluster: {snapshots: {retention: 5.5}}"), "spec.cluster.snapshots.retention", "must be a whole number, not the number 5.5", bySchema},
		"a negative number":           {spec("cluster: {snapshots: {retention: -1}}"), "spec.cluster.snapshots.retention", "out of range", bySchema},
		"a number without end":        {spec("cluster: {snapshots: {retention: 99999999999999999999}}"), "spec.cluster.snapshots.retention", "must be a whole number", bySchema},
		"not a number":                {spec("addons: {hearth: {values: {a: .nan}}}"), "spec.addons.hearth.values.a", "out of range", bySchema},
		"a field without a value":     {spec("pool:"), "spec.pool", "has no value; write one or remove the line", bySchema},
		"an item without a value":     {spec("cluster:", "  tlsSANs:", "    -"), "spec.cluster.tlsSANs[0]", "has no value", bySchema},
		"a key that is no text":       {spec("node: {labels: {1: a}}"), "spec.node.labels", "the key 1 must be text", beyondSchema},
		"a list as key":               {spec("node: {labels: {[a]: a}}"), "spec.node.labels", "a key must be text", bySchema},
		"a merge key":                 {spec("node: {labels: {<<: {a: b}}}"), "spec.node.labels", "merge keys", beyondSchema},
		"a tag of YAML":               {spec("pool: !!binary d2FzbQ=="), "spec.pool", "the YAML tag !!binary is not supported", beyondSchema},
		"no apiVersion":               {"kind: NodeConfig\nspec: {}\n", "apiVersion", "is missing; write apiVersion: hearth.sh/v1alpha1", bySchema},
		"another version":             {"apiVersion: hearth.sh/v1\nkind: NodeConfig\nspec: {}\n", "apiVersion", "this version of bootstrap understands hearth.sh/v1alpha1", bySchema},
		"no kind":                     {"apiVersion: hearth.sh/v1alpha1\nspec: {}\n", "kind", "is missing; write kind: NodeConfig", bySchema},
		"another kind":                {"apiVersion: hearth.sh/v1alpha1\nkind: Function\nspec: {}\n", "kind", `is the text "Function"`, bySchema},
		"no spec":                     {head, "spec", "is missing", bySchema},
		"YAML that is none":           {head + "spec: {a: [}\n", "", "it is not YAML", beyondSchema},
		"a tab for indentation":       {head + "spec:\n\tpool: wasm\n", "", "it is not YAML", beyondSchema},
		"an anchor that is not there": {head + "spec: *x\n", "", "it is not YAML", beyondSchema},

		// Role, pool and node.
		"a pool that does not exist":        {spec("pool: wasm2"), "spec.pool", `"wasm2" is not one of control-plane, observability, wasm, build, backend; did you mean wasm?`, bySchema},
		"a role that does not exist":        {spec("role: master"), "spec.role", "is not one of server, agent", bySchema},
		"an agent in the control plane":     {spec("pool: control-plane", "role: agent"), "spec.role", "the pool control-plane is for servers", beyondSchema},
		"a label that kubelet refuses":      {spec("node: {labels: {node-role.kubernetes.io/worker: x}}"), `spec.node.labels["node-role.kubernetes.io/worker"]`, "kubelet would not start", beyondSchema},
		"a label of k8s.io":                 {spec("node: {labels: {k8s.io/x: x}}"), `spec.node.labels["k8s.io/x"]`, "may not set labels under k8s.io", beyondSchema},
		"a label of node restriction":       {spec("node: {labels: {x.node-restriction.kubernetes.io/x: x}}"), `spec.node.labels["x.node-restriction.kubernetes.io/x"]`, "set it with kubectl", beyondSchema},
		"a label that metadata sets":        {spec("node: {labels: {topology.kubernetes.io/zone: x}}"), `spec.node.labels["topology.kubernetes.io/zone"]`, "set from instance metadata", beyondSchema},
		"a label of ours":                   {spec("node: {labels: {hearth.sh/runtime-spin: 'true'}}"), `spec.node.labels["hearth.sh/runtime-spin"]`, "Hearth's own", beyondSchema},
		"a label that contradicts the pool": {spec("node: {labels: {hearth.sh/pool: build}}"), `spec.node.labels["hearth.sh/pool"]`, "follows spec.pool", beyondSchema},
		"a label's key with a space":        {spec("node: {labels: {'a b': x}}"), `spec.node.labels["a b"]`, "is not a label's key", beyondSchema},
		"a label's value with a space":      {spec("node: {labels: {a: 'x y'}}"), "spec.node.labels.a", "is not a label's value", beyondSchema},
		"a label's value too long":          {spec("node: {labels: {a: " + strings.Repeat("a", 64) + "}}"), "spec.node.labels.a", "63", bySchema},
		"a taint without a key":             {spec("node: {taints: [{effect: NoExecute}]}"), "spec.node.taints[0]", "has no key", bySchema},
		"a taint without an effect":         {spec("node: {taints: [{key: a}]}"), "spec.node.taints[0]", "has no effect; write effect: one of NoSchedule", bySchema},
		"a taint's effect misspelt":         {spec("node: {taints: [{key: a, effect: Noschedule}]}"), "spec.node.taints[0].effect", "did you mean NoSchedule?", bySchema},
		"a taint's key with a space":        {spec("node: {taints: [{key: 'a b', effect: NoExecute}]}"), "spec.node.taints[0].key", "is not a taint's key", beyondSchema},
		"a taint's value with a slash":      {spec("node: {taints: [{key: a, value: a/b, effect: NoExecute}]}"), "spec.node.taints[0].value", "is not a taint's value", beyondSchema},
		"a taint twice":                     {spec("node: {taints: [{key: a, effect: NoExecute}, {key: a, value: b, effect: NoExecute}]}"), "spec.node.taints[1]", "is there twice", beyondSchema},

		// Cluster.
		"a cluster's name with capitals": {spec("cluster: {name: Prod}"), "spec.cluster.name", "is not a cluster's name", bySchema},
		"an empty name":                  {spec("cluster: {name: ''}"), "spec.cluster.name", `"" is not a cluster's name`, bySchema},
		"a store without a prefix":       {spec("cluster: {store: s3://bucket}"), "spec.cluster.store", "add a prefix", bySchema},
		"a store that is only a path":    {spec("cluster: {store: /x}"), "spec.cluster.store", "is not s3://BUCKET/PREFIX or ssm:///PATH", bySchema},
		"SSM with two slashes":           {spec("cluster: {store: ssm://x/y}"), "spec.cluster.store", "three slashes", bySchema},
		"a path that SSM keeps":          {spec("cluster: {store: ssm:///aws/x}"), "spec.cluster.store", "for itself", beyondSchema},
		"a path too deep for SSM":        {spec("cluster: {store: ssm:///a/b/c/d/e/f/g/h/i}"), "spec.cluster.store", "more than 8 levels", beyondSchema},
		"a zone for a region":            {spec("cluster: {region: eu-central-1a}"), "spec.cluster.region", "is not an AWS region", bySchema},
		"a server without https":         {spec("cluster: {server: 'http://x:6443'}"), "spec.cluster.server", "is not https://HOST:6443", bySchema},
		"a server without a port":        {spec("cluster: {server: 'https://x'}"), "spec.cluster.server", "has no port", bySchema},
		"a server with a path":           {spec("cluster: {server: 'https://x:6443/y'}"), "spec.cluster.server", "without anything after it", bySchema},
		"a server with a port too high":  {spec("cluster: {server: 'https://x:65536'}"), "spec.cluster.server", "without anything after it", beyondSchema},
		"a name that is no SAN":          {spec("cluster: {tlsSANs: ['a b']}"), "spec.cluster.tlsSANs[0]", "neither a DNS name nor an IP address", beyondSchema},
		"a lease too short":              {spec("cluster: {lease: 1s}"), "spec.cluster.lease", "is not between 15s and 10m", beyondSchema},
		"a lease that is no time span":   {spec("cluster: {lease: soon}"), "spec.cluster.lease", "is not a time span; write it like 90s or 5m", bySchema},
		"a bucket that is none":          {spec("cluster: {snapshots: {bucket: my-bucket}}"), "spec.cluster.snapshots.bucket", "is not s3://BUCKET", bySchema},
		"a schedule of four fields":      {spec("cluster: {snapshots: {schedule: '* * * *'}}"), "spec.cluster.snapshots.schedule", "it has 4 fields", beyondSchema},
		"no snapshots to keep":           {spec("cluster: {snapshots: {retention: 0}}"), "spec.cluster.snapshots.retention", "between 1 and 1000", bySchema},
		"a restore of no generation":     {spec("cluster: {restore: {snapshot: /var/x}}"), "spec.cluster.restore.generation", "1 or more", bySchema},
		"a restore without a snapshot":   {spec("cluster: {restore: {generation: 1}}"), "spec.cluster.restore.snapshot", "is missing", bySchema},
		"a restore without a bucket":     {spec("cluster: {restore: {generation: 1, snapshot: x}}"), "spec.cluster.restore.snapshot", "spec.cluster.snapshots.bucket is not set", beyondSchema},
		"a restore from a relative path": {spec("cluster: {restore: {generation: 1, snapshot: a/b}}"), "spec.cluster.restore.snapshot", "neither a snapshot's name nor an absolute path", beyondSchema},
		"a restore from a path of dots":  {spec("cluster: {restore: {generation: 1, snapshot: /a/../b}}"), "spec.cluster.restore.snapshot", "clean absolute path", beyondSchema},

		// k3s.
		"a version without k3s":             {spec("k3s: {version: v1.36.2}"), "spec.k3s.version", "is not a release of k3s, such as v1.36.2+k3s1", bySchema},
		"a version that its artifact isn't": {spec("k3s: {version: v1.36.2+k3s1}", "artifacts: {files: [{name: k3s, version: v1.36.1+k3s1, urls: [https://x.example/x], sha256: "+digest+"}]}"), "spec.artifacts.files[0].version", "make them the same", beyondSchema},
		"k3s: the server":                   {spec("k3s: {config: {server: 'https://x:6443'}}"), "spec.k3s.config.server", "servers are found through spec.cluster.store", bySchema},
		"k3s: cluster-init":                 {spec("k3s: {config: {cluster-init: true}}"), "spec.k3s.config.cluster-init", "a second founder would split the cluster", bySchema},
		"k3s: node-name":                    {spec("k3s: {config: {node-name: x}}"), "spec.k3s.config.node-name", "instance ID", bySchema},
		"k3s: an owned key with a plus":     {spec("k3s: {config: {node-label+: [a=b]}}"), `spec.k3s.config["node-label+"]`, "use spec.node.labels", beyondSchema},
		"k3s: a key with a plus":            {spec("k3s: {config: {kubelet-arg+: [a=b]}}"), `spec.k3s.config["kubelet-arg+"]`, "without the +", beyondSchema},
		"k3s: a key with dashes":            {spec("k3s: {config: {--debug: true}}"), `spec.k3s.config["--debug"]`, "without dashes in front", beyondSchema},
		"k3s: a key misspelt":               {spec("k3s: {config: {kublet-arg: [a=b]}}"), "spec.k3s.config.kublet-arg", "did you mean kubelet-arg?", beyondSchema},
		"k3s: an owned key misspelt":        {spec("k3s: {config: {node-labels: [a=b]}}"), "spec.k3s.config.node-labels", "did you mean node-label?", beyondSchema},
		"k3s: no key at all":                {spec("k3s: {config: {'Some thing': 1}}"), `spec.k3s.config["Some thing"]`, "is not the form of k3s's keys", beyondSchema},
		"k3s: a server's key on an agent":   {spec("k3s: {config: {disable: [traefik]}}"), "spec.k3s.config.disable", "only servers take this key", beyondSchema},
		"k3s: an agent's key on a server":   {spec("role: server", "k3s: {config: {disable-apiserver-lb: true}}"), "spec.k3s.config.disable-apiserver-lb", "only agents take this key", beyondSchema},
		"k3s: a key it lost":                {spec("k3s: {config: {disable-selinux: true}}"), "spec.k3s.config.disable-selinux", "lost it in 1.26", bySchema},
		"k3s: another port":                 {spec("role: server", "k3s: {config: {https-listen-port: 7443}}"), "spec.k3s.config.https-listen-port", "nodes join at port 6443", bySchema},
		"k3s: a key of nobody":              {spec("k3s: {config: {some-entirely-new-setting: 5}}"), "spec.k3s.config.some-entirely-new-setting", "k3s 1.36 has no such key", beyondSchema},
		"cluster: a key that is none":       {spec("cluster: {kmsKey: my key}"), "spec.cluster.kmsKey", "alias/NAME", bySchema},
		"k3s: a map":                        {spec("k3s: {config: {debug: {a: b}}}"), "spec.k3s.config.debug", "not a map", beyondSchema},
		"k3s: no value":                     {spec("k3s: {config: {debug: }}"), "spec.k3s.config.debug", "has no value", beyondSchema},
		"kubelet: the provider ID":          {spec("k3s: {config: {kubelet-arg: [max-pods=9, provider-id=x]}}"), "spec.k3s.config.kubelet-arg[1]", "from instance metadata", beyondSchema},
		"kubelet: labels, with dashes":      {spec("k3s: {config: {kubelet-arg: --node-labels=a=b}}"), "spec.k3s.config.kubelet-arg[0]", "use spec.node.labels", beyondSchema},

		// Artifacts.
		"a manifest without keys":          {spec("artifacts: {publicKeys: []}"), "spec.artifacts.manifest", "needs spec.artifacts.publicKeys", beyondSchema},
		"a manifest over ftp":              {spec("artifacts: {manifest: 'ftp://x/y'}"), "spec.artifacts.manifest", "is not https://…", bySchema},
		"a key that is none":               {spec("artifacts: {publicKeys: [abc]}"), "spec.artifacts.publicKeys[0]", "write ed25519: and its 32 bytes in base64", bySchema},
		"a key with a bit too many":        {spec("artifacts: {publicKeys: ['" + strings.Replace(key, "hqA=", "hqB=", 1) + "']}"), "spec.artifacts.publicKeys[0]", "is not base64", beyondSchema},
		"a mirror over http":               {spec("artifacts: {mirrors: ['http://mirror.example']}"), "spec.artifacts.mirrors[0]", "http is for this machine only", beyondSchema},
		"a mirror with a fragment":         {spec("artifacts: {mirrors: ['https://mirror.example/#a']}"), "spec.artifacts.mirrors[0]", "neither user nor fragment", beyondSchema},
		"a file's URL with a host":         {spec("artifacts: {mirrors: ['file://a/b']}"), "spec.artifacts.mirrors[0]", "three slashes", beyondSchema},
		"a bucket's name too short":        {spec("artifacts: {mirrors: ['s3://a']}"), "spec.artifacts.mirrors[0]", "names no S3 bucket", beyondSchema},
		"an artifact without a name":       {spec("artifacts: {files: [{urls: ['https://x.example'], sha256: " + digest + "}]}"), "spec.artifacts.files[0]", "has no name", bySchema},
		"an artifact without URLs":         {spec("artifacts: {files: [{name: x, sha256: " + digest + "}]}"), "spec.artifacts.files[0]", "has no urls", bySchema},
		"an artifact without a digest":     {spec("artifacts: {files: [{name: x, urls: ['https://x.example']}]}"), "spec.artifacts.files[0]", "has no sha256", bySchema},
		"a digest with its algorithm":      {spec("artifacts: {files: [{name: x, urls: ['https://x.example'], sha256: 'sha256:" + digest + "'}]}"), "spec.artifacts.files[0].sha256", `without "sha256:"`, bySchema},
		"a digest with capitals":           {spec("artifacts: {files: [{name: x, urls: ['https://x.example'], sha256: " + strings.ToUpper(digest) + "}]}"), "spec.artifacts.files[0].sha256", "in small letters", bySchema},
		"an object without a key":          {spec("artifacts: {files: [{name: x, urls: ['s3://bucket/'], sha256: " + digest + "}]}"), "spec.artifacts.files[0].urls[0]", "names no object", beyondSchema},
		"an artifact twice":                {spec(file + "}, {name: x, urls: [https://x.example/x], sha256: " + digest + "}]}"), "spec.artifacts.files[1]", "is there twice for the same arch", beyondSchema},
		"another processor":                {spec(file + ", arch: aarch64}]}"), "spec.artifacts.files[0].arch", "is not one of arm64, amd64", bySchema},
		"a format that does not exist":     {spec(file + ", format: tar.gz, member: x, installedSHA256: " + digest + "}]}"), "spec.artifacts.files[0].format", "is not one of raw, gzip", bySchema},
		"an archive without a member":      {spec(file + ", format: tar+gzip, installedSHA256: " + digest + "}]}"), "spec.artifacts.files[0]", "has no member", beyondSchema},
		"a member that leaves":             {spec(file + ", format: tar, member: ../x, installedSHA256: " + digest + "}]}"), "spec.artifacts.files[0].member", "is not a relative path", beyondSchema},
		"a member of no archive":           {spec(file + ", member: x}]}"), "spec.artifacts.files[0].member", "is for archives only", beyondSchema},
		"gzip without what is in it":       {spec(file + ", format: gzip}]}"), "spec.artifacts.files[0]", "has no installedSHA256", beyondSchema},
		"raw with another digest":          {spec(file + ", installedSHA256: " + strings.Repeat("a", 64) + "}]}"), "spec.artifacts.files[0].installedSHA256", "cannot be for the format raw", beyondSchema},
		"a path that is relative":          {spec(file + ", path: usr/bin/x}]}"), "spec.artifacts.files[0].path", "is not a clean absolute path", bySchema},
		"a mode with set-user-ID":          {spec(file + `, mode: "4755"}]}`), "spec.artifacts.files[0].mode", "is not a mode in octal", bySchema},
		"a mode that lets everybody write": {spec(file + `, mode: "0777"}]}`), "spec.artifacts.files[0].mode", "lets others than root write", beyondSchema},
		"a size without measure":           {spec(file + ", size: 99999999999}]}"), "spec.artifacts.files[0].size", "more than 16 GiB", bySchema},

		// The rest.
		"a shim without a name":           {spec("shims: [{required: true}]"), "spec.shims[0]", "has no name", bySchema},
		"a shim's name with a slash":      {spec("shims: [{name: a/b}]"), "spec.shims[0].name", "is not a runtime handler's name", bySchema},
		"a shim twice":                    {spec("shims: [{name: spin}, {name: spin}]"), "spec.shims[1].name", "is there twice", beyondSchema},
		"a network that does not exist":   {spec("network: {cni: weave}"), "spec.network.cni", "is not one of flannel, calico, cilium, custom", bySchema},
		"no network at all":               {spec("network: {flannelBackend: none}"), "spec.network.flannelBackend", "leaves pods without a network", beyondSchema},
		"a backend for another network":   {spec("network: {cni: calico, flannelBackend: vxlan}"), "spec.network.flannelBackend", "is for flannel", beyondSchema},
		"a CIDR that is none":             {spec("network: {clusterCIDR: 10.42.0.0}"), "spec.network.clusterCIDR", "is not a CIDR such as 10.42.0.0/16", beyondSchema},
		"a CIDR with bits beyond":         {spec("network: {clusterCIDR: 10.42.0.1/16}"), "spec.network.clusterCIDR", "write 10.42.0.0/16", beyondSchema},
		"two CIDRs of a family":           {spec("network: {clusterCIDR: '10.42.0.0/16,10.44.0.0/16'}"), "spec.network.clusterCIDR", "two networks of the same family", beyondSchema},
		"families that differ":            {spec("network: {clusterCIDR: 'fd00::/56'}"), "spec.network.clusterCIDR", "the same address families", beyondSchema},
		"networks that overlap":           {spec("network: {serviceCIDR: 10.42.128.0/20}"), "spec.network.serviceCIDR", "overlaps with clusterCIDR 10.42.0.0/16", beyondSchema},
		"a registry with its scheme":      {spec("registries: {systemDefault: https://x.example}"), "spec.registries.systemDefault", "without https://", beyondSchema},
		"Docker Hub for k3s's images":     {spec("registries: {systemDefault: docker.io}"), "spec.registries.systemDefault", "rate limits", beyondSchema},
		"a mirror of no registry":         {spec("registries: {mirrors: {'https://x': {endpoints: ['https://y']}}}"), `spec.registries.mirrors["https://x"]`, "is not a registry's host", beyondSchema},
		"a mirror without endpoints":      {spec("registries: {mirrors: {docker.io: {}}}"), `spec.registries.mirrors["docker.io"]`, "has no endpoints", bySchema},
		"an endpoint without a scheme":    {spec("registries: {mirrors: {docker.io: {endpoints: [x.example]}}}"), `spec.registries.mirrors["docker.io"].endpoints[0]`, "is not https://HOST", bySchema},
		"a rewrite that is no pattern":    {spec("registries: {mirrors: {docker.io: {endpoints: ['https://x'], rewrite: {'(': x}}}}"), `spec.registries.mirrors["docker.io"].rewrite["("]`, "is not a regular expression", beyondSchema},
		"certificates at a relative path": {spec("registries: {caFiles: {x.example: ca.pem}}"), `spec.registries.caFiles["x.example"]`, "is not a clean absolute path", bySchema},
		"a chart over http":               {spec("addons: {hearth: {chart: 'http://x/y.tgz'}}"), "spec.addons.hearth.chart", "is not oci://HOST/NAME", bySchema},
		"a chart of Docker Hub":           {spec("addons: {hearth: {chart: 'oci://docker.io/x'}}"), "spec.addons.hearth.chart", "rate limits", beyondSchema},
		"an amount that is none":          {spec("host: {minDiskFree: lots}"), "spec.host.minDiskFree", "is not an amount of bytes such as 8Gi", beyondSchema},
		"a clock that may be anything":    {spec("host: {maxClockOffset: 1h}"), "spec.host.maxClockOffset", "is not between 1s and 5m", beyondSchema},
		"a sysctl's name that leaves":     {spec(`host: {sysctls: {"net/../../x": "1"}}`), `spec.host.sysctls["net/../../x"]`, "is not a sysctl's name", beyondSchema},
		"a sysctl's value of two lines":   {spec(`host: {sysctls: {vm.x: "1\n2"}}`), `spec.host.sysctls["vm.x"]`, "one line", beyondSchema},
		"a module's name with a path":     {spec("host: {modules: [../x]}"), "spec.host.modules[0]", "is not a kernel module's name", bySchema},
		"a hook's name with a space":      {spec("signal: {lifecycleHook: 'a b'}"), "spec.signal.lifecycleHook", "is not a lifecycle hook's name", bySchema},
		"a stack without a resource":      {spec("signal: {cloudFormation: {stack: x}}"), "spec.signal.cloudFormation", "needs resource", bySchema},
		"a resource without a stack":      {spec("signal: {cloudFormation: {resource: x}}"), "spec.signal.cloudFormation", "needs stack", bySchema},
		"a phase longer than the run":     {spec("timeouts: {total: 1m, fetch: 2m}"), "spec.timeouts.fetch", "is longer than spec.timeouts.total, 1m", beyondSchema},
		"no time at all":                  {spec("timeouts: {ready: 0s}"), "spec.timeouts.ready", "is not between 10s and 24h", beyondSchema},

		// Secrets.
		"a token":                        {spec("cluster: {token: hunter2}"), "spec.cluster.token", "tokens of the cluster come from spec.cluster.store", bySchema},
		"a token of k3s":                 {spec("k3s: {config: {token: hunter2}}"), "spec.k3s.config.token", "it may hold no secrets", bySchema},
		"an agent's token":               {spec("k3s: {config: {agent-token: hunter2}}"), "spec.k3s.config.agent-token", "it may hold no secrets", bySchema},
		"a password in a chart's values": {spec("addons: {hearth: {values: {grafana: {adminPassword: hunter2}}}}"), "spec.addons.hearth.values.grafana.adminPassword", "a Secret in the cluster", beyondSchema},
		"a password that is a number":    {spec("addons: {hearth: {values: {list: [{password: 12345678}]}}}"), "spec.addons.hearth.values.list[0].password", "it may hold no secrets", beyondSchema},
		"a token in another field":       {spec("node: {labels: {x: K10" + digest + "::server:hunter2}}"), "spec.node.labels.x", "looks like a credential", bySchema},
		"an access key":                  {spec("k3s: {config: {kubelet-arg: [AKIAIOSFODNN7EXAMPLE]}}"), "spec.k3s.config.kubelet-arg[0]", "looks like a credential", beyondSchema},
		"a private key":                  {spec(`cluster: {name: "-----BEGIN EC PRIVATE KEY-----hunter2"}`), "spec.cluster.name", "looks like a credential", bySchema},
		"a presigned URL":                {spec("artifacts: {mirrors: ['https://x.example/?X-Amz-Signature=hunter2']}"), "spec.artifacts.mirrors[0]", "looks like a credential", beyondSchema},
		"a URL with a password":          {spec("registries: {mirrors: {docker.io: {endpoints: ['https://u:hunter2@x']}}}"), `spec.registries.mirrors["docker.io"].endpoints[0]`, "looks like a credential", beyondSchema},
		"a token among arguments":        {spec("k3s: {config: {kube-proxy-arg: ['x-token=hunter2']}}"), "spec.k3s.config.kube-proxy-arg[0]", "looks like a credential", beyondSchema},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := resolve(t, c.document)
			if fault.CodeOf(err) != CodeInvalid {
				t.Fatalf("got %v", err)
			}
			problems := problemsOf(t, err)
			if len(problems) != 1 {
				t.Errorf("%d problems: %v", len(problems), err)
			}
			p := problems[0]
			if p.Path != c.path || !strings.Contains(p.Message, c.want) {
				t.Errorf("got %q, want %q … %q", p, c.path, c.want)
			}
			if p.Origin.Source == "" || p.Origin.Line == 0 && !strings.Contains(p.Message, "unknown anchor") {
				t.Errorf("nobody knows where %q is", p)
			}
			if strings.Contains(err.Error(), "hunter2") {
				t.Errorf("the error shows a secret: %v", err)
			}
			if refused := validate([]byte(c.document)) != nil; refused != c.schema && !strings.Contains(p.Message, "not YAML") && !strings.Contains(p.Message, "twice, the first") {
				t.Errorf("refused by the schema: %v", refused)
			}
		})
	}
}

func TestWhatIsAllowed(t *testing.T) {
	validate := schemaValidator(t)
	for name, document := range map[string]string{
		"labels of kubelet's namespaces": spec("node: {labels: {node.kubernetes.io/x: yy, x.kubelet.kubernetes.io/y: '', example.com/z: z, plain: a}}"),
		"the pool's own label":           spec("pool: build", "node: {labels: {hearth.sh/pool: build}}"),
		"SSM":                            spec("cluster: {store: ssm:///hearth/prod_1/a.b-c}"),
		"a bucket with deep prefixes":    spec("cluster: {store: s3://my.bucket-1/a/b_c/d=e/, snapshots: {bucket: s3://my.bucket-1}}"),
		"other partitions' regions":      spec("cluster: {region: us-gov-west-1, snapshots: {region: cn-northwest-1}}"),
		"a server's IPv6 address":        spec("cluster: {server: 'https://[fd00::1]:6443', tlsSANs: ['fd00::1', 10.0.0.1, '*.example.com', a.b]}"),
		"schedules":                      spec("cluster: {snapshots: {schedule: '*/15 0-6,12 1 jan-MAR mon'}}"),
		"named schedules":                spec("cluster: {snapshots: {schedule: '@daily'}}"),
		"regular schedules":              spec("cluster: {snapshots: {schedule: '@every 90m'}}"),
		"a restore":                      spec("cluster: {restore: {generation: 3, snapshot: /var/backup/etcd-1}}"),
		"release candidates":             spec("k3s: {version: v1.36.2-rc1+k3s1}"),
		"a server's keys on a server":    spec("role: server", "k3s: {config: {disable: [traefik], write-kubeconfig-mode: '0644', secrets-encryption: true, etcd-s3-endpoint: localhost}}"),
		"keys that k3s may gain":         spec("k3s: {version: v1.37.0+k3s1, config: {some-entirely-new-setting: 5}}"),
		"a key of KMS by its alias":      spec("cluster: {kmsKey: alias/hearth/production}"),
		"a key of KMS by its ID":         spec("cluster: {kmsKey: 1234abcd-12ab-34cd-56ef-1234567890ab}"),
		"a key of KMS of many regions":   spec("cluster: {kmsKey: mrk-1234abcd12ab34cd56ef1234567890ab}"),
		"a key of KMS by its ARN":        spec("cluster: {kmsKey: 'arn:aws-cn:kms:cn-north-1:123456789012:key/1234abcd-12ab-34cd-56ef-1234567890ab'}"),
		"kubelet's arguments":            spec("k3s: {config: {kubelet-arg: [max-pods=250, cloud-provider=external]}}"),
		"a file for each processor":      spec(file + ", arch: arm64}, {name: x, arch: amd64, urls: ['file:///opt/x', 'http://127.0.0.1:8080/x', 's3://bucket/key?region=eu-central-1'], sha256: " + digest + `, mode: "0644", path: /opt/x, size: 5}]}`),
		"two address families":           spec("network: {clusterCIDR: '10.42.0.0/16,fd42::/56', serviceCIDR: '10.43.0.0/16,fd43::/112'}"),
		"registries":                     spec("registries: {systemDefault: 'x.example:5000/a/b', mirrors: {'*': {endpoints: ['http://10.0.0.1:5000/v2']}, 'localhost:5000': {endpoints: ['https://x'], rewrite: {'^(.*)$': 'a/$1'}}}, caFiles: {x.example: /etc/x.pem}}"),
		"what only sounds secret":        spec("addons: {hearth: {values: {automountServiceAccountToken: false, tokenTTL: 1h, password: {secretKeyRef: x}, existingPassword: ''}}}"),
		"host":                           spec("host: {minDiskFree: 1.5Gi, sysctls: {net.ipv4.ip_forward: '1', net/core/rmem_max: '5'}, modules: [br_netfilter, nf-conntrack]}"),
		"signals":                        spec("signal: {lifecycleHook: a/b_c-1, autoScalingGroup: my group, cloudFormation: {stack: 'arn:aws:cloudformation:eu-central-1:123456789012:stack/x/y', resource: Group1}}"),
		"times":                          spec("timeouts: {total: 1h30m, fetch: 90m, join: 1.5m, ready: 10s, prove: 60000ms}"),
		"addons":                         spec("addons: {hearth: {chart: 'oci://registry.example/hearth', version: 1.0.0-rc.1+x, enabled: false}, spinkube: {enabled: true, chart: 'https://x.example/c.tgz', values: {a: null}}}"),
		"shims":                          spec("shims: [{name: my-runtime, artifact: my.shim, required: true}]"),
	} {
		t.Run(name, func(t *testing.T) {
			if _, err := resolve(t, document); err != nil {
				t.Error(err)
			}
			if err := validate([]byte(document)); err != nil {
				t.Errorf("the schema refuses it: %v", err)
			}
		})
	}
}

// TestWhatMustBeSaid starts from nothing, where the rules about artifacts can
// be told without a manifest.
func TestWhatMustBeSaid(t *testing.T) {
	const artifact = `{name: %s, urls: [https://x.example/x], sha256: ` + digest + `}`
	files := func(names ...string) string {
		var out []string
		for _, n := range names {
			out = append(out, strings.Replace(artifact, "%s", n, 1))
		}
		return "artifacts: {files: [" + strings.Join(out, ", ") + "]}"
	}
	const store, version, hub = "cluster: {store: s3://bucket/x}", "k3s: {version: v1.36.2+k3s1}", "registries: {systemDefault: x.example}"
	for name, c := range map[string]struct {
		lines []string
		want  []string // paths with words of their problems
	}{
		"nothing is said": {[]string{"pool: build"}, []string{
			"spec.cluster.store: is missing", "spec.k3s.version: is missing", "spec.artifacts.files: there is no artifact k3s", "spec.registries: k3s's own images would come from Docker Hub"}},
		"all is said":                            {[]string{"pool: build", store, version, files("k3s"), hub}, nil},
		"images are in an archive":               {[]string{"pool: build", store, version, files("k3s", "k3s-airgap-images")}, nil},
		"images come from a mirror":              {[]string{"pool: build", store, version, files("k3s"), "registries: {mirrors: {docker.io: {endpoints: ['https://x']}}}"}, nil},
		"images come from a mirror of all":       {[]string{"pool: build", store, version, files("k3s"), "registries: {mirrors: {'*': {endpoints: ['https://x']}}}"}, nil},
		"a mirror of another registry":           {[]string{"pool: build", store, version, files("k3s"), "registries: {mirrors: {quay.io: {endpoints: ['https://x']}}}"}, []string{"spec.registries: "}},
		"a shim whose artifact nobody knows":     {[]string{"pool: wasm", store, version, files("k3s", "hearth-image"), hub}, []string{"spec.shims[0]: there is no artifact containerd-shim-spin-v2"}},
		"a server whose addon has no image":      {[]string{"pool: control-plane", store, version, files("k3s"), hub}, []string{"spec.addons.hearth: its pods need an image"}},
		"an agent that waits for such pods":      {[]string{"pool: wasm", store, version, files("k3s", "containerd-shim-spin-v2"), hub}, []string{"spec.addons.hearth: its pods need an image"}},
		"an archive has the addon's image":       {[]string{"pool: control-plane", store, version, files("k3s", "hearth-image"), hub}, nil},
		"a registry has the addon's image":       {[]string{"pool: control-plane", store, version, files("k3s"), hub, "addons: {hearth: {values: {image: {repository: x.example/nodeagent}}}}"}, nil},
		"a mirror has the addon's image":         {[]string{"pool: control-plane", store, version, files("k3s"), "registries: {systemDefault: x.example, mirrors: {hearth.sh: {endpoints: ['https://x']}}}"}, nil},
		"an addon that is off needs no image":    {[]string{"pool: wasm", store, version, files("k3s", "containerd-shim-spin-v2"), hub, "addons: {hearth: {enabled: false}}"}, nil},
		"a chart of the owner's has its image":   {[]string{"pool: control-plane", store, version, files("k3s"), hub, "addons: {hearth: {chart: 'oci://x.example/hearth'}}"}, nil},
		"an addon's image for other machines":    {[]string{"pool: control-plane", store, version, strings.Replace(files("k3s", "hearth-image"), "name: hearth-image", "name: hearth-image, arch: amd64", 1), hub}, []string{"add the artifact hearth-image for arm64"}},
		"a network whose manifest nobody knows":  {[]string{"pool: build", store, version, files("k3s"), hub, "network: {cni: custom}"}, []string{"spec.network.cni: handing the network to custom needs the artifact cni-manifest"}},
		"ECR without its provider":               {[]string{"pool: build", store, version, files("k3s"), "registries: {systemDefault: x.example, ecr: true}"}, []string{"spec.registries.ecr: needs the artifact ecr-credential-provider"}},
		"a misspelt field hides what is missing": {[]string{"pool: build", "clusters: {store: s3://bucket/x}", version, files("k3s"), hub}, []string{"spec.clusters: unknown field; did you mean cluster?"}},
		"a k3s for other machines":               {[]string{"pool: build", store, version, strings.Replace(files("k3s"), "name: k3s", "name: k3s, arch: amd64", 1), hub}, []string{"spec.artifacts.files: there is no artifact k3s for arm64"}},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := Resolve(t.Context(), Sources{UserData: []byte(spec(c.lines...)), Instance: &Instance{Arch: "arm64"}})
			if len(c.want) == 0 {
				if err != nil {
					t.Error(err)
				}
				return
			}
			problems := problemsOf(t, err)
			if len(problems) != len(c.want) {
				t.Errorf("got %v", err)
			}
			for i := range min(len(problems), len(c.want)) {
				if !strings.Contains(problems[i].String(), c.want[i]) {
					t.Errorf("got %q, want %q", problems[i], c.want[i])
				}
			}
		})
	}
}

func TestSchedules(t *testing.T) {
	for s, want := range map[string]string{
		"0 */6 * * *":            "",
		"0,30 1-5/2 ? * *":       "",
		"59 23 31 12 6":          "",
		"0 0 * * sun-SAT":        "",
		"@every 1m":              "",
		"@hourly":                "",
		"":                       "0 fields",
		"60 * * * *":             `minute: "60" is not between 0 and 59`,
		"* 24 * * *":             "hour",
		"* * 0 * *":              "day of the month",
		"* * * 13 *":             "month",
		"* * * * 7":              "day of the week",
		"* * * foo *":            "month",
		"5-1 * * * *":            "ends before it begins",
		"*/0 * * * *":            "is not a step",
		"*/x * * * *":            "is not a step",
		"1, * * * *":             "minute",
		"@never":                 "none of @yearly",
		"@every 1s":              "at least 1m",
		"@every soon":            "time span",
		"+1 * * * *":             "minute",
		"0 0 0 1 1 *":            "6 fields",
		strings.Repeat("*", 999): "too long",
	} {
		if err := checkCron(s); want == "" && err != nil || want != "" && (err == nil || !strings.Contains(err.Error(), want)) {
			t.Errorf("%.40q: got %v, want %q", s, err, want)
		}
	}
}

func TestRedact(t *testing.T) {
	for _, secret := range []string{"K10" + digest + "::server:abc", "AKIAIOSFODNN7EXAMPLE", "https://u:p@x.example/", "https://x/?X-Amz-Signature=1", "a,password=b", "https://x/?token=abc"} {
		if got := Redact("before " + secret + " after"); strings.Contains(got, secret) {
			t.Errorf("%q is shown", secret)
		}
	}
	for _, plain := range []string{"", "s3://bucket/key", "https://x.example:6443", "registry.example.com/a@sha256:" + digest, "token-file"} {
		if got := Redact(plain); got != plain {
			t.Errorf("%q became %q", plain, got)
		}
	}
}
