//go:build !local

package main

import (
	"context"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/tools/clientcmd"
	clientcmdapi "k8s.io/client-go/tools/clientcmd/api"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/hearth-sh/hearth/api/v1alpha1"
	"github.com/hearth-sh/hearth/internal/clusternode"
	"github.com/hearth-sh/hearth/internal/imds"
	"github.com/hearth-sh/hearth/internal/kube"
	"github.com/hearth-sh/hearth/internal/shim"
)

const (
	// metadataAttempts and metadataAttemptWait leave room for both address
	// families within doctorStepWait.
	metadataAttempts    = 1
	metadataAttemptWait = time.Second
	// imageGCPercent is the kubelet's default imageGCHighThresholdPercent:
	// above it, images that no pod uses are deleted.
	imageGCPercent = 85
	// certificateSoon is when a client certificate that nobody renewed is
	// worth a warning: kubelets renew theirs weeks ahead.
	certificateSoon = 24 * time.Hour
)

// nodeChecks are those of a node of a cluster; none elsewhere.
func (d *doctor) nodeChecks() []doctorCheck {
	if !d.isCluster() {
		return nil
	}
	checks := []doctorCheck{
		{"containerd", "the agent proves runtimes and pulls images through it", d.containerd},
		{"identity", "labels, the node condition and evictions are written with it", d.identity},
		{"startup-taint", "pods stay away while the node has it", d.startupTaint},
		{"instance-metadata", "interruptions are announced there, and the registry's tokens come from there", d.instanceMetadata},
		{"image-disk", "the kubelet deletes images, prefetched ones too, when their disk is full", d.imageDisk},
	}
	if d.status == nil {
		return checks
	}
	checks = append(checks, doctorCheck{"runtimes", "the node's labels, and so pods, follow what was proved", d.runtimes})
	for _, r := range d.status.Runtimes {
		if !r.Proven {
			checks = append(checks, doctorCheck{
				"runtime-" + runtimeName(r), "pods that ask for this runtime are not sent to this node",
				func(context.Context) finding { return d.unproven(r) },
			})
		}
	}
	if d.status.Images != nil {
		checks = append(checks, doctorCheck{"images", "the first pod of a missing image waits for its pull", d.images})
	}
	return checks
}

func runtimeName(r v1alpha1.RuntimeStatus) string {
	if r.Handler != "" {
		return r.Handler
	}
	return r.Name
}

func (d *doctor) containerd(ctx context.Context) finding {
	sockets := clusternode.ContainerdSockets
	if d.node.containerdSocket != "" {
		sockets = []string{d.node.containerdSocket}
	}
	socket := ""
	for _, s := range sockets {
		if info, err := os.Stat(s); err == nil && info.Mode().Type() == os.ModeSocket {
			socket = s
			break
		}
	}
	if socket == "" {
		return broken("see `systemctl status k3s k3s-agent containerd`, or say where it listens with --containerd-socket, here and to the agent",
			"there is no socket at %s", strings.Join(sockets, " or "))
	}
	if unix.Access(socket, unix.W_OK) != nil {
		return skipped("%s is there, but user %d may not connect to it; run doctor as root", socket, os.Getuid())
	}
	connection, err := grpc.NewClient("unix://"+socket, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		return broken("report this", "%s cannot be asked: %v", socket, err)
	}
	defer connection.Close()
	version, err := runtimeapi.NewRuntimeServiceClient(connection).Version(ctx, &runtimeapi.VersionRequest{})
	if err != nil {
		return broken("look at its log (`journalctl -u k3s -u k3s-agent -u containerd`) and restart it", "containerd does not answer on %s: %v", socket, err)
	}
	return ok("%s %s answers on %s", printable(version.RuntimeName), printable(version.RuntimeVersion), socket)
}

func (d *doctor) runtimes(context.Context) finding {
	proven := 0
	for _, r := range d.status.Runtimes {
		if r.Proven {
			proven++
		}
	}
	switch {
	case len(d.status.Runtimes) == 0:
		return warning("install a shim such as containerd-shim-spin, configure containerd for it, and restart containerd; it is then proved within seconds",
			"containerd has no runtime for Wasm")
	case proven == 0:
		return broken("see the findings about each runtime", "no runtime of this node is proven (%d are there)", len(d.status.Runtimes))
	case proven < len(d.status.Runtimes):
		return ok("%d of %d runtimes are proven", proven, len(d.status.Runtimes))
	}
	return ok("all runtimes are proven: %d", proven)
}

