package nodeconfig

import (
	"fmt"
	"reflect"
	"regexp"
	"slices"
	"strings"

	"github.com/hearth-sh/hearth/api/v1alpha1"
)

// strict holds a document to the Go types: what it returns has only fields
// that exist, of the type they have. Everything else became a problem.
func strict(n *node, ps *problems) *node {
	s := checker{ps: ps}
	s.secrets(n, "")
	return s.check(n, reflect.TypeFor[v1alpha1.NodeConfig](), "")
}

type checker struct{ ps *problems }

// check returns nil when nothing of the value can be used.
func (s checker) check(n *node, typ reflect.Type, path string) *node {
	for typ.Kind() == reflect.Pointer {
		typ = typ.Elem()
	}
	if typ.Kind() == reflect.Interface {
		return n // free form
	}
	if n.kind == scalar && n.value == nil {
		if typ.Kind() == reflect.Struct || typ.Kind() == reflect.Map {
			// A section of which every line is commented out.
			return &node{kind: mapping, origin: n.origin}
		}
		s.ps.addf(n.origin, path, "has no value; write one or remove the line")
		return nil
	}
	wrong := func(want string) *node {
		s.ps.addf(n.origin, path, "must be %s, not %s%s", want, n.describe(), quoteHint(n, typ))
		return nil
	}
	switch typ.Kind() {
	case reflect.Struct:
		if n.kind != mapping {
			return wrong("a map of fields")
		}
		return s.object(n, typ, path)
	case reflect.Map:
		if n.kind != mapping {
			return wrong("a map")
		}
		out := &node{kind: mapping, origin: n.origin}
		for _, f := range n.fields {
			if v := s.check(f.value, typ.Elem(), joinKey(path, f.key)); v != nil {
				out.fields = append(out.fields, field{f.key, f.origin, v})
			}
		}
		return out
	case reflect.Slice:
		if n.kind != list {
			return wrong("a list")
		}
		out := &node{kind: list, origin: n.origin}
		for i, item := range n.items {
			if v := s.check(item, typ.Elem(), joinIndex(path, i)); v != nil {
				out.items = append(out.items, v)
			}
		}
		return out
	case reflect.String:
		if _, ok := n.value.(string); !ok || n.kind != scalar {
			return wrong("text")
		}
	case reflect.Bool:
		if _, ok := n.value.(bool); !ok || n.kind != scalar {
			return wrong("true or false")
		}
	case reflect.Int, reflect.Int64:
		i, ok := n.value.(int64)
		if !ok || n.kind != scalar {
			return wrong("a whole number")
		}
		if i < 0 || i > 1<<53 || typ.Kind() == reflect.Int && i > 1<<31-1 {
			s.ps.addf(n.origin, path, "%d is out of range", i)
			return nil
		}
	default:
		panic("nodeconfig: type " + typ.String() + " is not understood")
	}
	return n
}

func (s checker) object(n *node, typ reflect.Type, path string) *node {
	out := &node{kind: mapping, origin: n.origin}
	members := members(typ)
	for _, f := range n.fields {
		if s.ps.full() {
			break
		}
		at := joinKey(path, f.key)
		member, known := members[f.key]
		if !known {
			if !secretKey(f.key) { // which secrets reported
				s.ps.addf(f.origin, at, "unknown field%s", suggest(f.key, keysOf(members), path == "" && inSpec(f.key)))
			}
			continue
		}
		if v := s.check(f.value, member.Type, at); v != nil {
			out.fields = append(out.fields, field{f.key, f.origin, v})
		}
	}
	return out
}

func (n *node) describe() string {
	switch n.kind {
	case mapping:
		return "a map"
	case list:
		return "a list"
	}
	switch v := n.value.(type) {
	case string:
		return "the text " + quote(v)
	case nil:
		return "nothing"
	case bool:
		return fmt.Sprint(v)
	default:
		return fmt.Sprintf("the number %v", v)
	}
}

// quoteHint tells those who wrote a number or a boolean where text is meant.
func quoteHint(n *node, typ reflect.Type) string {
	if _, isText := n.value.(string); typ.Kind() == reflect.String && n.kind == scalar && !isText {
		if typ == reflect.TypeFor[v1alpha1.Duration]() {
			return "; write a time span such as 90s or 5m"
		}
		return "; put it in quotes"
	}
	if typ.Kind() == reflect.Slice && n.kind == scalar {
		return `; write it as "- …" on a line of its own`
	}
	if typ.Kind() == reflect.Bool {
		switch strings.ToLower(n.text()) {
		case "yes", "on", "true":
			return "; write true"
		case "no", "off", "false":
			return "; write false"
		}
	}
	return ""
}

// members are a type's fields by the name they have in documents.
func members(typ reflect.Type) map[string]reflect.StructField {
	out := make(map[string]reflect.StructField, typ.NumField())
	for f := range typ.Fields() {
		name, _, _ := strings.Cut(f.Tag.Get("json"), ",")
		out[name] = f
	}
	return out
}

