package nodeconfig

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"strings"

	"go.yaml.in/yaml/v3"
)

// Format is how a configuration is printed.
type Format string

// Formats.
const (
	FormatYAML Format = "yaml"
	FormatJSON Format = "json"
)

// ErrFormat says that a format is not known.
var ErrFormat = errors.New("the format must be yaml or json")

// Dump prints the whole configuration, in a form that Resolve reads again to
// the same effect. With origins, YAML gets a comment after each value that
// says where it came from, and JSON becomes an object of "config" and
// "origins", the latter by the values' paths.
//
// A configuration that Resolve accepted holds no credentials. What still looks
// like one is not shown.
func Dump(w io.Writer, r Resolved, format Format, origins bool) error {
	switch format {
	case FormatYAML:
		encoder := yaml.NewEncoder(w)
		encoder.SetIndent(2)
		if err := encoder.Encode(r.tree.yaml(origins)); err != nil {
			return err
		}
		return encoder.Close()
	case FormatJSON:
		encoder := json.NewEncoder(w)
		encoder.SetEscapeHTML(false)
		encoder.SetIndent("", "  ")
		if !origins {
			return encoder.Encode(r.tree.redacted().plain())
		}
		return encoder.Encode(map[string]any{"config": r.tree.redacted().plain(), "origins": r.Origins})
	}
	return ErrFormat
}

// yaml is the value as the encoder takes it.
func (n *node) yaml(origins bool) *yaml.Node {
	y := &yaml.Node{}
	switch n.kind {
	case mapping:
		y.Kind, y.Tag = yaml.MappingNode, "!!map"
		for _, f := range n.fields {
			key := &yaml.Node{}
			key.SetString(f.key)
			y.Content = append(y.Content, key, f.value.yaml(origins))
		}
		if len(n.fields) == 0 {
			y.Style = yaml.FlowStyle
		}
	case list:
		y.Kind, y.Tag = yaml.SequenceNode, "!!seq"
		for _, item := range n.items {
			y.Content = append(y.Content, item.yaml(origins))
		}
		if len(n.items) == 0 {
			y.Style = yaml.FlowStyle
		}
	default:
		value := n.value
		if s, ok := value.(string); ok {
			y.SetString(Redact(s))
		} else if err := y.Encode(value); err != nil {
			y.SetString("")
		}
	}
	if origins && len(y.Content) == 0 {
		y.LineComment = "from " + n.origin.String()
	}
	return y
}

func (n *node) redacted() *node {
	out := *n
	out.fields = append([]field(nil), n.fields...)
	out.items = append([]*node(nil), n.items...)
	for i := range out.fields {
		out.fields[i].value = out.fields[i].value.redacted()
	}
	for i := range out.items {
		out.items[i] = out.items[i].redacted()
	}
	if s, ok := out.value.(string); ok {
		out.value = Redact(s)
	}
	return &out
}

// CheckOptions are those of Check.
type CheckOptions struct {
	Sources Sources
	// Format is how the result is printed: FormatJSON, or sentences.
	Format Format
}

// CheckResult is what Check prints as JSON.
type CheckResult struct {
	// Valid says whether a machine could be started with it.
	Valid bool `json:"valid"`
	// Role and Pool are what the machine would become; empty when not valid.
	Role string `json:"role,omitempty"`
	Pool string `json:"pool,omitempty"`
	// Problems say what is wrong.
	Problems []Problem `json:"problems,omitempty"`
	// OfManifest are the artifacts that the signed list must have for this machine;
	// a check does not read it.
	OfManifest []string `json:"ofManifest,omitempty"`
	// Notes say what was read and not used.
	Notes []string `json:"notes,omitempty"`
}

// Check prints whether the sources are a valid configuration. Its error is
// that of Resolve, when they are not, or of writing.
func Check(ctx context.Context, w io.Writer, o CheckOptions) error {
	r, err := Resolve(ctx, o.Sources)
	var invalid *Invalid
	if err != nil && !errors.As(err, &invalid) {
		return err
	}
	result := CheckResult{Valid: err == nil, Notes: r.Notes}
	if invalid != nil {
		result.Problems, result.Notes = invalid.Problems, invalid.Notes
	} else {
		result.Role, result.Pool = string(r.Config.Spec.Role), string(r.Config.Spec.Pool)
		result.OfManifest = ofManifest(r)
	}
	if o.Format == FormatJSON {
		encoder := json.NewEncoder(w)
		encoder.SetEscapeHTML(false)
		encoder.SetIndent("", "  ")
		return errors.Join(err, encoder.Encode(result))
	}
	p := printer{w: w}
	if result.Valid {
		p.printf("valid: role %s, pool %s\n", result.Role, result.Pool)
		if len(result.OfManifest) > 0 {
			p.printf("spec.artifacts.manifest must have %s, which is seen when it is read\n", strings.Join(result.OfManifest, ", "))
		}
	}
	for _, problem := range result.Problems {
		p.printf("%s\n", problem)
	}
	for _, note := range result.Notes {
		p.printf("note: %s\n", note)
	}
	return errors.Join(err, p.err)
}

type printer struct {
	w   io.Writer
	err error
}

func (p *printer) printf(format string, args ...any) {
	if p.err == nil {
		_, p.err = fmt.Fprintf(p.w, format, args...)
	}
}

// DumpOptions are those of DumpSources.
type DumpOptions struct {
	Sources Sources
	Format  Format
	// Origins adds where each value came from.
	Origins bool
}

// DumpSources resolves the sources and prints the result.
func DumpSources(ctx context.Context, w io.Writer, o DumpOptions) error {
	if o.Format != FormatYAML && o.Format != FormatJSON {
		return ErrFormat
	}
	r, err := Resolve(ctx, o.Sources)
	if err != nil {
		return err
	}
	return Dump(w, r, o.Format, o.Origins)
}