// unproven says what to do about one runtime, by how its last proof ended.
func (d *doctor) unproven(r v1alpha1.RuntimeStatus) finding {
	message := r.Message
	if message == "" {
		message = "it was not tried yet"
	}
	remedy := map[shim.Code]string{
		"":                     "wait a few seconds and look again",
		shim.CodeNotFound:      "install the shim's binary into a directory of containerd's PATH, such as /usr/local/bin",
		shim.CodeNoHandler:     "add a runtime with this shim to containerd's configuration, and restart containerd",
		shim.CodeVersionTooOld: "install a newer version of the shim",
		shim.CodeNoProbe:       "nothing can be proved of a runtime that Hearth does not know; use one of those in docs/operations.md",
		shim.CodeCreateFailed:  "see containerd's log: the shim could not make a task",
		shim.CodeStartFailed:   "see containerd's log: the shim could not start a task",
		shim.CodeExited:        "see containerd's log; a shim for another processor or another libc ends like this",
		shim.CodeWrongOutput:   "reinstall the shim from a source that you trust: it ran something else than the module",
		shim.CodeTimeout:       "see whether the machine is overloaded, then containerd's log",
		shim.CodeUnreachable:   "see the finding about containerd",
		shim.CodeCancelled:     "wait a few seconds and look again",
		shim.CodeInternal:      "see the agent's log",
	}[shim.Code(r.Code)]
	if remedy == "" {
		remedy = "see the agent's and containerd's logs"
	}
	if len(r.Problems) > 0 {
		remedy = strings.Join(r.Problems, "; ")
	}
	return warning(remedy, "%s (%s) is not proven: %s", runtimeName(r), r.Name, message)
}

func (d *doctor) images(context.Context) finding {
	i := d.status.Images
	if i.Failed == 0 {
		return ok("%s", i.Summary)
	}
	for _, image := range i.Images {
		if image.Error != nil {
			return warning("correct its name, or the registry's credentials or reach; it is tried again by itself", "%s: %s (%d failed in all)", image.Image, image.Error.Detail, i.Failed)
		}
	}
	return warning("`nodeagent status` names each", "%s", i.Summary)
}

// name is the node's.
func (d *doctor) name() string {
	switch {
	case d.node.nodeName != "":
		return d.node.nodeName
	case d.status != nil && d.status.Node != "":
		return d.status.Node
	}
	host, _ := os.Hostname()
	return host
}

// identity looks at what the agent shows to the API server, without showing it.
func (d *doctor) identity(context.Context) finding {
	if d.node.inPod {
		// The files are those of client-go's rest.InClusterConfig.
		if _, err := os.Stat(filepath.Join(serviceAccountDir, "token")); err != nil {
			return broken("run the agent as the chart does, with its ServiceAccount", "the pod has no ServiceAccount token: %v", err)
		}
		return ok("the pod's ServiceAccount")
	}
	if d.node.kubeconfig == "" {
		return skipped("no kubelet's kubeconfig is where k3s, RKE2 or kubeadm keep it; the agent may be a pod")
	}
	config, err := clientcmd.LoadFromFile(d.node.kubeconfig)
	switch {
	case errors.Is(err, os.ErrPermission):
		return skipped("user %d may not read %s; run doctor as root", os.Getuid(), d.node.kubeconfig)
	case err != nil:
		return broken("say where the kubelet's is with --kubeconfig, here and to the agent", "%s is no kubeconfig: %v", d.node.kubeconfig, err)
	}
	certificate, err := clientCertificate(config, filepath.Dir(d.node.kubeconfig))
	if err != nil {
		return warning("give the kubelet's kubeconfig, which names a client certificate", "%s: %v", d.node.kubeconfig, err)
	}
	user, want := certificate.Subject.CommonName, "system:node:"+d.name()
	switch {
	case user != want:
		return broken("give the agent the node's own name with --node-name, or its own kubelet's kubeconfig with --kubeconfig",
			"%s is the identity of %s, not of %s: the API server will refuse what the agent writes", d.node.kubeconfig, printable(user), want)
	case d.now.After(certificate.NotAfter):
		return broken("restart the kubelet (k3s: `systemctl restart k3s-agent`), which renews it; then check the clock", "the certificate of %s expired at %s", user, certificate.NotAfter.UTC().Format(time.RFC3339))
	case d.now.Add(certificateSoon).After(certificate.NotAfter):
		return warning("restart the kubelet (k3s: `systemctl restart k3s-agent`), which renews it", "the certificate of %s expires at %s", user, certificate.NotAfter.UTC().Format(time.RFC3339))
	}
	return ok("%s, by %s", user, d.node.kubeconfig)
}