func keysOf[V any](m map[string]V) []string {
	out := make([]string, 0, len(m))
	for k := range m {
		out = append(out, k)
	}
	slices.Sort(out)
	return out
}

func inSpec(key string) bool {
	_, ok := members(reflect.TypeFor[v1alpha1.NodeConfigSpec]())[key]
	return ok
}

// suggest names the field that was probably meant.
func suggest(key string, known []string, belongsInSpec bool) string {
	if belongsInSpec {
		return "; it belongs below spec"
	}
	if best := nearest(key, known); best != "" {
		return "; did you mean " + best + "?"
	}
	if len(known) <= 16 {
		return "; known are " + strings.Join(known, ", ")
	}
	return ""
}

// nearest is the known word at the smallest distance, "" when none is near.
func nearest(word string, known []string) string {
	best, bestDistance := "", 3
	if len(word) <= 4 {
		bestDistance = 2
	}
	if len(word) > 64 {
		return ""
	}
	for _, k := range known {
		if strings.EqualFold(word, k) {
			return k
		}
		if d := distance(strings.ToLower(word), strings.ToLower(k)); d < bestDistance {
			best, bestDistance = k, d
		}
	}
	return best
}

// distance is the number of characters to insert, delete, replace or swap with
// their neighbour (Damerau and Levenshtein's, restricted).
func distance(a, b string) int {
	var before []int
	row := make([]int, len(b)+1)
	for j := range row {
		row[j] = j
	}
	for i := 1; i <= len(a); i++ {
		next := make([]int, len(b)+1)
		next[0] = i
		for j := 1; j <= len(b); j++ {
			cost := 1
			if a[i-1] == b[j-1] {
				cost = 0
			}
			next[j] = min(row[j]+1, next[j-1]+1, row[j-1]+cost)
			if i > 1 && j > 1 && a[i-1] == b[j-2] && a[i-2] == b[j-1] {
				next[j] = min(next[j], before[j-2]+1)
			}
		}
		before, row = row, next
	}
	return row[len(b)]
}

// secretWords end the names of fields whose values nobody may read. Dashes and
// underscores are left out and capitals made small before they are compared.
var secretWords = []string{"token", "password", "passwd", "passphrase", "privatekey", "secretkey", "accesskey", "accesskeyid", "apikey", "clientsecret", "joinkey", "vpnauth"}

func secretKey(key string) bool {
	if len(key) > 128 {
		return false
	}
	key = strings.ToLower(strings.NewReplacer("-", "", "_", "", ".", "").Replace(key))
	return slices.ContainsFunc(secretWords, func(word string) bool { return strings.HasSuffix(key, word) })
}

// secretText matches what is a secret whatever the name of its field.
var secretText = regexp.MustCompile(strings.Join([]string{
	`\bK10[0-9a-f]{64}::`,                               // a k3s token
	`\b(?:AKIA|ASIA)[0-9A-Z]{16}\b`,                     // an AWS access key's ID
	`-----BEGIN [A-Z0-9 ]*PRIVATE KEY`,                  // PEM
	`(?i)\bX-Amz-(?:Signature|Security-Token)=`,         // a presigned URL
	`(?i)\b[a-z][a-z0-9+.-]*://[^/?#\s@:]*:[^/?#\s@]+@`, // a URL with a password
	`(?i)(?:^|[?&;,\s])(?:[a-z0-9_.-]*(?:token|password|passwd|secret-?key|access-?key|join-?key))=[^\s&;,]`,
}, "|"))

const noSecrets = "anyone on the instance can read its configuration, so it may hold no secrets"

// secrets looks at everything, known or not.
func (s checker) secrets(n *node, path string) {
	for _, f := range n.fields {
		at := joinKey(path, f.key)
		_, isText := f.value.value.(string)
		_, isNumber := f.value.value.(int64)
		if secretKey(f.key) && f.value.kind == scalar && (isText && f.value.text() != "" || isNumber) {
			s.ps.add(Problem{Path: at, Origin: f.value.origin, secret: true, Message: noSecrets + "; remove it: " + insteadOf(f.key)})
			continue
		}
		s.secrets(f.value, at)
	}
	for i, item := range n.items {
		s.secrets(item, joinIndex(path, i))
	}
	if text := n.text(); text != "" && secretText.MatchString(text) {
		s.ps.add(Problem{Path: path, Origin: n.origin, secret: true, Message: noSecrets + "; remove it: it looks like a credential (its value is not shown here)"})
	}
}

func insteadOf(key string) string {
	if strings.HasSuffix(strings.ToLower(key), "token") {
		return "tokens of the cluster come from spec.cluster.store, read with the instance's role"
	}
	return "credentials come from the instance's role, or from a Secret in the cluster"
}

// Redact returns the text with everything that looks like a credential
// replaced, so that it can be printed.
func Redact(s string) string {
	if secretText.MatchString(s) {
		return "(not shown)"
	}
	return s
}

// quote is a value in a message.
func quote(s string) string { return fmt.Sprintf("%q", shorten(Redact(s))) }
