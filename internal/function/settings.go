package function

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"slices"
	"strings"
	"unicode/utf8"

	"github.com/hearth-sh/hearth/api/v1alpha1"
)

// maxEnvNameBytes bounds one environment variable's name. It keeps names
// printable in errors; their sum is bounded by v1alpha1.MaxEnvBytes anyway.
const maxEnvNameBytes = 256

// Secrets are environment variables whose values are never shown. Every way
// of printing them that the standard library knows shows names only; whoever
// needs the values ranges over the map.
type Secrets map[string]string

// Names returns the names, sorted.
func (s Secrets) Names() []string { return slices.Sorted(maps.Keys(s)) }

// String lists the names.
func (s Secrets) String() string { return "secrets[" + strings.Join(s.Names(), " ") + "]" }

// GoString is String, so that %#v shows no values either.
func (s Secrets) GoString() string { return s.String() }

// Format writes String for every verb: without it %x or %q would print values.
func (s Secrets) Format(f fmt.State, _ rune) { _, _ = io.WriteString(f, s.String()) }

// LogValue lists the names.
func (s Secrets) LogValue() slog.Value { return slog.StringValue(s.String()) }

// MarshalJSON writes a sorted list of the names.
func (s Secrets) MarshalJSON() ([]byte, error) {
	names := s.Names()
	if names == nil {
		names = []string{}
	}
	return json.Marshal(names)
}

// Settings are the settings of one revision, secret values included. As JSON
// and in logs they show the names of secrets only.
type Settings struct {
	// MemoryMiB caps the guest's linear memory, TimeoutMS is one request's
	// deadline, Concurrency how many requests run at once. See the limits in
	// package v1alpha1.
	MemoryMiB   int               `json:"memoryMiB"`
	TimeoutMS   int               `json:"timeoutMs"`
	Concurrency int               `json:"concurrency"`
	Env         map[string]string `json:"env,omitempty"`
	Secrets     Secrets           `json:"secrets,omitempty"`
	// Runtime is what runs the function; empty means resident.
	Runtime v1alpha1.FunctionRuntime `json:"runtime,omitempty"`
	// Host is an additional DNS name, Routes the paths of it that reach the
	// function (none: "/").
	Host   string   `json:"host,omitempty"`
	Routes []string `json:"routes,omitempty"`
	// Placement is for resident functions only, Autoscaling for spin only.
	Placement   *v1alpha1.FunctionPlacement   `json:"placement,omitempty"`
	Autoscaling *v1alpha1.FunctionAutoscaling `json:"autoscaling,omitempty"`
}

// TimeoutIgnored is what the owner of a function with a deadline of its own is
// told where its runtime knows none; nil: nothing. timeoutMS may be 0, the
// default. It is no error: a function keeps its settings while it moves from
// one runtime to the other and back.
func TimeoutIgnored(runtime v1alpha1.FunctionRuntime, timeoutMS int) *v1alpha1.FunctionError {
	if runtime != v1alpha1.RuntimeSpin || timeoutMS == 0 || timeoutMS == v1alpha1.DefaultTimeoutMS {
		return nil
	}
	return &v1alpha1.FunctionError{
		Code:   "timeout-ignored",
		Detail: fmt.Sprintf("the deadline of %d ms is not kept: Spin has none for a request; set the ingress controller's, or use the runtime resident", timeoutMS),
	}
}

// DefaultSettings are those of a function submitted without any.
func DefaultSettings() Settings {
	return Settings{
		MemoryMiB:   v1alpha1.DefaultMemoryMiB,
		TimeoutMS:   v1alpha1.DefaultTimeoutMS,
		Concurrency: v1alpha1.DefaultConcurrency,
	}
}

// Public returns the settings as the API shows them, without secret values.
func (s Settings) Public() v1alpha1.Settings {
	return v1alpha1.Settings{
		MemoryMiB:   s.MemoryMiB,
		TimeoutMS:   s.TimeoutMS,
		Concurrency: s.Concurrency,
		Env:         maps.Clone(s.Env),
		SecretNames: s.Secrets.Names(),
		Runtime:     s.Runtime,
		Host:        s.Host,
		Routes:      slices.Clone(s.Routes),
		Placement:   clonePlacement(s.Placement),
		Autoscaling: clonePointer(s.Autoscaling),
	}
}

// Equal says whether neither a guest nor who calls it could tell s from t.
func (s Settings) Equal(t Settings) bool {
	return s.MemoryMiB == t.MemoryMiB && s.TimeoutMS == t.TimeoutMS && s.Concurrency == t.Concurrency &&
		maps.Equal(s.Env, t.Env) && maps.Equal(s.Secrets, t.Secrets) &&
		s.Spin() == t.Spin() && s.Host == t.Host && slices.Equal(s.Routes, t.Routes) &&
		maps.Equal(s.nodeSelector(), t.nodeSelector()) && s.autoscaling() == t.autoscaling()
}

