package nodeconfig

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"math"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"unicode/utf8"

	"go.yaml.in/yaml/v3"
)

type nodeKind uint8

const (
	scalar nodeKind = iota
	mapping
	list
)

// node is a value of a document with where it came from. Nodes are not changed
// once they are part of a tree; layers share them.
type node struct {
	kind   nodeKind
	origin Origin
	fields []field // mapping, in the order they were written
	items  []*node // list
	value  any     // scalar: nil, bool, int64, float64 or string
}

type field struct {
	key    string
	origin Origin
	value  *node
}

func (n *node) get(key string) *node {
	if n == nil {
		return nil
	}
	for _, f := range n.fields {
		if f.key == key {
			return f.value
		}
	}
	return nil
}

// at follows keys of mappings.
func (n *node) at(keys ...string) *node {
	for _, key := range keys {
		n = n.get(key)
	}
	return n
}

func (n *node) text() string {
	if n == nil {
		return ""
	}
	s, _ := n.value.(string)
	return s
}

// with returns the mapping with the value at the path of keys, which replaces
// what was there.
func (n *node) with(value *node, keys ...string) *node {
	if len(keys) == 0 {
		return value
	}
	out := &node{kind: mapping, origin: value.origin}
	if n != nil && n.kind == mapping {
		out.origin, out.fields = n.origin, slices.Clone(n.fields)
	}
	first := keys[0]
	child := field{first, value.origin, n.get(first).with(value, keys[1:]...)}
	for i := range out.fields {
		if out.fields[i].key == first {
			out.fields[i] = child
			return out
		}
	}
	out.fields = append(out.fields, child)
	return out
}

// plain is the value as encoding/json would decode it.
func (n *node) plain() any {
	switch n.kind {
	case mapping:
		m := make(map[string]any, len(n.fields))
		for _, f := range n.fields {
			m[f.key] = f.value.plain()
		}
		return m
	case list:
		l := make([]any, len(n.items))
		for i, item := range n.items {
			l[i] = item.plain()
		}
		return l
	}
	return n.value
}

var plainKey = regexp.MustCompile(`^[A-Za-z_][A-Za-z0-9_-]*$`)

func joinKey(path, key string) string {
	switch {
	case !plainKey.MatchString(key):
		return path + "[" + strconv.Quote(shorten(key)) + "]"
	case path == "":
		return key
	}
	return path + "." + key
}

func joinIndex(path string, i int) string { return fmt.Sprintf("%s[%d]", path, i) }

// shorten keeps messages readable whatever was written.
func shorten(s string) string {
	const most = 80
	if len(s) <= most {
		return s
	}
	cut := most
	for cut > 0 && !utf8.RuneStart(s[cut]) {
		cut--
	}
	return s[:cut] + "…"
}

// parseYAML reads the documents of one source. Empty ones are left out. What
// it cannot read becomes a problem, and it returns what came before.
func parseYAML(text []byte, origin Origin, ps *problems) []*node {
	if !utf8.Valid(text) {
		ps.addf(origin, "", "it is not UTF-8 text")
		return nil
	}
	if len(text) > MaxDocumentBytes {
		ps.addf(origin, "", "it has %d bytes; at most %d are allowed", len(text), MaxDocumentBytes)
		return nil
	}
	var out []*node
	decoder := yaml.NewDecoder(bytes.NewReader(text))
	budget := MaxNodes
	for documents := 0; ; documents++ {
		var document yaml.Node
		err := decoder.Decode(&document)
		if errors.Is(err, io.EOF) {
			return out
		}
		if err != nil {
			message, line := yamlError(err)
			o := origin
			o.Line = line
			ps.addf(o, "", "it is not YAML: %s", message)
			return out
		}
		if documents >= MaxDocuments {
			ps.addf(origin, "", "it has more than %d documents", MaxDocuments)
			return out
		}
		c := converter{origin: origin, ps: ps, budget: &budget}
		root := &document
		if root.Kind == yaml.DocumentNode && len(root.Content) == 1 {
			root = root.Content[0]
		}
		n, ok := c.convert(root, "", 0)
		if !ok {
			return out
		}
		if n == nil || n.kind == scalar && n.value == nil {
			continue
		}
		out = append(out, n)
	}
}

var yamlErrorLine = regexp.MustCompile(`^yaml: (?:line (\d+): )?`)

// yamlError takes the line out of the parser's message.
func yamlError(err error) (message string, line int) {
	message = err.Error()
	if m := yamlErrorLine.FindStringSubmatch(message); m != nil {
		message = message[len(m[0]):]
		line, _ = strconv.Atoi(m[1])
	}
	// The parser counts lines from 0, its scanner from 1, and the messages do
	// not say which of them speaks. The parser's all begin with these words.
	if strings.HasPrefix(message, "did not find expected") {
		line++
	}
	return shorten(Redact(message)), line
}

type converter struct {
	origin Origin
	ps     *problems
	budget *int
}

