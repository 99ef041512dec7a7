package nodeconfig

import (
	"bytes"
	"encoding/json"
	"flag"
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"os"
	"path/filepath"
	"reflect"
	"regexp"
	"slices"
	"strings"
	"testing"
	"text/template"

	"github.com/santhosh-tekuri/jsonschema/v6"
	"sigs.k8s.io/yaml"

	"github.com/hearth-sh/hearth/api/v1alpha1"
	"github.com/hearth-sh/hearth/internal/bootstrap/fault"
)

var update = flag.Bool("update", false, "write the JSON Schema and docs/nodeconfig.md")

const (
	apiDir       = "../../api/v1alpha1"
	embeddedFile = "nodeconfig.schema.json"
	schemaFile   = "../../docs/nodeconfig.schema.json"
	docsFile     = "../../docs/nodeconfig.md"
	examplesDir  = "../../examples/nodeconfig"
)

type object = map[string]any

// constraints are what Go's types cannot say, by "Type.member"; "[]" stands
// for a list's items or a map's values. They are the rules of validate.go.
var constraints = map[string]object{
	"NodeConfig.apiVersion":         {"const": v1alpha1.APIVersion},
	"NodeConfig.kind":               {"const": v1alpha1.KindNodeConfig},
	"NodeConfigSpec.role":           {"enum": roles},
	"NodeConfigSpec.pool":           {"enum": pools},
	"NodeTaint.effect":              {"enum": effects},
	"NodeTaint.key":                 {"minLength": 1, "maxLength": 317},
	"NodeTaint.value":               {"maxLength": 63},
	"NodeRegistration.labels":       {"propertyNames": object{"minLength": 1, "maxLength": 317}},
	"NodeRegistration.labels[]":     {"maxLength": 63},
	"ClusterConfig.name":            {"pattern": dnsLabelPattern},
	"ClusterConfig.store":           {"pattern": storePattern},
	"ClusterConfig.region":          {"pattern": regionPattern},
	"ClusterConfig.kmsKey":          {"pattern": kmsKeyPattern},
	"ClusterConfig.server":          {"pattern": serverPattern},
	"ClusterConfig.tlsSANs":         {"maxItems": maxTLSSANs},
	"SnapshotsConfig.bucket":        {"pattern": bucketPattern},
	"SnapshotsConfig.region":        {"pattern": regionPattern},
	"SnapshotsConfig.retention":     {"minimum": 1, "maximum": maxRetention},
	"RestoreConfig.generation":      {"minimum": 1},
	"RestoreConfig.snapshot":        {"minLength": 1},
	"K3sConfig.version":             {"pattern": k3sVersionPattern},
	"K3sConfig.config":              {"propertyNames": object{"not": object{"enum": keysOf(k3sOwned)}}},
	"ArtifactsConfig.manifest":      {"pattern": sourcePattern},
	"ArtifactsConfig.publicKeys":    {"maxItems": maxURLs},
	"ArtifactsConfig.publicKeys[]":  {"pattern": publicKeyPattern},
	"ArtifactsConfig.mirrors":       {"maxItems": maxURLs},
	"ArtifactsConfig.mirrors[]":     {"pattern": sourcePattern},
	"ArtifactsConfig.files":         {"maxItems": maxFileEntries},
	"ArtifactFile.name":             {"pattern": artifactPattern},
	"ArtifactFile.version":          {"pattern": versionPattern},
	"ArtifactFile.arch":             {"enum": architectures},
	"ArtifactFile.urls":             {"minItems": 1, "maxItems": maxURLs},
	"ArtifactFile.urls[]":           {"pattern": sourcePattern},
	"ArtifactFile.sha256":           {"pattern": digestPattern},
	"ArtifactFile.size":             {"maximum": maxArtifactSize},
	"ArtifactFile.installedSHA256":  {"pattern": digestPattern},
	"ArtifactFile.format":           {"enum": formats},
	"ArtifactFile.mode":             {"pattern": modePattern},
	"ArtifactFile.path":             {"pattern": "^/"},
	"ShimConfig.name":               {"pattern": handlerPattern},
	"ShimConfig.artifact":           {"pattern": artifactPattern},
	"NetworkConfig.cni":             {"enum": cnis},
	"NetworkConfig.flannelBackend":  {"enum": flannelBackends},
	"RegistriesConfig.caFiles[]":    {"pattern": "^/"},
	"RegistryMirror.endpoints":      {"maxItems": maxURLs},
	"RegistryMirror.endpoints[]":    {"pattern": "^https?://"},
	"AddonConfig.chart":             {"pattern": "^(oci|https)://"},
	"AddonConfig.version":           {"pattern": versionPattern},
	"HostConfig.sysctls":            {"propertyNames": object{"pattern": sysctlPattern}},
	"HostConfig.sysctls[]":          {"minLength": 1, "maxLength": 256},
	"HostConfig.modules[]":          {"pattern": modulePattern},
	"SignalConfig.lifecycleHook":    {"pattern": hookPattern},
	"SignalConfig.autoScalingGroup": {"maxLength": 255},
	"CloudFormationSignal.resource": {"pattern": resourcePattern},
	"CloudFormationSignal.stack":    {"minLength": 1, "maxLength": 2048},
}