// serviceAccountDir is where kubelets put the identity of a pod.
const serviceAccountDir = "/var/run/secrets/kubernetes.io/serviceaccount"

// clientCertificate returns the certificate of the current context's user.
func clientCertificate(config *clientcmdapi.Config, dir string) (*x509.Certificate, error) {
	current := config.Contexts[config.CurrentContext]
	if current == nil {
		return nil, errors.New("it has no current context")
	}
	user := config.AuthInfos[current.AuthInfo]
	if user == nil {
		return nil, errors.New("its current context names no user that it has")
	}
	data := user.ClientCertificateData
	if len(data) == 0 {
		if user.ClientCertificate == "" {
			return nil, errors.New("its user has no client certificate")
		}
		file := user.ClientCertificate
		if !filepath.IsAbs(file) {
			file = filepath.Join(dir, file)
		}
		var err error
		if data, err = os.ReadFile(file); err != nil {
			return nil, err
		}
	}
	for block, rest := pem.Decode(data); block != nil; block, rest = pem.Decode(rest) {
		if block.Type == "CERTIFICATE" {
			return x509.ParseCertificate(block.Bytes)
		}
	}
	return nil, errors.New("its client certificate is not in PEM")
}

// startupTaint asks the API server, as the agent does, about this node.
func (d *doctor) startupTaint(ctx context.Context) finding {
	client, err := d.nodeClient()
	if err != nil {
		return skipped("the API server cannot be asked: %v", err)
	}
	name := d.name()
	node, err := client.CoreV1().Nodes().Get(ctx, name, metav1.GetOptions{})
	if err != nil {
		return warning("see whether the API server answers, whether this is the node's name (--node-name), and whether the agent's roles are installed (`helm status hearth`)",
			"the API server does not say how node %s is: %v", name, err)
	}
	for _, taint := range node.Spec.Taints {
		if taint.Key != v1alpha1.TaintNotReady {
			continue
		}
		proven := d.status != nil && slices.ContainsFunc(d.status.Runtimes, func(r v1alpha1.RuntimeStatus) bool { return r.Proven })
		switch {
		case !proven:
			return warning("see the findings about runtimes: the agent removes it after the first proof", "node %s has the startup taint %s and no proven runtime", name, taint.Key)
		case !d.node.inPod && !d.node.tainter:
			return warning("give the agent an identity that may, with --tainter-kubeconfig, or remove it: kubectl taint node "+name+" "+taint.Key+"-",
				"node %s has the startup taint %s although a runtime is proven: a kubelet's identity may not remove it", name, taint.Key)
		}
		return warning("wait a few seconds; if it stays, see the agent's log for what the API server refuses", "node %s has the startup taint %s although a runtime is proven", name, taint.Key)
	}
	return ok("node %s does not have it", name)
}

func (d *doctor) nodeClient() (kubernetes.Interface, error) {
	options := kube.Options{UserAgent: "hearth-doctor/" + buildVersion()}
	var clients *kube.Clients
	var err error
	switch {
	case d.node.inPod:
		clients, err = kube.InCluster(d.name(), options)
	case d.node.kubeconfig != "":
		clients, err = kube.FromKubeconfig(d.node.kubeconfig, d.name(), options)
	default:
		return nil, errors.New("no kubelet's kubeconfig is where k3s, RKE2 or kubeadm keep it; give --kubeconfig")
	}
	if err != nil {
		return nil, err
	}
	return clients.Node, nil
}

