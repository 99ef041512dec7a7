package k3s

import (
	_ "embed"
	"strings"

	"github.com/hearth-sh/hearth/api/v1alpha1"
)

// FlagsVersion is the minor version of k3s that the list of flags was made from.
const FlagsVersion = "v1.36"

//go:embed flags-v1.36.txt
var flagList string

// Flag is one flag of k3s, and so one key of its config.yaml.
type Flag struct {
	Name string
	// Server and Agent say which commands take it. Unknown flags end an agent
	// at once, and are skipped with a warning by a server
	// (pkg/configfilearg/defaultparser.go), which is worse.
	Server, Agent bool
	// List flags may be given several times, and so be lists.
	List bool
}

// Flags are the flags of `k3s server` and `k3s agent`, by name.
func Flags() map[string]Flag {
	flags := map[string]Flag{}
	for line := range strings.Lines(flagList) {
		fields := strings.Fields(line)
		if len(fields) < 2 || fields[0] == "#" {
			continue
		}
		flags[fields[0]] = Flag{
			Name: fields[0], Server: strings.Contains(fields[1], "server"), Agent: strings.Contains(fields[1], "agent"),
			List: len(fields) > 2 && fields[2] == "list",
		}
	}
	return flags
}

// mayHaveMore says whether a release may have flags that are not in the list,
// being of a later minor version; an unknown version may not.
func mayHaveMore(version string) bool {
	v, err := ParseVersion(version)
	known, knownErr := ParseVersion(FlagsVersion + ".0")
	return err == nil && knownErr == nil && (v.Major > known.Major || v.Major == known.Major && v.Minor > known.Minor)
}

// Takes says whether k3s of a role knows the flag.
func (f Flag) Takes(role v1alpha1.NodeRole) bool {
	return role == v1alpha1.RoleServer && f.Server || role == v1alpha1.RoleAgent && f.Agent
}
