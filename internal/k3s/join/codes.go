package join

import "github.com/hearth-sh/hearth/internal/bootstrap/fault"

// Why a machine cannot join.
const (
	// CodeNoServers: nobody to ask.
	CodeNoServers fault.Code = "join-no-servers"
	// CodeDNS: a server's name does not resolve.
	CodeDNS fault.Code = "join-dns"
	// CodeRefused: nothing listens on the server's port.
	CodeRefused fault.Code = "join-refused"
	// CodeConnectTimeout: connecting gets no answer.
	CodeConnectTimeout fault.Code = "join-connect-timeout"
	// CodeNoRoute: there is no route to the server.
	CodeNoRoute fault.Code = "join-no-route"
	// CodeUnreachable: the connection fails in another way.
	CodeUnreachable fault.Code = "join-unreachable"
	// CodeNotK3s: what answers is not k3s.
	CodeNotK3s fault.Code = "join-not-k3s"
	// CodeCAMismatch: the server is of another cluster, or an impostor.
	CodeCAMismatch fault.Code = "join-ca-mismatch"
	// CodeServerName: the server's certificate is not for the address used.
	CodeServerName fault.Code = "join-server-name"
	// CodeClock: the server's certificate is not valid at this machine's time.
	CodeClock fault.Code = "join-clock"
	// CodeBadToken: the server does not know the token.
	CodeBadToken fault.Code = "join-bad-token"
	// CodeTokenRole: the token is good, but not for this.
	CodeTokenRole fault.Code = "join-token-role"
	// CodeNodeClash: the node's name is taken by another machine.
	CodeNodeClash fault.Code = "join-node-name-taken"
	// CodeVersionSkew: the server's version and this machine's do not go together.
	CodeVersionSkew fault.Code = "join-version-skew"
	// CodeNotReady: the server runs, but its etcd or API server is not ready.
	CodeNotReady fault.Code = "join-server-not-ready"
	// CodeLearner: etcd is still taking in another server.
	CodeLearner fault.Code = "join-etcd-learner"
	// CodeRejected: the server refuses in a way not known to us.
	CodeRejected fault.Code = "join-rejected"
	// CodeNodePassword: the node password cannot be read or made.
	CodeNodePassword fault.Code = "join-node-password" //nolint:gosec // a code, no password
)