// Validate checks every limit and returns a *ValidationError for the first
// that does not hold.
func (s Settings) Validate() error {
	for _, n := range []struct {
		field       string
		v, min, max int
		unit        string
	}{
		{"memoryMiB", s.MemoryMiB, v1alpha1.MinMemoryMiB, v1alpha1.MaxMemoryMiB, " MiB"},
		{"timeoutMs", s.TimeoutMS, v1alpha1.MinTimeoutMS, v1alpha1.MaxTimeoutMS, " ms"},
		{"concurrency", s.Concurrency, v1alpha1.MinConcurrency, v1alpha1.MaxConcurrency, ""},
	} {
		if n.v < n.min || n.v > n.max {
			return &ValidationError{Field: n.field, Reason: fmt.Sprintf("must be from %d to %d%s, is %d", n.min, n.max, n.unit, n.v)}
		}
	}
	total := 0
	for _, group := range []struct {
		field string
		vars  map[string]string
	}{{"env", s.Env}, {"secrets", s.Secrets}} {
		for _, name := range slices.Sorted(maps.Keys(group.vars)) {
			value := group.vars[name]
			if reason := envNameProblem(name); reason != "" {
				return &ValidationError{Field: group.field, Reason: fmt.Sprintf("has the name %.40q, which %s", name, reason)}
			}
			switch {
			case strings.ContainsRune(value, 0):
				return &ValidationError{Field: group.field + "." + name, Reason: "must not contain a NUL character"}
			case !utf8.ValidString(value):
				return &ValidationError{Field: group.field + "." + name, Reason: "must be valid UTF-8"}
			}
			total += len(name) + len(value)
		}
	}
	if total > v1alpha1.MaxEnvBytes {
		return &ValidationError{Field: "env", Reason: fmt.Sprintf("and secrets together must be at most %d bytes, are %d", v1alpha1.MaxEnvBytes, total)}
	}
	for _, name := range slices.Sorted(maps.Keys(s.Env)) {
		if _, both := s.Secrets[name]; both {
			return &ValidationError{Field: "env." + name, Reason: "is also a secret; remove one of the two by setting it to null"}
		}
	}
	if err := s.validateExposure(); err != nil {
		return err
	}
	return s.spinProblem()
}

func envNameProblem(name string) string {
	switch {
	case name == "":
		return "is empty"
	case len(name) > maxEnvNameBytes:
		return fmt.Sprintf("is longer than %d characters", maxEnvNameBytes)
	case name[0] >= '0' && name[0] <= '9':
		return "begins with a digit"
	}
	for _, c := range []byte(name) {
		if (c < 'a' || c > 'z') && (c < 'A' || c > 'Z') && (c < '0' || c > '9') && c != '_' {
			return "is not made of letters, digits and underscores"
		}
	}
	return ""
}

// Patch is a change of settings with the meaning of a JSON merge patch (RFC
// 7396): what it does not name stays, null removes (a number goes back to its
// default). The zero Patch changes nothing. It has no methods that print it:
// it carries secret values.
type Patch struct {
	memoryMiB, timeoutMS, concurrency *int
	env, secrets                      mapPatch
	exposure                          exposurePatch
}

type mapPatch struct {
	// clear drops what was there (the member was null).
	clear bool
	set   map[string]string
	drop  []string
}

// SetMemoryMiB, SetTimeoutMS and SetConcurrency add one number to the patch.
func (p *Patch) SetMemoryMiB(n int)   { p.memoryMiB = &n }
func (p *Patch) SetTimeoutMS(n int)   { p.timeoutMS = &n }
func (p *Patch) SetConcurrency(n int) { p.concurrency = &n }

// String says nothing of the contents, which may be secret.
func (p Patch) String() string { return "settings patch" }

// GoString is String.
func (p Patch) GoString() string { return p.String() }

// Format writes String for every verb.
func (p Patch) Format(f fmt.State, _ rune) { _, _ = io.WriteString(f, p.String()) }

// Apply returns s changed by the patch, without checking limits.
func (p Patch) Apply(s Settings) Settings {
	for _, n := range []struct{ dst, src *int }{
		{&s.MemoryMiB, p.memoryMiB}, {&s.TimeoutMS, p.timeoutMS}, {&s.Concurrency, p.concurrency},
	} {
		if n.src != nil {
			*n.dst = *n.src
		}
	}
	s.Env = p.env.apply(s.Env)
	s.Secrets = p.secrets.apply(s.Secrets)
	return p.exposure.apply(s)
}

