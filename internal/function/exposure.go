package function

import (
	"encoding/json"
	"fmt"
	"maps"
	"regexp"
	"slices"
	"strings"

	"github.com/hearth-sh/hearth/api/v1alpha1"
)

// This file holds the settings that say what runs a function, where, and
// under which further names: what a guest itself never sees.

// maxHostBytes is the length of a DNS name (RFC 1035, section 2.3.4).
const maxHostBytes = 253

var (
	// hostPattern is RFC 1123's host name in lower case, at least two labels,
	// without a trailing dot.
	hostPattern = regexp.MustCompile(`^[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?(\.[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?)+$`)
	// routePattern is RFC 3986's absolute path without empty segments.
	routePattern = regexp.MustCompile(`^/([-A-Za-z0-9._~!$&'()*+,;=:@%]+(/[-A-Za-z0-9._~!$&'()*+,;=:@%]+)*)?$`)
	// A label's key and value, as Kubernetes has them on nodes.
	labelKeyPattern   = regexp.MustCompile(`^([a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?/)?[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?$`)
	labelValuePattern = regexp.MustCompile(`^([A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?)?$`)
)

// Spin says whether the function has pods of its own under
// containerd-shim-spin. Otherwise the resident engine runs it.
func (s Settings) Spin() bool { return s.Runtime == v1alpha1.RuntimeSpin }

func (s Settings) nodeSelector() map[string]string {
	if s.Placement == nil {
		return nil
	}
	return s.Placement.NodeSelector
}

func (s Settings) autoscaling() v1alpha1.FunctionAutoscaling {
	if s.Autoscaling == nil {
		return v1alpha1.FunctionAutoscaling{}
	}
	return *s.Autoscaling
}

func clonePlacement(p *v1alpha1.FunctionPlacement) *v1alpha1.FunctionPlacement {
	if p == nil {
		return nil
	}
	return &v1alpha1.FunctionPlacement{NodeSelector: maps.Clone(p.NodeSelector)}
}

func clonePointer[T any](p *T) *T {
	if p == nil {
		return nil
	}
	c := *p
	return &c
}

func (s Settings) validateExposure() error {
	bad := func(field, format string, args ...any) error {
		return &ValidationError{Field: field, Reason: fmt.Sprintf(format, args...)}
	}
	switch s.Runtime {
	case "", v1alpha1.RuntimeResident, v1alpha1.RuntimeSpin:
	default:
		return bad("runtime", "must be resident or spin, is %.40q", string(s.Runtime))
	}
	if s.Host != "" && (len(s.Host) > maxHostBytes || !hostPattern.MatchString(s.Host)) {
		return bad("host", "must be a DNS name in lower case with at least two labels, such as hello.example.com")
	}
	switch {
	case len(s.Routes) > v1alpha1.MaxRoutes:
		return bad("routes", "must be at most %d, are %d", v1alpha1.MaxRoutes, len(s.Routes))
	case len(s.Routes) > 0 && s.Host == "":
		return bad("routes", "are paths of host; set host too, or remove them by setting them to null")
	}
	for i, r := range s.Routes {
		switch {
		case len(r) > v1alpha1.MaxRouteBytes || !routePattern.MatchString(r):
			return bad("routes", "must be paths such as / or /api/v1, beginning with a slash and not ending with one, of at most %d characters; %.60q is not", v1alpha1.MaxRouteBytes, r)
		case slices.Contains(strings.Split(r, "/"), "..") || slices.Contains(strings.Split(r, "/"), "."):
			return bad("routes", `must not contain "." or ".." as a segment; %.60q does`, r)
		case slices.Contains(s.Routes[:i], r):
			return bad("routes", "name %.60q twice", r)
		}
	}
	if err := s.validatePlacement(bad); err != nil {
		return err
	}
	return s.validateAutoscaling(bad)
}

