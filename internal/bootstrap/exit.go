package bootstrap

import (
	"strings"

	"github.com/hearth-sh/hearth/internal/bootstrap/fault"
	"github.com/hearth-sh/hearth/internal/k3s"
)

// Exit codes of `bootstrap run`. They are part of the product and never change
// their meaning; docs/bootstrap.md lists them.
const (
	ExitOK          = 0
	ExitInternal    = 1 // not classified
	ExitUsage       = 2 // the command line makes no sense
	ExitConfig      = 3 // the configuration is wrong or missing
	ExitMetadata    = 4 // instance metadata cannot be used
	ExitHost        = 5 // the machine cannot become a node
	ExitFetch       = 6 // a file could not be had, or is not what was pinned
	ExitCluster     = 7 // nothing to found or join
	ExitStart       = 8 // k3s does not come up, or the node not Ready
	ExitProof       = 9 // no WebAssembly runs
	ExitSignal      = 10
	ExitGaveUp      = 11 // as 8 or 9, for too long
	ExitInterrupted = 130
)

// ExitMeaning says what an exit code means and what to do about it.
type ExitMeaning struct {
	Code    int
	Meaning string
	Remedy  string
}

// ExitMeanings lists every exit code of a run, for docs/bootstrap.md.
func ExitMeanings() []ExitMeaning {
	return []ExitMeaning{
		{ExitOK, "the machine is a node, Ready, and ran WebAssembly", "nothing"},
		{ExitInternal, "a failure that nobody classified; `status`: bootstrap has not run here", "run it again; if it stays, report it with result.json"},
		{ExitUsage, "the command line makes no sense", "see `bootstrap COMMAND --help`; the unit does not try again"},
		{ExitConfig, "the configuration is wrong or missing", "`bootstrap config check` lists everything that is wrong; correct user-data and replace the instance, or correct /etc/hearth and start the unit; it does not try again by itself"},
		{ExitMetadata, "instance metadata cannot be used", "see the instance's metadata options; what may pass is tried again"},
		{ExitHost, "this machine cannot become a node: processor, kernel, memory, disk, clock, a file system that cannot be written, no root", "correct what the message names or use another image or instance type; the unit does not try again by itself"},
		{ExitFetch, "a file could not be had, or is not what was pinned; nothing of it was used", "see the mirror, the role's permission, or the digest"},
		{ExitCluster, "there is nothing to found, join or restore: the store, its permissions, the servers, the snapshot", "see `bootstrap status` on the servers, and the policies below"},
		{ExitStart, "k3s does not come up, or the node does not become Ready", "see `journalctl -u k3s -u k3s-agent`"},
		{ExitProof, "the node is Ready, and no WebAssembly runs on it", "the message names the runtime and why; see operations.md"},
		{ExitSignal, "the node works, but who waits for it could not be told", "allow the action that the message names, or correct `spec.signal`"},
		{ExitGaveUp, "runs have failed for longer than `spec.timeouts.total` on a machine that never was a node; the code says why", "correct what the code names, then `systemctl restart hearth-bootstrap`, or replace the instance; it does not try again by itself"},
		{ExitInterrupted, "the run was told to end", "run it again; it goes on where it was"},
	}
}

// ExitCode is the process's for a run that ended with err in a phase.
func ExitCode(err error, phase PhaseName) int {
	if err == nil {
		return ExitOK
	}
	code := fault.CodeOf(err)
	switch {
	case code == CodeInterrupted:
		return ExitInterrupted
	case code == CodeInternal || code == "":
		return ExitInternal
	case code == CodeRestore:
		// The snapshot's store may answer the next time, unlike a machine that
		// cannot be a node.
		return ExitCluster
	case code == k3s.CodeConfig || code == k3s.CodeAddon:
		return ExitConfig
	case strings.HasPrefix(string(code), "host-"):
		return ExitHost
	}
	switch phase {
	case PhaseDiscover:
		return ExitMetadata
	case PhaseConfigure:
		return ExitConfig
	case PhasePreflight, PhasePrepare, PhaseInstall:
		return ExitHost
	case PhaseFetch:
		return ExitFetch
	case PhaseElect:
		return ExitCluster
	case PhaseStart, PhaseReady:
		return ExitStart
	case PhaseProve:
		return ExitProof
	case PhaseSignal:
		return ExitSignal
	}
	return ExitInternal
}

// oneLine joins the lines of an error, which lists of errors have.
func oneLine(err error) string {
	var b strings.Builder
	for line := range strings.FieldsFuncSeq(err.Error(), func(r rune) bool { return r == '\n' || r == '\r' }) {
		if line = strings.TrimSpace(line); line == "" {
			continue
		}
		switch said := b.String(); {
		case said == "":
		case strings.HasSuffix(said, ":"):
			b.WriteByte(' ')
		default:
			b.WriteString("; ")
		}
		b.WriteString(line)
	}
	return b.String()
}
