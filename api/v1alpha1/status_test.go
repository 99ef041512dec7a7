package v1alpha1_test

import (
	"bytes"
	"encoding/json"
	"flag"
	"go/ast"
	"go/parser"
	"go/token"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/hearth-sh/hearth/api/v1alpha1"
)

var update = flag.Bool("update", false, "write docs/status.schema.json")

const schemaFile = "../../docs/status.schema.json"

// TestStatusSchemaIsTheGoType derives the JSON Schema from the Go type and its
// comments, so that neither can say something else than the other.
func TestStatusSchemaIsTheGoType(t *testing.T) {
	want, err := json.MarshalIndent(newSchema(t).document("NodeStatus"), "", "  ")
	if err != nil {
		t.Fatal(err)
	}
	want = append(want, '\n')
	if *update {
		if err := os.WriteFile(schemaFile, want, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	got, err := os.ReadFile(schemaFile)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got, want) {
		t.Errorf("%s is not what the Go type says; run go test ./api/v1alpha1 -update", schemaFile)
	}
}

// TestStatusMembersAreAllDescribed holds the comments to what the schema needs.
func TestStatusMembersAreAllDescribed(t *testing.T) {
	s := newSchema(t)
	s.document("NodeStatus")
	for _, name := range []string{"NodeStatus", "Check", "FunctionsStatus", "StoreStatus", "EngineStatus", "WorkerStatus", "DiskStatus", "ErrorRecord", "Versions", "FailedFunction"} {
		if s.types[name] == nil {
			t.Errorf("%s is not part of the status", name)
		} else if s.docs[name] == "" {
			t.Errorf("%s has no comment", name)
		}
	}
}

// TestStatusTypeHasTheMembersOfTheSchema looks from the side of the running
// type, which a parser of source cannot misread.
func TestStatusTypeHasTheMembersOfTheSchema(t *testing.T) {
	data, err := os.ReadFile(schemaFile)
	if err != nil {
		t.Fatal(err)
	}
	var schema struct {
		Defs map[string]struct {
			Properties map[string]any
			Required   []string
		} `json:"$defs"`
	}
	if err := json.Unmarshal(data, &schema); err != nil {
		t.Fatal(err)
	}
	for _, v := range []any{
		v1alpha1.NodeStatus{}, v1alpha1.Check{}, v1alpha1.Versions{}, v1alpha1.FunctionsStatus{}, v1alpha1.FailedFunction{},
		v1alpha1.StoreStatus{}, v1alpha1.EngineStatus{}, v1alpha1.WorkerStatus{}, v1alpha1.DiskStatus{}, v1alpha1.ErrorRecord{},
	} {
		typ := reflect.TypeOf(v)
		def := schema.Defs[typ.Name()]
		if len(def.Properties) != typ.NumField() {
			t.Errorf("%s: %d members in the schema, %d in Go", typ.Name(), len(def.Properties), typ.NumField())
		}
		for field := range typ.Fields() {
			name, options, _ := strings.Cut(field.Tag.Get("json"), ",")
			if def.Properties[name] == nil {
				t.Errorf("%s.%s is not in the schema", typ.Name(), name)
			}
			if slices.Contains(def.Required, name) == (options == "omitempty") {
				t.Errorf("%s.%s: required in one place, optional in the other", typ.Name(), name)
			}
		}
	}
}

type object = map[string]any

type schema struct {
	t     *testing.T
	types map[string]ast.Expr
	docs  map[string]string
	enums map[string][]string
	defs  object
}

func newSchema(t *testing.T) *schema {
	s := &schema{t: t, types: map[string]ast.Expr{}, docs: map[string]string{}, enums: map[string][]string{}, defs: object{}}
	files, err := filepath.Glob("*.go")
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range files {
		if strings.HasSuffix(name, "_test.go") {
			continue
		}
		file, err := parser.ParseFile(token.NewFileSet(), name, nil, parser.ParseComments)
		if err != nil {
			t.Fatal(err)
		}
		for _, declaration := range file.Decls {
			if d, ok := declaration.(*ast.GenDecl); ok {
				s.read(d)
			}
		}
	}
	return s
}

func (s *schema) read(d *ast.GenDecl) {
	for _, spec := range d.Specs {
		switch spec := spec.(type) {
		case *ast.TypeSpec:
			s.types[spec.Name.Name] = spec.Type
			s.docs[spec.Name.Name] = text(d.Doc)
		case *ast.ValueSpec:
			typ, isNamed := spec.Type.(*ast.Ident)
			if d.Tok != token.CONST || !isNamed {
				continue
			}
			for _, v := range spec.Values {
				if literal, ok := v.(*ast.BasicLit); ok && literal.Kind == token.STRING {
					value, _ := strconv.Unquote(literal.Value)
					s.enums[typ.Name] = append(s.enums[typ.Name], value)
				}
			}
		}
	}
}

func text(groups ...*ast.CommentGroup) string {
	var parts []string
	for _, g := range groups {
		if line := strings.Join(strings.Fields(g.Text()), " "); line != "" {
			parts = append(parts, line)
		}
	}
	return strings.Join(parts, " ")
}

func (s *schema) document(root string) object {
	s.define(root)
	return object{
		"$schema":     "https://json-schema.org/draft/2020-12/schema",
		"$id":         "https://hearth.sh/schemas/v1alpha1/node-status.json",
		"title":       root,
		"description": "What `nodeagent status -o json` prints. Members may be added within a version: ignore those you do not know.",
		"$ref":        "#/$defs/" + root,
		"$defs":       s.defs,
	}
}

func (s *schema) define(name string) {
	if s.defs[name] != nil {
		return
	}
	switch typ := s.types[name].(type) {
	case *ast.StructType:
		def := object{"type": "object", "description": s.docs[name]}
		s.defs[name] = def
		properties, required := object{}, []string{}
		for _, field := range typ.Fields.List {
			tag, _ := strconv.Unquote(field.Tag.Value)
			member, options, _ := strings.Cut(reflect.StructTag(tag).Get("json"), ",")
			property := s.typeOf(field.Type)
			if doc := text(field.Doc, field.Comment); doc != "" {
				property["description"] = doc
			}
			if member == "apiVersion" {
				property["const"] = v1alpha1.APIVersion
			}
			if member == "kind" {
				property["const"] = name
				delete(property, "description")
			}
			properties[member] = property
			if options != "omitempty" {
				required = append(required, member)
			}
		}
		def["properties"], def["required"] = properties, required
	case *ast.Ident:
		s.defs[name] = object{"type": "string", "description": s.docs[name], "enum": s.enums[name]}
	default:
		s.t.Fatalf("type %s is not understood", name)
	}
}

func (s *schema) typeOf(e ast.Expr) object {
	switch e := e.(type) {
	case *ast.StarExpr:
		return s.typeOf(e.X)
	case *ast.ArrayType:
		return object{"type": "array", "items": s.typeOf(e.Elt)}
	case *ast.SelectorExpr:
		if e.Sel.Name == "Time" {
			return object{"type": "string", "format": "date-time"}
		}
	case *ast.Ident:
		switch e.Name {
		case "string":
			return object{"type": "string"}
		case "bool":
			return object{"type": "boolean"}
		case "int", "int64", "uint64":
			return object{"type": "integer", "minimum": 0}
		}
		s.define(e.Name)
		return object{"$ref": "#/$defs/" + e.Name}
	}
	s.t.Fatalf("type %T is not understood", e)
	return nil
}