// TestSchemaIsTheGoType derives the JSON Schema from the Go types, their
// comments and the rules of validation, so that none can say something else
// than the others.
func TestSchemaIsTheGoType(t *testing.T) {
	g := newGenerator(t)
	want, err := json.MarshalIndent(g.document(), "", "  ")
	if err != nil {
		t.Fatal(err)
	}
	for key := range constraints {
		if !g.used[key] {
			t.Errorf("the constraint of %q stands for no member", key)
		}
	}
	want = append(want, '\n')
	for _, name := range []string{embeddedFile, schemaFile} {
		same(t, name, want)
	}
}

// TestDocsAreTheGoType does the same for the reference that people read.
func TestDocsAreTheGoType(t *testing.T) {
	g := newGenerator(t)
	text, err := os.ReadFile("testdata/nodeconfig.md.tmpl")
	if err != nil {
		t.Fatal(err)
	}
	page, err := template.New("").Option("missingkey=error").Funcs(template.FuncMap{
		"fields": g.reference, "tags": Tags, "profiles": profileTable, "owned": ownedTable, "codes": codeTable, "serverKeys": func() string { return codeList(k3sServerKeys) },
		"example": func(pool string) (string, error) {
			b, err := os.ReadFile(filepath.Join(examplesDir, pool+".yaml"))
			return strings.TrimSpace(string(b)), err
		},
		"const": func(name string) (any, error) {
			values := object{"MaxUserDataBytes": MaxUserDataBytes >> 10, "MaxDocumentBytes": MaxDocumentBytes >> 10, "MediaType": MediaType,
				"MaxFiles": MaxFiles, "MaxDocuments": MaxDocuments, "MaxDepth": MaxDepth, "MaxNodes": MaxNodes, "MaxTagValue": MaxTagValue, "Group": v1alpha1.Group}
			if values[name] == nil {
				return nil, fmt.Errorf("no constant %s", name)
			}
			return values[name], nil
		},
	}).Parse(string(text))
	if err != nil {
		t.Fatal(err)
	}
	var want bytes.Buffer
	if err := page.Execute(&want, nil); err != nil {
		t.Fatal(err)
	}
	same(t, docsFile, want.Bytes())
}