func (p mapPatch) apply(m map[string]string) map[string]string {
	if !p.clear && len(p.set) == 0 && len(p.drop) == 0 {
		return m
	}
	out := map[string]string{}
	if !p.clear {
		maps.Copy(out, m)
	}
	for _, name := range p.drop {
		delete(out, name)
	}
	maps.Copy(out, p.set)
	if len(out) == 0 {
		return nil
	}
	return out
}

// ParsePatch reads a settings document: an object with the members memoryMiB,
// timeoutMs, concurrency, env and secrets (the latter two objects of name to
// value), runtime, host, routes (a list), placement (an object with the member
// nodeSelector, an object of label to value) and autoscaling (an object with
// the members autoscaler, minReplicas, maxReplicas and targetCPUPercent).
// Unknown members, members given twice and values of the wrong type
// are a *ValidationError naming them; errors never quote a value. The caller
// bounds the input's size.
func ParsePatch(data []byte) (Patch, error) {
	var p Patch
	members, err := objectMembers("settings", data)
	if err != nil {
		return p, err
	}
	for _, m := range members {
		switch m.name {
		case "memoryMiB":
			p.memoryMiB, err = patchInt(m, v1alpha1.DefaultMemoryMiB)
		case "timeoutMs":
			p.timeoutMS, err = patchInt(m, v1alpha1.DefaultTimeoutMS)
		case "concurrency":
			p.concurrency, err = patchInt(m, v1alpha1.DefaultConcurrency)
		case "env":
			p.env, err = patchMap(m)
		case "secrets":
			p.secrets, err = patchMap(m)
		default:
			var known bool
			if known, err = p.exposure.member(m); !known {
				err = &ValidationError{
					Field: fmt.Sprintf("settings member %.60q", m.name),
					Reason: "is not known; known are memoryMiB, timeoutMs, concurrency, env, secrets, " +
						"runtime, host, routes, placement and autoscaling",
				}
			}
		}
		if err != nil {
			return Patch{}, err
		}
	}
	return p, nil
}

type member struct {
	name  string
	value json.RawMessage
}

// objectMembers splits a JSON object. encoding/json alone would let the last
// of two equal members win and match names whatever their case.
func objectMembers(field string, data []byte) ([]member, error) {
	notObject := &ValidationError{Field: field, Reason: "must be a JSON object"}
	d := json.NewDecoder(bytes.NewReader(data))
	if t, err := d.Token(); err != nil || t != json.Delim('{') {
		return nil, notObject
	}
	var members []member
	seen := map[string]bool{}
	for d.More() {
		t, err := d.Token()
		name, isName := t.(string)
		if err != nil || !isName {
			return nil, notObject
		}
		if seen[name] {
			return nil, &ValidationError{Field: fmt.Sprintf("%s member %.60q", field, name), Reason: "is given twice"}
		}
		seen[name] = true
		var value json.RawMessage
		if err := d.Decode(&value); err != nil {
			return nil, notObject
		}
		members = append(members, member{name, value})
	}
	if t, err := d.Token(); err != nil || t != json.Delim('}') {
		return nil, notObject
	}
	if _, err := d.Token(); err != io.EOF {
		return nil, &ValidationError{Field: field, Reason: "must be one JSON object with nothing after it"}
	}
	return members, nil
}

func isNull(raw json.RawMessage) bool { return string(raw) == "null" }

func patchInt(m member, def int) (*int, error) {
	if isNull(m.value) {
		return &def, nil
	}
	var n int
	if err := json.Unmarshal(m.value, &n); err != nil {
		return nil, &ValidationError{Field: m.name, Reason: "must be a whole number"}
	}
	return &n, nil
}

func patchMap(m member) (mapPatch, error) {
	if isNull(m.value) {
		return mapPatch{clear: true}, nil
	}
	if m.value[0] != '{' {
		return mapPatch{}, &ValidationError{Field: m.name, Reason: "must be an object of name to value"}
	}
	members, err := objectMembers(m.name, m.value)
	if err != nil {
		return mapPatch{}, err
	}
	p := mapPatch{set: map[string]string{}}
	for _, v := range members {
		if isNull(v.value) {
			p.drop = append(p.drop, v.name)
			continue
		}
		var s string
		if err := json.Unmarshal(v.value, &s); err != nil {
			return mapPatch{}, &ValidationError{Field: fmt.Sprintf("%s.%.60s", m.name, v.name), Reason: "must be a string (or null, which removes it)"}
		}
		p.set[v.name] = s
	}
	return p, nil
}
