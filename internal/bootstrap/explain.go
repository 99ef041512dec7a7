package bootstrap

import (
	"cmp"
	"slices"

	"github.com/hearth-sh/hearth/internal/artifact"
	"github.com/hearth-sh/hearth/internal/bootstrap/fault"
	"github.com/hearth-sh/hearth/internal/host"
	"github.com/hearth-sh/hearth/internal/k3s"
	"github.com/hearth-sh/hearth/internal/k3s/election"
	"github.com/hearth-sh/hearth/internal/k3s/join"
	"github.com/hearth-sh/hearth/internal/nodeconfig"
	"github.com/hearth-sh/hearth/internal/systemd"
)

// Explanations lists every code with which a run can end, by code.
func Explanations() []fault.Explanation {
	all := slices.Clone(explanations)
	all = append(all, host.Explanations()...)
	all = append(all, systemd.Explanations()...)
	all = append(all, k3s.Explanations()...)
	slices.SortFunc(all, func(a, b fault.Explanation) int { return cmp.Compare(a.Code, b.Code) })
	return all
}

const (
	remedyList  = "correct the entry in the list of artifacts or in spec.artifacts.files, and sign the list anew"
	remedyDisk  = "free space on the file system of the destination, or give the instance a larger volume"
	remedyStore = "see whether the store and the role's permission for it are right: docs/bootstrap.md has the policy"
	remedyNet   = "see the security groups of the servers (TCP 6443 from this subnet) and the route tables"
)