func (s Settings) validatePlacement(bad func(field, format string, args ...any) error) error {
	if s.Placement == nil {
		return nil
	}
	if s.Spin() {
		return bad("placement", "is for resident functions only; remove it by setting it to null")
	}
	if n := len(s.Placement.NodeSelector); n > v1alpha1.MaxNodeSelector {
		return bad("placement", "must name at most %d labels, names %d", v1alpha1.MaxNodeSelector, n)
	}
	for _, key := range slices.Sorted(maps.Keys(s.Placement.NodeSelector)) {
		if !labelKeyPattern.MatchString(key) {
			return bad("placement", "has the node label %.60q, which is none: a label is a name of at most 63 characters, with or without a DNS prefix and a slash", key)
		}
		if !labelValuePattern.MatchString(s.Placement.NodeSelector[key]) {
			return bad("placement", "gives node label %.60q a value that none can have: at most 63 letters, digits, dots, underscores and hyphens", key)
		}
	}
	return nil
}

func (s Settings) validateAutoscaling(bad func(field, format string, args ...any) error) error {
	if s.Autoscaling == nil {
		return nil
	}
	a := *s.Autoscaling
	if !s.Spin() {
		return bad("autoscaling", "is for spin functions only (resident ones scale to zero by themselves); remove it by setting it to null")
	}
	switch a.Autoscaler {
	case "", v1alpha1.AutoscalerNone, v1alpha1.AutoscalerHPA, v1alpha1.AutoscalerKEDA:
	default:
		return bad("autoscaling.autoscaler", "must be none, hpa or keda, is %.40q", string(a.Autoscaler))
	}
	least := a.MinReplicas
	if least == 0 {
		least = v1alpha1.DefaultMinReplicas
	}
	switch {
	case a.MinReplicas < 0 || a.MinReplicas > v1alpha1.MaxReplicas:
		return bad("autoscaling.minReplicas", "must be from 1 to %d, is %d", v1alpha1.MaxReplicas, a.MinReplicas)
	case a.MaxReplicas < 0 || a.MaxReplicas > v1alpha1.MaxReplicas:
		return bad("autoscaling.maxReplicas", "must be from 1 to %d, is %d", v1alpha1.MaxReplicas, a.MaxReplicas)
	case a.MaxReplicas != 0 && a.MaxReplicas < least:
		return bad("autoscaling.maxReplicas", "must be at least minReplicas (%d), is %d", least, a.MaxReplicas)
	case a.MaxReplicas == 0 && a.Autoscaler != "" && a.Autoscaler != v1alpha1.AutoscalerNone:
		return bad("autoscaling.maxReplicas", "must be set where an autoscaler decides")
	case a.TargetCPUPercent < 0 || a.TargetCPUPercent > v1alpha1.MaxTargetCPUPercent:
		return bad("autoscaling.targetCPUPercent", "must be from 1 to %d, is %d", v1alpha1.MaxTargetCPUPercent, a.TargetCPUPercent)
	}
	return nil
}

// exposurePatch is the part of a Patch that is about this file's settings.
type exposurePatch struct {
	runtime *v1alpha1.FunctionRuntime
	host    *string
	// routes are replaced whole: a merge patch does not merge lists.
	routes       *[]string
	nodeSelector mapPatch
	// noAutoscaling drops what was there before autoscaling is applied.
	noAutoscaling bool
	autoscaling   []func(*v1alpha1.FunctionAutoscaling)
}

// member takes in one member of a settings document; known is false if it is
// not of this part.
func (p *exposurePatch) member(m member) (known bool, err error) {
	switch m.name {
	case "runtime":
		var s string
		if s, err = patchString(m); err == nil {
			// Resident is the default and has one spelling in what is recorded.
			runtime := v1alpha1.FunctionRuntime(s)
			if runtime == v1alpha1.RuntimeResident {
				runtime = ""
			}
			p.runtime = &runtime
		}
	case "host":
		var s string
		if s, err = patchString(m); err == nil {
			p.host = &s
		}
	case "routes":
		var list []string
		if !isNull(m.value) {
			var items []*string
			if json.Unmarshal(m.value, &items) != nil || slices.Contains(items, nil) {
				return true, &ValidationError{Field: m.name, Reason: "must be a list of paths (or null, which removes them)"}
			}
			for _, i := range items {
				list = append(list, *i)
			}
		}
		p.routes = &list
	case "placement":
		err = p.placement(m)
	case "autoscaling":
		err = p.scaling(m)
	default:
		return false, nil
	}
	return true, err
}