func (d *doctor) instanceMetadata(ctx context.Context) finding {
	if d.node.imds == "off" {
		return skipped("told not to ask (--imds=off)")
	}
	client, err := imds.New(imds.Options{Attempts: metadataAttempts, AttemptTimeout: metadataAttemptWait})
	if err != nil {
		return broken("correct the environment, or unset it", "%v", err)
	}
	defer client.Close()
	identity, err := client.Identity(ctx)
	if err == nil {
		if identity.Role == "" {
			return warning("give the instance a role (an instance profile) that may pull from the registry", "%s answers, but the instance has no role: images in private registries of AWS cannot be pulled", identity.InstanceID)
		}
		return ok("%s (%s, %s) answers, its role is %s", identity.InstanceID, identity.InstanceType, identity.LifeCycle, identity.Role)
	}
	// A machine that is no instance has nobody at the address.
	if errors.Is(err, imds.ErrUnreachable) && d.node.imds != "on" && !d.isEC2() {
		return skipped("this does not look like an EC2 instance, and nothing answers at the metadata address")
	}
	switch {
	case errors.Is(err, imds.ErrUnreachable) && d.node.inPod:
		return broken("use host networking for the agent (hostNetwork: true, as the chart does), or raise the instance's HttpPutResponseHopLimit to 2, knowing that every pod then gets the node's role",
			"a pod cannot reach IMDS: the hop limit is 1, so answers to token requests die on their way into the pod's network (%v)", err)
	case errors.Is(err, imds.ErrUnreachable):
		return broken("look for a firewall rule or route that keeps 169.254.169.254 from the host (`ip route get 169.254.169.254`, `iptables -S`, `nft list ruleset`), or tell the agent --imds=off where this is no EC2 instance",
			"instance metadata does not answer this host: %v", err)
	case errors.Is(err, imds.ErrDisabled):
		return broken("enable it: aws ec2 modify-instance-metadata-options --http-endpoint enabled --http-tokens required --instance-id ID; or tell the agent --imds=off", "%v", err)
	case errors.Is(err, imds.ErrVersion1):
		return broken("update or replace what answers at the metadata address: session tokens (IMDSv2) are the only protection of the node's role", "%v", err)
	case errors.Is(err, imds.ErrUnavailable):
		return warning("wait; if it stays so, stop and start the instance", "%v", err)
	}
	return broken("see what answers at the metadata address: on an instance it is EC2 itself", "%v", err)
}

// isEC2 goes by the firmware's tables ("Detect whether a host is an EC2
// instance" of the EC2 User Guide).
func (d *doctor) isEC2() bool {
	for file, prefix := range map[string]string{
		"/sys/class/dmi/id/sys_vendor":   "amazon ec2",
		"/sys/class/dmi/id/bios_vendor":  "amazon ec2",
		"/sys/class/dmi/id/bios_version": "amazon", // Xen: "4.11.amazon"
		"/sys/hypervisor/uuid":           "ec2",
	} {
		data, err := os.ReadFile(filepath.Join(d.node.hostRoot, file))
		if err != nil {
			continue
		}
		text := strings.ToLower(strings.TrimSpace(string(data)))
		if strings.HasPrefix(text, prefix) || strings.HasSuffix(file, "bios_version") && strings.HasSuffix(text, "."+prefix) {
			return true
		}
	}
	return false
}

// imageRoots are where k3s, RKE2 and containerd itself keep images.
var imageRoots = []string{"/var/lib/rancher/k3s/agent/containerd", "/var/lib/rancher/rke2/agent/containerd", "/var/lib/containerd"}

func (d *doctor) imageDisk(context.Context) finding {
	for _, root := range imageRoots {
		var fs unix.Statfs_t
		if err := unix.Statfs(filepath.Join(d.node.hostRoot, root), &fs); err != nil || fs.Blocks == 0 {
			continue
		}
		// As the kubelet counts: what an ordinary user cannot have is used.
		used := 100 - int(fs.Bavail*100/fs.Blocks)
		free := humanBytes(fs.Bavail * uint64(fs.Bsize))
		if used >= imageGCPercent {
			return warning("free space, give the node a larger disk, or raise the kubelet's imageGCHighThresholdPercent (default 85)",
				"%d %% of the disk of %s are used (%s free): the kubelet deletes images above %d %%", used, root, free, imageGCPercent)
		}
		return ok("%d %% of the disk of %s are used, %s free", used, root, free)
	}
	return skipped("containerd's images are in none of %s, as far as this user sees", strings.Join(imageRoots, ", "))
}
