package k3s

import "github.com/hearth-sh/hearth/internal/bootstrap/fault"

// Codes of the failures of this package.
const (
	// CodeConfig: the configuration cannot be expressed as k3s's.
	CodeConfig fault.Code = "k3s-config-invalid"
	// CodeAddon: an addon lacks something that nobody else can supply.
	CodeAddon fault.Code = "k3s-addon-incomplete"
	// CodeSkew: the node's version of k3s does not go with the cluster's.
	CodeSkew fault.Code = "k3s-version-skew"
	// CodeState: what k3s left on disk cannot be read.
	CodeState fault.Code = "k3s-state-unreadable"
	// CodeCleanup: something that k3s left cannot be taken away.
	CodeCleanup fault.Code = "k3s-cleanup-incomplete"
)

// Explanations lists every code of this package, for `bootstrap explain`.
func Explanations() []fault.Explanation {
	return []fault.Explanation{
		fault.Explain(CodeConfig, "the NodeConfig asks for something that k3s of this role cannot be told", "correct the field that the message names; bootstrap config check shows it beforehand"),
		fault.Explain(CodeAddon, "an addon is enabled but its chart or manifest is not known", "name its chart under addons, or disable it"),
		fault.Explain(CodeSkew, "the version of k3s does not go with the cluster's", remedySkew),
		fault.Explain(CodeState, "what k3s left on this machine cannot be read", "look at the file; bootstrap reset clears the machine"),
		fault.Explain(CodeCleanup, "something that k3s left is still in use", "reboot the machine and run bootstrap reset again"),
	}
}

const remedySkew = "set k3s.version to the cluster's version, and upgrade servers before agents"
