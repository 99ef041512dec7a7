package k3s

import (
	"cmp"
	"fmt"
	"regexp"
	"strconv"

	"github.com/hearth-sh/hearth/api/v1alpha1"
	"github.com/hearth-sh/hearth/internal/bootstrap/fault"
)

// Version is a release of k3s: v1.36.2+k3s1, v1.37.0-rc2+k3s1.
type Version struct {
	Major, Minor, Patch int
	// Pre is what follows the patch: "rc2", "alpha.1". Build is k3s's own
	// number: "k3s1".
	Pre, Build string
}

var (
	versionForm = regexp.MustCompile(`^v(0|[1-9]\d{0,3})\.(0|[1-9]\d{0,3})\.(0|[1-9]\d{0,3})(?:-([0-9A-Za-z.-]{1,64}))?(?:\+([0-9A-Za-z.-]{1,64}))?$`)
	// versionLine is the first line of `k3s --version`.
	versionLine = regexp.MustCompile(`^k3s version (\S{1,160})`)
)

// ParseVersion reads a release.
func ParseVersion(s string) (Version, error) {
	m := versionForm.FindStringSubmatch(s)
	if m == nil {
		return Version{}, fmt.Errorf("%.80q is no version of k3s; write it like v1.36.2+k3s1", s)
	}
	number := func(s string) int { n, _ := strconv.Atoi(s); return n } // at most four digits
	return Version{number(m[1]), number(m[2]), number(m[3]), m[4], m[5]}, nil
}

// ParseVersionOutput reads what `k3s --version` prints.
func ParseVersionOutput(out string) (Version, error) {
	m := versionLine.FindStringSubmatch(out)
	if m == nil {
		return Version{}, fmt.Errorf("%.80q is not what k3s --version prints", out)
	}
	return ParseVersion(m[1])
}

func (v Version) String() string {
	s := fmt.Sprintf("v%d.%d.%d", v.Major, v.Minor, v.Patch)
	if v.Pre != "" {
		s += "-" + v.Pre
	}
	if v.Build != "" {
		s += "+" + v.Build
	}
	return s
}

// Compare orders versions of Kubernetes; k3s's own number does not count. A
// release comes after its candidates, which are in the order of their names.
func (v Version) Compare(w Version) int {
	pre := 0
	switch {
	case v.Pre == w.Pre:
	case v.Pre == "":
		pre = 1
	case w.Pre == "":
		pre = -1
	default:
		pre = cmp.Compare(v.Pre, w.Pre)
	}
	return cmp.Or(cmp.Compare(v.Major, w.Major), cmp.Compare(v.Minor, w.Minor), cmp.Compare(v.Patch, w.Patch), pre)
}

// Skew says whether a node of this version may join a cluster whose servers have
// another one (Kubernetes' version skew policy): an agent may be up to three
// minor versions older and not newer, a server one newer or older. The result
// is nil or a *fault.Error.
func Skew(role v1alpha1.NodeRole, node, cluster Version) error {
	behind := cluster.Minor - node.Minor
	switch {
	case node.Major != cluster.Major:
	case role == v1alpha1.RoleServer && behind >= -1 && behind <= 1:
		return nil
	case role == v1alpha1.RoleAgent && behind >= 0 && behind <= 3:
		return nil
	}
	allowed := "an agent may be up to three minor versions older, and not newer"
	if role == v1alpha1.RoleServer {
		allowed = "servers may be one minor version apart"
	}
	return fault.New(CodeSkew, nil, remedySkew, "this machine has k3s %s and the cluster %s; %s", node, cluster, allowed)
}