var explanations = []fault.Explanation{
	fault.Explain(CodeTimeout, "a phase ran out of time", "see the timeline for what it waited for; spec.timeouts gives more time"),
	fault.Explain(CodeInterrupted, "the run was told to end, by Ctrl-C or by systemd", "run it again; it goes on where it was"),
	fault.Explain(CodeInternal, "something failed in a way nobody foresaw", "run it again; if it stays, report it with /var/lib/hearth/bootstrap/result.json"),
	fault.Explain(CodeBusy, "another bootstrap runs on this machine", "`bootstrap status` shows how far it is"),

	fault.Explain(CodeMetadataUnreachable, "instance metadata does not answer", "in a container use the host's network; else see the instance's metadata options (HttpEndpoint) and firewall rules for 169.254.169.254"),
	fault.Explain(CodeMetadataDisabled, "instance metadata is switched off for this instance", "enable it: aws ec2 modify-instance-metadata-options --http-endpoint enabled --http-tokens required"),
	fault.Explain(CodeMetadataVersion1, "what answers at the metadata address knows no session tokens", "bootstrap never speaks version 1; see what listens at 169.254.169.254"),
	fault.Explain(CodeMetadataFailing, "instance metadata answers with errors", "it usually passes; else stop and start the instance"),
	fault.Explain(CodeMetadataMalformed, "instance metadata answers with something that is not in the documented format", "see what listens at 169.254.169.254: a proxy or a portal must not"),
	fault.Explain(CodeMetadataMissing, "instance metadata lacks something every instance has", "see what listens at 169.254.169.254"),

	fault.Explain(nodeconfig.CodeInvalid, "the configuration says something that a NodeConfig may not say", "`bootstrap config check` lists everything that is wrong"),
	fault.Explain(nodeconfig.CodeMissing, "no source has a NodeConfig", "put one into user-data or /etc/hearth/node.yaml; cloud-init/ has templates"),
	fault.Explain(nodeconfig.CodeUnreadable, "a file of the configuration cannot be read", "see its permissions"),
	fault.Explain(nodeconfig.CodeUserData, "user-data is too large or its encoding is damaged", "user-data may have 16 KiB, and gzip or base64 must decode"),
	fault.Explain(nodeconfig.CodeSpotServer, "a server was about to run on a Spot instance", "use an on-demand instance, or set spec.node.allowSpotServer if losing a member of etcd at two minutes' notice is acceptable"),

	fault.Explain(artifact.CodeInvalid, "the definition of a file to install contradicts itself", remedyList),
	fault.Explain(artifact.CodePlatform, "a file is for another operating system or processor", remedyList),
	fault.Explain(artifact.CodeUnreachable, "no mirror of a file could be talked to", "see the route to the mirrors; spec.artifacts.mirrors names nearer ones"),
	fault.Explain(artifact.CodeNotFound, "every mirror says that it has no such file, or keeps it from this instance", "see the URLs and, for S3, that the role may s3:GetObject"),
	fault.Explain(artifact.CodeDigestMismatch, "mirrors served other bytes than those pinned", "nothing of them was used; put the right file there, or correct the digest"),
	fault.Explain(artifact.CodeUnpack, "a download is what was pinned, but what it unpacks to is not", remedyList),
	fault.Explain(artifact.CodeNoSpace, "the destination's file system is full", remedyDisk),
	fault.Explain(artifact.CodeReadOnly, "the destination's file system is read-only", "use an image with a writable /usr/local, or bake the files in"),
	fault.Explain(artifact.CodeDisk, "reading or writing the destination failed", "see dmesg for errors of the disk; replace the instance"),
	fault.Explain(artifact.CodeTimeout, "the time for all downloads together ran out", "what was loaded is kept for the next run; spec.timeouts.fetch gives more time"),
	fault.Explain(artifact.CodeInterrupted, "the downloads were told to end", "run it again; what was loaded is kept"),
	fault.Explain(artifact.CodeBusy, "another process installs files", "wait for it"),
	fault.Explain(artifact.CodeManifestInvalid, "the signed list of files is not in its format", remedyList),
	fault.Explain(artifact.CodeManifestUntrusted, "no key of spec.artifacts.publicKeys signed the list", "sign the list with `bootstrap manifest sign`, or correct the keys"),
	fault.Explain(artifact.CodeManifestRollback, "the signed list is older than one this machine has seen", "publish a list with a higher serial"),
	fault.Explain(artifact.CodeManifestUnreachable, "the signed list could not be had", "see spec.artifacts.manifest and the role's permission for it"),
	fault.Explain(artifact.CodeManifestNoEntry, "a file this node needs is in no list", "add it to the list or to spec.artifacts.files"),

	fault.Explain(election.CodeLocation, "spec.cluster.store is no location", "write s3://BUCKET/PREFIX or ssm:///PATH"),
	fault.Explain(election.CodeDenied, "the instance's role may not do what the election needs", remedyStore),
	fault.Explain(election.CodeCredentials, "the instance has no credentials of a role", "give the instance a profile whose role may use the store"),
	fault.Explain(election.CodeMissing, "the store's bucket or directory does not exist", remedyStore),
	fault.Explain(election.CodeUnavailable, "the store cannot be reached or answers with errors", remedyStore),
	fault.Explain(election.CodeUnsupported, "the store does not honour conditional writes, so it cannot keep two servers from founding", "use S3 or Systems Manager"),
	fault.Explain(election.CodeCorrupt, "a record in the store is not one of ours", "use another prefix, or restore the record from the bucket's versions"),
	fault.Explain(election.CodeTimeout, "no server founded the cluster in time", "see `bootstrap status` on the servers; agents go on trying at the next run"),
	fault.Explain(election.CodeFenced, "another server took over what this one was founding", "nothing to do: it joins the other"),
	fault.Explain(election.CodeSuperseded, "this machine has data of a generation that was replaced by a restore", "replace the instance, or `bootstrap reset` it"),
	fault.Explain(election.CodeDataLost, "the only server of the cluster lost its data", "restore a snapshot with spec.cluster.restore"),
	fault.Explain(election.CodeForeignData, "this machine has data of a cluster that is not this one", "`bootstrap reset` it, if that data is not needed"),
	fault.Explain(election.CodeRestore, "the generation to restore was never founded", "see spec.cluster.restore.generation"),
	fault.Explain(election.CodeExhausted, "founding was tried far too often", "see why the servers fail to start k3s, then use another prefix"),
	fault.Explain(election.CodeState, "what this machine remembers of the election cannot be read or written", "see the disk; `bootstrap reset` forgets it"),

	fault.Explain(join.CodeNoServers, "the cluster has no server that can be asked", "start a server, or restore a snapshot"),
	fault.Explain(join.CodeDNS, "a server's name does not resolve", "see spec.cluster.server and the VPC's resolver"),
	fault.Explain(join.CodeRefused, "nothing listens on a server's port", "see `systemctl status k3s` on the server"),
	fault.Explain(join.CodeConnectTimeout, "connecting to a server gets no answer", remedyNet),
	fault.Explain(join.CodeNoRoute, "there is no route to a server", remedyNet),
	fault.Explain(join.CodeUnreachable, "the connection to a server fails", remedyNet),
	fault.Explain(join.CodeNotK3s, "what answers at a server's port is not k3s", "see spec.cluster.server; a load balancer must pass TCP through"),
	fault.Explain(join.CodeCAMismatch, "a server shows another authority than the cluster's", "it is of another cluster, or an impostor; nothing was sent to it"),
	fault.Explain(join.CodeServerName, "a server's certificate is not for the address used", "add the name to spec.cluster.tlsSANs on the servers"),
	fault.Explain(join.CodeClock, "a server's certificate is not valid at this machine's time", "see chronyc tracking here and on the server"),
	fault.Explain(join.CodeBadToken, "the servers do not know the token", "the store and the servers are of different clusters; see spec.cluster.store"),
	fault.Explain(join.CodeTokenRole, "the token is good, but not for this role", "see the role's access to the store"),
	fault.Explain(join.CodeNodeClash, "the node's name is taken by another machine", "delete the Node if that machine is gone: kubectl delete node NAME"),
	fault.Explain(join.CodeVersionSkew, "this machine's k3s does not go with the servers'", "see spec.k3s.version; servers are upgraded first"),
	fault.Explain(join.CodeNotReady, "a server runs, but its etcd or API server is not ready", "it usually passes; see journalctl -u k3s on the server"),
	fault.Explain(join.CodeLearner, "etcd is still taking in another server", "it passes; servers join one after the other"),
	fault.Explain(join.CodeRejected, "a server refuses in an unknown way", "see journalctl -u k3s on the server"),
	fault.Explain(join.CodeNodePassword, "the node password cannot be read or made", "see /etc/rancher/node/password"),

	fault.Explain(CodeNodeNotRegistered, "the node did not register with the API server in time", "see journalctl -u k3s -u k3s-agent"),
	fault.Explain(CodeNodeNotReady, "the node registered and did not become Ready in time", "kubectl describe node says why; often the network (CNI) is missing"),
	fault.Explain(CodeContainerd, "k3s's containerd does not answer", "see /var/lib/rancher/k3s/agent/containerd/containerd.log"),
	fault.Explain(CodeRuntimeMissing, "containerd has no runtime for a configured shim", "k3s finds shims when it starts: restart k3s once the binary is in /usr/local/bin"),
	fault.Explain(CodeRuntimeUnproven, "a runtime did not run the probe module", "the message says why; try the shim by hand"),
	fault.Explain(CodeRestore, "k3s could not restore the snapshot", "see journalctl and the snapshot's name; the command is in the message"),
	fault.Explain(CodeSignalDenied, "the instance's role may not signal", "allow the action that the message names"),
	fault.Explain(CodeSignalFailed, "who waits for this instance could not be told", "see spec.signal"),
}