func (p *exposurePatch) placement(m member) error {
	if isNull(m.value) {
		p.nodeSelector = mapPatch{clear: true}
		return nil
	}
	members, err := objectMembers(m.name, m.value)
	if err != nil {
		return err
	}
	for _, v := range members {
		if v.name != "nodeSelector" {
			return &ValidationError{Field: fmt.Sprintf("placement member %.60q", v.name), Reason: "is not known; known is nodeSelector"}
		}
		if p.nodeSelector, err = patchMap(member{"placement.nodeSelector", v.value}); err != nil {
			return err
		}
	}
	return nil
}

func (p *exposurePatch) scaling(m member) error {
	if isNull(m.value) {
		p.noAutoscaling = true
		return nil
	}
	members, err := objectMembers(m.name, m.value)
	if err != nil {
		return err
	}
	for _, v := range members {
		qualified := member{"autoscaling." + v.name, v.value}
		var number func(*v1alpha1.FunctionAutoscaling) *int
		switch v.name {
		case "autoscaler":
			s, err := patchString(qualified)
			if err != nil {
				return err
			}
			p.autoscaling = append(p.autoscaling, func(a *v1alpha1.FunctionAutoscaling) { a.Autoscaler = v1alpha1.Autoscaler(s) })
			continue
		case "minReplicas":
			number = func(a *v1alpha1.FunctionAutoscaling) *int { return &a.MinReplicas }
		case "maxReplicas":
			number = func(a *v1alpha1.FunctionAutoscaling) *int { return &a.MaxReplicas }
		case "targetCPUPercent":
			number = func(a *v1alpha1.FunctionAutoscaling) *int { return &a.TargetCPUPercent }
		default:
			return &ValidationError{
				Field:  fmt.Sprintf("autoscaling member %.60q", v.name),
				Reason: "is not known; known are autoscaler, minReplicas, maxReplicas and targetCPUPercent",
			}
		}
		n, err := patchInt(qualified, 0)
		if err != nil {
			return err
		}
		p.autoscaling = append(p.autoscaling, func(a *v1alpha1.FunctionAutoscaling) { *number(a) = *n })
	}
	return nil
}

func (p exposurePatch) apply(s Settings) Settings {
	if p.runtime != nil {
		s.Runtime = *p.runtime
	}
	if p.host != nil {
		s.Host = *p.host
	}
	if p.routes != nil {
		s.Routes = slices.Clone(*p.routes)
	}
	if selector := p.nodeSelector.apply(s.nodeSelector()); len(selector) > 0 {
		s.Placement = &v1alpha1.FunctionPlacement{NodeSelector: selector}
	} else {
		s.Placement = nil
	}
	if p.noAutoscaling || len(p.autoscaling) > 0 {
		a := s.autoscaling()
		if p.noAutoscaling {
			a = v1alpha1.FunctionAutoscaling{}
		}
		for _, change := range p.autoscaling {
			change(&a)
		}
		s.Autoscaling = nil
		if a != (v1alpha1.FunctionAutoscaling{}) {
			s.Autoscaling = &a
		}
	}
	return s
}

// SetRuntime, SetHost and SetRoutes add one setting to the patch; the zero
// value goes back to the default.
func (p *Patch) SetRuntime(r v1alpha1.FunctionRuntime) {
	if r == v1alpha1.RuntimeResident {
		r = ""
	}
	p.exposure.runtime = &r
}

// SetHost sets the additional DNS name.
func (p *Patch) SetHost(host string) { p.exposure.host = &host }

// SetRoutes sets the paths of the additional DNS name.
func (p *Patch) SetRoutes(routes []string) {
	routes = slices.Clone(routes)
	p.exposure.routes = &routes
}

func patchString(m member) (string, error) {
	if isNull(m.value) {
		return "", nil
	}
	var s string
	if err := json.Unmarshal(m.value, &s); err != nil {
		return "", &ValidationError{Field: m.name, Reason: "must be a string (or null, which goes back to the default)"}
	}
	return s, nil
}