// convert follows aliases, so that a small text can become a large tree: the
// budget and the depth bound it. It returns false when it gave up, and nil for
// a value that it left out.
func (c *converter) convert(y *yaml.Node, path string, depth int) (*node, bool) {
	n := &node{origin: c.origin}
	n.origin.Line = y.Line
	if depth > MaxDepth {
		c.ps.addf(n.origin, "", "values nest deeper than %d levels", MaxDepth)
		return nil, false
	}
	if *c.budget--; *c.budget < 0 {
		c.ps.addf(n.origin, "", "it has more than %d values, aliases followed", MaxNodes)
		return nil, false
	}
	switch y.Kind {
	case yaml.AliasNode:
		return c.convert(y.Alias, path, depth+1)
	case yaml.MappingNode:
		n.kind = mapping
		seen := make(map[string]int, len(y.Content)/2)
		for i := 0; i+1 < len(y.Content); i += 2 {
			k, v := y.Content[i], y.Content[i+1]
			o := c.origin
			o.Line = k.Line
			key, ok := c.key(k, o, path)
			if !ok {
				continue
			}
			at := joinKey(path, key)
			value, ok := c.convert(v, at, depth+1)
			if !ok {
				return nil, false
			}
			if line, twice := seen[key]; twice {
				c.ps.addf(o, at, "the key is there twice, the first time in line %d; remove one", line)
				continue
			}
			seen[key] = k.Line
			if value == nil {
				continue
			}
			n.fields = append(n.fields, field{key, o, value})
		}
		return n, true
	case yaml.SequenceNode:
		n.kind = list
		for i, item := range y.Content {
			value, ok := c.convert(item, joinIndex(path, i), depth+1)
			if !ok {
				return nil, false
			}
			if value != nil {
				n.items = append(n.items, value)
			}
		}
		return n, true
	case yaml.ScalarNode:
		var err error
		if n.value, err = scalarValue(y); err != nil {
			c.ps.addf(n.origin, path, "%v", err)
			return nil, true
		}
		return n, true
	}
	return n, true // an empty document
}

func (c *converter) key(k *yaml.Node, o Origin, path string) (string, bool) {
	for k.Kind == yaml.AliasNode {
		k = k.Alias
	}
	switch {
	case k.Kind != yaml.ScalarNode:
		c.ps.addf(o, path, "a key must be text, not a list or map")
	case k.ShortTag() == "!!merge":
		c.ps.addf(o, path, `merge keys ("<<") are not supported; write the fields out`)
	case k.ShortTag() != "!!str":
		c.ps.addf(o, path, "the key %s must be text; put it in quotes", shorten(k.Value))
	default:
		return k.Value, true
	}
	return "", false
}

func scalarValue(y *yaml.Node) (any, error) {
	switch tag := y.ShortTag(); tag {
	case "!!null":
		return nil, nil
	case "!!str":
		return y.Value, nil
	case "!!timestamp":
		return y.Value, nil // text that happens to look like a date
	case "!!bool":
		var b bool
		err := y.Decode(&b)
		return b, err
	case "!!int":
		var i int64
		if err := y.Decode(&i); err != nil {
			return nil, errors.New("the number is out of range")
		}
		return i, nil
	case "!!float":
		var f float64
		if err := y.Decode(&f); err != nil || math.IsNaN(f) || math.IsInf(f, 0) {
			return nil, errors.New("the number is out of range")
		}
		return f, nil
	default:
		return nil, fmt.Errorf("the YAML tag %s is not supported", shorten(tag))
	}
}

// merge lays a layer over another: maps key by key, taints by key and effect,
// everything else is replaced.
func merge(under, over *node, path string) *node {
	switch {
	case under == nil:
		return over
	case over == nil:
		return under
	case path == "spec.node.taints" && under.kind == list && over.kind == list:
		out := &node{kind: list, origin: over.origin, items: slices.Clone(under.items)}
		for _, taint := range over.items {
			same := func(n *node) bool {
				return n.get("key").text() == taint.get("key").text() && n.get("effect").text() == taint.get("effect").text()
			}
			if i := slices.IndexFunc(under.items, same); i >= 0 {
				out.items[i] = taint
			} else {
				out.items = append(out.items, taint)
			}
		}
		return out
	case under.kind != mapping || over.kind != mapping:
		return over
	}
	out := &node{kind: mapping, origin: over.origin, fields: slices.Clone(under.fields)}
	for _, f := range over.fields {
		i := slices.IndexFunc(out.fields, func(o field) bool { return o.key == f.key })
		if i < 0 {
			out.fields = append(out.fields, f)
			continue
		}
		out.fields[i] = field{f.key, f.origin, merge(out.fields[i].value, f.value, joinKey(path, f.key))}
	}
	return out
}

// fromPlain makes a tree of one origin.
func fromPlain(v any, o Origin) *node {
	n := &node{origin: o}
	switch v := v.(type) {
	case []string:
		n.kind = list
		for _, s := range v {
			n.items = append(n.items, fromPlain(s, o))
		}
	case int:
		n.value = int64(v)
	default:
		n.value = v
	}
	return n
}

// walk calls f for every value that is not a map with anything in it, in the
// order of the document.
func (n *node) walk(path string, f func(path string, n *node)) {
	switch {
	case n.kind == mapping && len(n.fields) > 0:
		for _, child := range n.fields {
			child.value.walk(joinKey(path, child.key), f)
		}
	case n.kind == list && len(n.items) > 0:
		for i, item := range n.items {
			item.walk(joinIndex(path, i), f)
		}
	default:
		f(path, n)
	}
}

// index enters the node and everything below it by their paths.
func (n *node) index(path string, into map[string]*node) {
	into[path] = n
	for _, f := range n.fields {
		f.value.index(joinKey(path, f.key), into)
	}
	for i, item := range n.items {
		item.index(joinIndex(path, i), into)
	}
}
