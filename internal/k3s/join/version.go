package join

import (
	"fmt"
	"strconv"
	"strings"
)

const (
	// maxAgentLag is how many minor versions a kubelet may be behind its API
	// server (kubernetes.io/releases/version-skew-policy).
	maxAgentLag = 3
	// maxServerSkew is how many minor versions API servers of one cluster may
	// be apart, while it is upgraded.
	maxServerSkew = 1
	// maxVersionBytes bounds a version.
	maxVersionBytes = 64
)

// minorVersion reads "v1.36.2+k3s1" as 1, 36.
func minorVersion(version string) (major, minor int, err error) {
	bad := fmt.Errorf("%.70q is not a version such as v1.36.2+k3s1", version)
	rest, ok := strings.CutPrefix(version, "v")
	if !ok || len(version) > maxVersionBytes {
		return 0, 0, bad
	}
	parts := strings.SplitN(rest, ".", 3)
	if len(parts) < 3 {
		return 0, 0, bad
	}
	numbers := [2]int{}
	for i := range numbers {
		n, err := strconv.ParseUint(parts[i], 10, 16)
		if err != nil {
			return 0, 0, bad
		}
		numbers[i] = int(n)
	}
	return numbers[0], numbers[1], nil
}

// skew says why a machine with version ours cannot join a server with version
// theirs; "" if it can. Versions that cannot be read are no reason.
func skew(ours, theirs string, server bool) string {
	ourMajor, ourMinor, err := minorVersion(ours)
	if err != nil {
		return ""
	}
	theirMajor, theirMinor, err := minorVersion(theirs)
	if err != nil {
		return ""
	}
	behind := theirMinor - ourMinor
	switch {
	case ourMajor != theirMajor:
		return "their major versions differ"
	case server && (behind > maxServerSkew || behind < -maxServerSkew):
		return fmt.Sprintf("servers may be %d minor version apart at most", maxServerSkew)
	case !server && behind < 0:
		return "an agent may not be newer than its server"
	case !server && behind > maxAgentLag:
		return fmt.Sprintf("an agent may be %d minor versions older than its server at most", maxAgentLag)
	}
	return ""
}