func same(t *testing.T, name string, want []byte) {
	t.Helper()
	if *update {
		if err := os.WriteFile(name, want, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	got, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got, want) {
		t.Errorf("%s is not what the Go types say; run go test ./internal/nodeconfig -update", name)
	}
}

// TestDefaultsAreWhatTheCommentsSay compares the values of layers/defaults.yaml
// with the sentence "Default: …" of each field's comment.
func TestDefaultsAreWhatTheCommentsSay(t *testing.T) {
	g := newGenerator(t)
	checked := 0
	builtIn("layers/defaults.yaml", "default").at("spec").walk("spec", func(path string, n *node) {
		comment := g.commentOf(t, path)
		_, said, found := strings.Cut(comment, "Default: ")
		want := fmt.Sprint(n.value)
		switch want {
		case "true":
			want = "enabled" // of addons, where the comment is the section's
		case "false":
			want = "disabled"
			if path == "spec.node.allowSpotServer" {
				want = "false"
			}
		}
		if !found || !strings.HasPrefix(said, want+".") {
			t.Errorf("%s is %v, but its comment says %q", path, n.value, comment)
		}
		checked++
	})
	if checked < 15 {
		t.Errorf("only %d defaults were looked at", checked)
	}
}

// TestExamplesAreValid holds the examples to the schema and to Resolve, and to
// being the examples of their pools.
func TestExamplesAreValid(t *testing.T) {
	validate := schemaValidator(t)
	for _, pool := range Pools() {
		t.Run(string(pool), func(t *testing.T) {
			name := filepath.Join(examplesDir, string(pool)+".yaml")
			text, err := os.ReadFile(name)
			if err != nil {
				t.Fatal(err)
			}
			if err := validate(text); err != nil {
				t.Errorf("the schema refuses it: %v", err)
			}
			r, err := Resolve(t.Context(), Sources{Files: []string{name}})
			if err != nil {
				t.Fatal(err)
			}
			if r.Config.Spec.Pool != pool {
				t.Errorf("the pool is %s", r.Config.Spec.Pool)
			}
			if lines := strings.Count(string(text), "#"); lines < 4 {
				t.Errorf("it has %d comments", lines)
			}
			if len(text) > MaxUserDataBytes {
				t.Errorf("it does not fit into user-data")
			}
		})
	}
	files, err := os.ReadDir(examplesDir)
	if err != nil || len(files) != len(Pools()) {
		t.Errorf("%d examples for %d pools (%v)", len(files), len(Pools()), err)
	}
}

func schemaValidator(t *testing.T) func(yamlText []byte) error {
	t.Helper()
	document, err := jsonschema.UnmarshalJSON(bytes.NewReader(schema))
	if err != nil {
		t.Fatal(err)
	}
	compiler := jsonschema.NewCompiler()
	if err := compiler.AddResource("nodeconfig.json", document); err != nil {
		t.Fatal(err)
	}
	compiled, err := compiler.Compile("nodeconfig.json")
	if err != nil {
		t.Fatal(err)
	}
	return func(text []byte) error {
		converted, err := yaml.YAMLToJSON(text)
		if err != nil {
			return err
		}
		v, err := jsonschema.UnmarshalJSON(bytes.NewReader(converted))
		if err != nil {
			return err
		}
		return compiled.Validate(v)
	}
}

type generator struct {
	t    *testing.T
	docs map[string]string // of "Type" and "Type.Field"
	defs object
	used map[string]bool
}

func newGenerator(t *testing.T) *generator {
	t.Helper()
	g := &generator{t: t, docs: map[string]string{}, defs: object{}, used: map[string]bool{}}
	file, err := parser.ParseFile(token.NewFileSet(), filepath.Join(apiDir, "nodeconfig.go"), nil, parser.ParseComments)
	if err != nil {
		t.Fatal(err)
	}
	for _, declaration := range file.Decls {
		d, ok := declaration.(*ast.GenDecl)
		if !ok || d.Tok != token.TYPE {
			continue
		}
		spec := d.Specs[0].(*ast.TypeSpec)
		g.docs[spec.Name.Name] = sentences(d.Doc)
		if s, ok := spec.Type.(*ast.StructType); ok {
			for _, f := range s.Fields.List {
				if len(f.Names) != 1 || f.Doc == nil {
					t.Errorf("%s: every field needs a line and a comment of its own", spec.Name.Name)
				}
				// Documents know a field by its name in them.
				name, _, _ := strings.Cut(reflect.StructTag(strings.Trim(f.Tag.Value, "`")).Get("json"), ",")
				comment, named := strings.CutPrefix(sentences(f.Doc), f.Names[0].Name+" ")
				if !named {
					t.Errorf("%s.%s: the comment must begin with the name", spec.Name.Name, f.Names[0].Name)
				}
				g.docs[spec.Name.Name+"."+f.Names[0].Name] = name + " " + comment
			}
		}
	}
	return g
}

func sentences(g *ast.CommentGroup) string {
	return strings.Join(strings.Fields(g.Text()), " ")
}

func (g *generator) document() object {
	root := g.schema(reflect.TypeFor[v1alpha1.NodeConfig](), "")
	return object{
		"$schema":     "https://json-schema.org/draft/2020-12/schema",
		"$id":         "https://hearth.sh/schemas/v1alpha1/node-config.json",
		"title":       v1alpha1.KindNodeConfig,
		"description": g.docs["NodeConfig"],
		"$ref":        root["$ref"],
		"$defs":       g.defs,
	}
}

func (g *generator) schema(typ reflect.Type, key string) object {
	out := object{}
	switch {
	case typ.Kind() == reflect.Pointer:
		return g.schema(typ.Elem(), key)
	case typ == reflect.TypeFor[v1alpha1.Duration]():
		out["type"], out["pattern"] = "string", durationPattern
	case typ.Kind() == reflect.Struct:
		g.define(typ)
		return object{"$ref": "#/$defs/" + typ.Name()}
	case typ.Kind() == reflect.Slice:
		out["type"], out["items"] = "array", g.schema(typ.Elem(), key+"[]")
	case typ.Kind() == reflect.Map && typ.Elem().Kind() == reflect.Interface:
		out["type"] = []string{"object", "null"}
	case typ.Kind() == reflect.Map:
		// A section may be empty, with all its lines commented out.
		out["type"], out["additionalProperties"] = []string{"object", "null"}, g.schema(typ.Elem(), key+"[]")
	case typ.Kind() == reflect.String:
		out["type"] = "string"
	case typ.Kind() == reflect.Bool:
		out["type"] = "boolean"
	case typ.Kind() == reflect.Int, typ.Kind() == reflect.Int64:
		out["type"], out["minimum"] = "integer", 0
	default:
		g.t.Fatalf("%s: type %s is not understood", key, typ)
	}
	if c, ok := constraints[key]; ok {
		g.used[key] = true
		for k, v := range c {
			out[k] = v
		}
	}
	return out
}

func (g *generator) define(typ reflect.Type) {
	if g.defs[typ.Name()] != nil {
		return
	}
	properties, required := object{}, []string{}
	kind := any([]string{"object", "null"})
	def := object{"description": g.docs[typ.Name()], "additionalProperties": false, "properties": properties}
	g.defs[typ.Name()] = def
	for f := range typ.Fields() {
		name, options, _ := strings.Cut(f.Tag.Get("json"), ",")
		p := g.schema(f.Type, typ.Name()+"."+name)
		comment := g.docs[typ.Name()+"."+f.Name]
		if comment == "" {
			g.t.Errorf("%s.%s has no comment", typ.Name(), f.Name)
		}
		p["description"] = comment
		properties[name] = p
		if options == "" {
			required = append(required, name)
			kind = "object"
		}
	}
	def["type"] = kind
	if len(required) > 0 {
		def["required"] = required
	}
}

// commentOf is the comment of the field that a path without lists names; of
// the section for "enabled", which is explained there.
func (g *generator) commentOf(t *testing.T, path string) string {
	t.Helper()
	typ, comment := reflect.TypeFor[v1alpha1.NodeConfig](), ""
	for _, name := range strings.Split(path, ".") {
		f, ok := members(typ)[name]
		if !ok {
			t.Fatalf("%s: no field %s", path, name)
		}
		if name != "enabled" {
			comment = g.docs[typ.Name()+"."+f.Name]
		}
		typ = f.Type
	}
	return comment
}

var urlLike = regexp.MustCompile(`\b(?:https|s3|file|ssm|oci)://[^\s,;"]*[^\s,;".)]|\bssm:///PATH`)

// reference is one table per type, in the order of the document.
func (g *generator) reference() string {
	var b strings.Builder
	seen := map[reflect.Type]bool{}
	var section func(path string, typ reflect.Type)
	section = func(path string, typ reflect.Type) {
		type child struct {
			path string
			typ  reflect.Type
		}
		var children []child
		fmt.Fprintf(&b, "### `%s`\n\n%s\n\n| field | type | meaning |\n|---|---|---|\n", path, cell(strings.TrimPrefix(strings.Replace(g.docs[typ.Name()], typ.Name(), "`"+path+"`", 1), "`spec` ")))
		for f := range typ.Fields() {
			name, options, _ := strings.Cut(f.Tag.Get("json"), ",")
			at, what, inner := path+"."+name, typeName(f.Type), f.Type
			for inner.Kind() == reflect.Pointer || inner.Kind() == reflect.Slice || inner.Kind() == reflect.Map {
				switch inner.Kind() {
				case reflect.Slice:
					at += "[]"
				case reflect.Map:
					at += ".*"
				}
				inner = inner.Elem()
			}
			if options == "" {
				what += ", required"
			}
			if inner.Kind() == reflect.Struct {
				if seen[inner] {
					what += ", like the one above"
				} else {
					seen[inner] = true
					children = append(children, child{at, inner})
				}
			}
			fmt.Fprintf(&b, "| `%s` | %s | %s |\n", name, what, cell(g.docs[typ.Name()+"."+f.Name]))
		}
		b.WriteString("\n")
		for _, c := range children {
			section(c.path, c.typ)
		}
	}
	section("spec", reflect.TypeFor[v1alpha1.NodeConfigSpec]())
	return strings.TrimSpace(b.String())
}

func cell(s string) string {
	s = urlLike.ReplaceAllStringFunc(s, func(u string) string { return "`" + u + "`" })
	return strings.NewReplacer("|", `\|`, "*/", `\*/`, " * *", ` \* \*`, "hearth.sh/...", "`hearth.sh/...`").Replace(s)
}

func typeName(typ reflect.Type) string {
	switch typ.Kind() {
	case reflect.Pointer:
		return typeName(typ.Elem())
	case reflect.Slice:
		return "list of " + typeName(typ.Elem())
	case reflect.Map:
		if typ.Elem().Kind() == reflect.Interface {
			return "map"
		}
		return "map of " + typeName(typ.Elem())
	case reflect.Struct:
		return "object"
	case reflect.Bool:
		return "boolean"
	case reflect.Int, reflect.Int64:
		return "integer"
	}
	if typ == reflect.TypeFor[v1alpha1.Duration]() {
		return "time span"
	}
	return "text"
}

func profileTable() string {
	var b strings.Builder
	b.WriteString("| pool | role | label | taint | shims |\n|---|---|---|---|---|\n")
	for _, pool := range Pools() {
		spec := builtIn("layers/"+string(pool)+".yaml", "").at("spec")
		var labels, taints, shims []string
		for _, f := range spec.at("node", "labels").fields {
			labels = append(labels, "`"+f.key+"="+f.value.text()+"`")
		}
		if list := spec.at("node", "taints"); list != nil {
			for _, n := range list.items {
				taint := n.get("key").text()
				if value := n.get("value").text(); value != "" {
					taint += "=" + value
				}
				taints = append(taints, "`"+taint+":"+n.get("effect").text()+"`")
			}
		}
		for _, n := range spec.at("shims").items {
			shims = append(shims, n.get("name").text())
		}
		fmt.Fprintf(&b, "| `%s` | %s | %s | %s | %s |\n", pool, spec.at("role").text(), orDash(labels), orDash(taints), orDash(shims))
	}
	return strings.TrimSpace(b.String())
}

func orDash(s []string) string {
	if len(s) == 0 {
		return "–"
	}
	return strings.Join(s, ", ")
}

func ownedTable() string {
	byReason := map[string][]string{}
	for _, key := range keysOf(k3sOwned) {
		byReason[k3sOwned[key]] = append(byReason[k3sOwned[key]], key)
	}
	reasons := keysOf(byReason)
	slices.SortFunc(reasons, func(a, b string) int { return strings.Compare(byReason[a][0], byReason[b][0]) })
	var b strings.Builder
	b.WriteString("| key | instead, or why |\n|---|---|\n")
	for _, reason := range reasons {
		fmt.Fprintf(&b, "| %s | %s |\n", codeList(byReason[reason]), reason)
	}
	for _, name := range keysOf(kubeletOwned) {
		fmt.Fprintf(&b, "| `kubelet-arg: %s=…` | %s |\n", name, kubeletOwned[name])
	}
	return strings.TrimSpace(b.String())
}

func codeList(words []string) string {
	words = slices.Sorted(slices.Values(words))
	return "`" + strings.Join(words, "`, `") + "`"
}

func codeTable() string {
	var b strings.Builder
	b.WriteString("| code | meaning | what to do |\n|---|---|---|\n")
	for _, row := range []struct {
		code    fault.Code
		meaning string
	}{
		{CodeInvalid, "a source says something that a NodeConfig may not say; all problems are listed"},
		{CodeMissing, "no source has a NodeConfig"},
		{CodeUnreadable, "a file of the configuration cannot be read"},
		{CodeUserData, "user-data is too large or its encoding is damaged, so that nobody can tell what it says"},
		{CodeSpotServer, "a server was about to run on a Spot instance"},
	} {
		fmt.Fprintf(&b, "| `%s` | %s | %s |\n", row.code, row.meaning, remedies[row.code])
	}
	return strings.TrimSpace(b.String())
}
