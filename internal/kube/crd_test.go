package kube_test

import (
	"bytes"
	"flag"
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"time"

	apiextensionsv1 "k8s.io/apiextensions-apiserver/pkg/apis/apiextensions/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/utils/ptr"
	"sigs.k8s.io/yaml"

	"github.com/hearth-sh/hearth/api/v1alpha1"
	"github.com/hearth-sh/hearth/internal/function"
	"github.com/hearth-sh/hearth/internal/kube"
)

var update = flag.Bool("update", false, "write the files of packaging/chart/hearth/crds")

const (
	crdDir = "../../packaging/chart/hearth/crds"
	apiDir = "../../api/v1alpha1"
)

// TestCustomResourceDefinitionIsTheGoType derives the schema from the Go types,
// their comments and the constraints below, so that none can say something
// else than the others.
func TestCustomResourceDefinitionIsTheGoType(t *testing.T) {
	for _, d := range definitions {
		file := filepath.Join(crdDir, v1alpha1.Group+"_"+d.names.Plural+".yaml")
		want := generate(t, d)
		if *update {
			if err := os.WriteFile(file, want, 0o644); err != nil {
				t.Fatal(err)
			}
		}
		got, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(got, want) {
			t.Errorf("%s is not what the Go types say; run go test ./internal/kube -run CustomResourceDefinition -update", file)
		}
	}
}

// definition is one custom resource.
type definition struct {
	doc         string
	names       apiextensionsv1.CustomResourceDefinitionNames
	scope       apiextensionsv1.ResourceScope
	members     map[string]reflect.Type // of the root, beside Kubernetes' own
	constraints map[string]func(*props)
	columns     []apiextensionsv1.CustomResourceColumnDefinition
}

var definitions = []definition{
	{
		doc: "Function is a WebAssembly function that Hearth runs and gives a URL.",
		names: apiextensionsv1.CustomResourceDefinitionNames{
			Plural: v1alpha1.FunctionsResource, Singular: "function", Kind: kube.FunctionKind, ListKind: "FunctionList",
			ShortNames: []string{"fn"}, Categories: []string{"all"},
		},
		scope:       apiextensionsv1.NamespaceScoped,
		members:     map[string]reflect.Type{"spec": reflect.TypeFor[v1alpha1.FunctionSpec](), "status": reflect.TypeFor[v1alpha1.FunctionStatus]()},
		constraints: constraints,
		columns: []apiextensionsv1.CustomResourceColumnDefinition{
			{Name: "Runtime", Type: "string", JSONPath: ".spec.runtime"},
			{Name: "URL", Type: "string", JSONPath: ".status.url"},
			{Name: "Revision", Type: "integer", JSONPath: ".status.revision"},
			{Name: "Active", Type: "integer", JSONPath: ".status.activeRevision", Description: "The revision that answers requests."},
			{Name: "Warm", Type: "string", JSONPath: ".status.warm", Description: "Nodes on which the function is warm, of those that should have it."},
			{Name: "Ready", Type: "string", JSONPath: `.status.conditions[?(@.type=="Ready")].status`},
			{Name: "Reason", Type: "string", JSONPath: `.status.conditions[?(@.type=="Ready")].reason`, Priority: 1},
			{Name: "Image", Type: "string", JSONPath: ".spec.image", Priority: 1},
			{Name: "Age", Type: "date", JSONPath: ".metadata.creationTimestamp"},
		},
	},
	{
		doc: "Host says to which namespace the name of a function, or an additional DNS name of one, belongs.",
		names: apiextensionsv1.CustomResourceDefinitionNames{
			Plural: v1alpha1.HostsResource, Singular: "host", Kind: kube.HostKind, ListKind: "HostList",
		},
		scope:       apiextensionsv1.ClusterScoped,
		members:     map[string]reflect.Type{"spec": reflect.TypeFor[v1alpha1.HostSpec]()},
		constraints: hostConstraints,
		columns: []apiextensionsv1.CustomResourceColumnDefinition{
			{Name: "Namespace", Type: "string", JSONPath: ".spec.namespace"},
			{Name: "Function", Type: "string", JSONPath: ".spec.function"},
			{Name: "Released", Type: "date", JSONPath: ".spec.releasedAt", Priority: 1},
			{Name: "Age", Type: "date", JSONPath: ".metadata.creationTimestamp"},
		},
	},
}

type props = apiextensionsv1.JSONSchemaProps

// dnsName is RFC 1123's host name, in lower case and without a trailing dot.
const dnsName = `^[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?(\.[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?)+$`

// constraints are what Go's types cannot say, by the member's path.
var constraints = map[string]func(*props){
	"": func(p *props) {
		p.XValidations = rules(
			// The name becomes a DNS label of a URL: function.ValidateName.
			fmt.Sprintf("size(self.metadata.name) <= %d", function.MaxNameBytes), fmt.Sprintf("metadata.name must be at most %d characters", function.MaxNameBytes),
			"self.metadata.name.matches('^[a-z]([-a-z0-9]*[a-z0-9])?$')", "metadata.name must consist of a to z, 0 to 9 and hyphens, start with a letter and end with a letter or digit",
			"!self.metadata.name.startsWith('xn--')", `metadata.name must not start with "xn--"`,
		)
		p.Required = []string{"spec"}
	},
	"spec": func(p *props) {
		p.XValidations = rules(
			"!has(self.routes) || size(self.routes) == 0 || (has(self.host) && self.host != '')", "routes are paths of host: set host too, or leave routes out",
			"!has(self.placement) || !has(self.runtime) || self.runtime == 'resident'", "placement is for resident functions only",
			"!has(self.autoscaling) || (has(self.runtime) && self.runtime == 'spin')", "autoscaling is for spin functions only: resident ones scale to zero by themselves",
		)
	},
	"spec.image": func(p *props) {
		p.MinLength, p.MaxLength = ptr.To[int64](1), ptr.To[int64](512)
		p.XValidations = rules(
			"self.matches('@sha256:[a-f0-9]{64}$')", "image must be named by digest, such as registry.example.com/hello@sha256:<64 hexadecimal digits>; a tag alone can change under a running function",
			"self.matches('^[a-z0-9][-a-z0-9._]*(:[0-9]{1,5})?(/[a-z0-9]+([._-]+[a-z0-9]+)*)+(:[A-Za-z0-9_][-A-Za-z0-9._]{0,127})?(@sha256:[a-f0-9]{64})?$')", "image must start with the registry's host and a repository in lower case, such as registry.example.com/team/hello",
		)
	},
	"spec.runtime": func(p *props) { p.Default = raw(`"resident"`) },
	"spec.host": func(p *props) {
		p.MaxLength = ptr.To[int64](253)
		p.XValidations = rules("self == '' || self.matches('"+strings.ReplaceAll(dnsName, `\`, `\\`)+"')", "host must be a DNS name in lower case with at least two labels, such as hello.example.com")
	},
	"spec.routes": func(p *props) {
		p.MaxItems = ptr.To[int64](v1alpha1.MaxRoutes)
		p.XListType = ptr.To("set")
	},
	"spec.routes[]": func(p *props) {
		p.MaxLength = ptr.To[int64](v1alpha1.MaxRouteBytes)
		p.XValidations = rules(
			"self.matches('^/([-A-Za-z0-9._~!$&()*+,;=:@%\\']+(/[-A-Za-z0-9._~!$&()*+,;=:@%\\']+)*)?$')", "a route must be a path such as / or /api/v1: it begins with a slash, does not end with one and has no query",
			"!self.split('/').exists(s, s == '.' || s == '..')", `a route must not contain "." or ".." as a segment`,
		)
	},
	"spec.placement.nodeSelector":   func(p *props) { p.MaxProperties = ptr.To[int64](v1alpha1.MaxNodeSelector) },
	"spec.placement.nodeSelector{}": func(p *props) { p.MaxLength = ptr.To[int64](63) },
	"spec.autoscaling": func(p *props) {
		p.XValidations = rules(
			"!has(self.maxReplicas) || self.maxReplicas >= (has(self.minReplicas) ? self.minReplicas : 1)", "maxReplicas must be at least minReplicas",
			"has(self.maxReplicas) || !has(self.autoscaler) || self.autoscaler == 'none'", "maxReplicas must be set where an autoscaler decides",
		)
	},
	"spec.autoscaling.minReplicas":      func(p *props) { p.Minimum, p.Maximum = ptr.To(1.0), ptr.To[float64](v1alpha1.MaxReplicas) },
	"spec.autoscaling.maxReplicas":      func(p *props) { p.Minimum, p.Maximum = ptr.To(1.0), ptr.To[float64](v1alpha1.MaxReplicas) },
	"spec.autoscaling.targetCPUPercent": func(p *props) { p.Minimum, p.Maximum = ptr.To(1.0), ptr.To[float64](v1alpha1.MaxTargetCPUPercent) },
	"spec.limits":                       func(p *props) { p.Default = raw(`{}`) },
	"spec.limits.memoryMiB":             number(v1alpha1.MinMemoryMiB, v1alpha1.MaxMemoryMiB, v1alpha1.DefaultMemoryMiB),
	"spec.limits.timeoutMs":             number(v1alpha1.MinTimeoutMS, v1alpha1.MaxTimeoutMS, v1alpha1.DefaultTimeoutMS),
	"spec.limits.concurrency":           number(v1alpha1.MinConcurrency, v1alpha1.MaxConcurrency, v1alpha1.DefaultConcurrency),
	"spec.env": func(p *props) {
		p.MaxItems = ptr.To[int64](256)
		p.XListType, p.XListMapKeys = ptr.To("map"), []string{"name"}
		p.XValidations = rules(
			fmt.Sprintf("self.map(e, size(e.name) + (has(e.value) ? size(e.value) : 0)).sum() <= %d", v1alpha1.MaxEnvBytes),
			fmt.Sprintf("env must be at most %d characters, all names and values together", v1alpha1.MaxEnvBytes),
		)
	},
	"spec.env[]": func(p *props) {
		p.XValidations = rules("!has(self.secretKeyRef) || !has(self.value) || self.value == ''", "an environment variable has a value or a secretKeyRef, not both")
	},
	"spec.env[].name": func(p *props) {
		p.MinLength, p.MaxLength = ptr.To[int64](1), ptr.To[int64](256)
		p.XValidations = rules("self.matches('^[A-Za-z_][A-Za-z0-9_]*$')", "the name of an environment variable consists of letters, digits and underscores and does not begin with a digit")
	},
	"spec.env[].value":             func(p *props) { p.MaxLength = ptr.To[int64](v1alpha1.MaxEnvBytes) },
	"spec.env[].secretKeyRef.name": func(p *props) { p.MinLength, p.MaxLength = ptr.To[int64](1), ptr.To[int64](253) },
	"spec.env[].secretKeyRef.key":  func(p *props) { p.MinLength, p.MaxLength = ptr.To[int64](1), ptr.To[int64](253) },
	"status.nodes": func(p *props) {
		p.MaxItems = ptr.To[int64](5000)
		p.XListType, p.XListMapKeys = ptr.To("map"), []string{"name"}
	},
	"status.nodes[].name":         func(p *props) { p.MinLength, p.MaxLength = ptr.To[int64](1), ptr.To[int64](253) },
	"status.nodes[].error.detail": func(p *props) { p.MaxLength = ptr.To[int64](4096) },
	"status.history": func(p *props) {
		p.MaxItems = ptr.To[int64](2 * function.MaxRevisions)
		p.XListType, p.XListMapKeys = ptr.To("map"), []string{"revision"}
	},
	"status.history[].error.detail": func(p *props) { p.MaxLength = ptr.To[int64](4096) },
	"status.history[].phases":       func(p *props) { p.MaxItems = ptr.To[int64](32) },
	"status.conditions": func(p *props) {
		p.MaxItems = ptr.To[int64](16)
		p.XListType, p.XListMapKeys = ptr.To("map"), []string{"type"}
	},
	"status.conditions[].type":    func(p *props) { p.MaxLength = ptr.To[int64](316) },
	"status.conditions[].reason":  func(p *props) { p.MinLength, p.MaxLength = ptr.To[int64](1), ptr.To[int64](1024) },
	"status.conditions[].message": func(p *props) { p.MaxLength = ptr.To[int64](32768) },
}

// hostConstraints are the same of Host.
var hostConstraints = map[string]func(*props){
	"":               func(p *props) { p.Required = []string{"spec"} },
	"spec.namespace": func(p *props) { p.MinLength, p.MaxLength = ptr.To[int64](1), ptr.To[int64](63) },
	"spec.function":  func(p *props) { p.MinLength, p.MaxLength = ptr.To[int64](1), ptr.To[int64](function.MaxNameBytes) },
}

func number(low, high, def int) func(*props) {
	return func(p *props) {
		p.Minimum, p.Maximum = ptr.To(float64(low)), ptr.To(float64(high))
		p.Default = raw(fmt.Sprint(def))
	}
}

func raw(s string) *apiextensionsv1.JSON { return &apiextensionsv1.JSON{Raw: []byte(s)} }

func rules(rulesAndMessages ...string) apiextensionsv1.ValidationRules {
	var out apiextensionsv1.ValidationRules
	for i := 0; i < len(rulesAndMessages); i += 2 {
		out = append(out, apiextensionsv1.ValidationRule{Rule: rulesAndMessages[i], Message: rulesAndMessages[i+1]})
	}
	return out
}

func generate(t *testing.T, d definition) []byte {
	t.Helper()
	g := generator{t: t, docs: docs(t), used: map[string]bool{}, constraints: d.constraints}
	root := g.object("", d.doc, d.members)
	root.Properties["apiVersion"] = props{Type: "string"}
	root.Properties["kind"] = props{Type: "string"}
	root.Properties["metadata"] = props{Type: "object"}
	for path := range d.constraints {
		if !g.used[path] {
			t.Errorf("the constraint of %q stands for no member", path)
		}
	}
	version := apiextensionsv1.CustomResourceDefinitionVersion{
		Name: "v1alpha1", Served: true, Storage: true,
		Schema:                   &apiextensionsv1.CustomResourceValidation{OpenAPIV3Schema: &root},
		AdditionalPrinterColumns: d.columns,
	}
	if _, ok := d.members["status"]; ok {
		version.Subresources = &apiextensionsv1.CustomResourceSubresources{Status: &apiextensionsv1.CustomResourceSubresourceStatus{}}
	}
	crd := apiextensionsv1.CustomResourceDefinition{
		TypeMeta:   metav1.TypeMeta{APIVersion: "apiextensions.k8s.io/v1", Kind: "CustomResourceDefinition"},
		ObjectMeta: metav1.ObjectMeta{Name: d.names.Plural + "." + v1alpha1.Group},
		Spec: apiextensionsv1.CustomResourceDefinitionSpec{
			Group: v1alpha1.Group, Scope: d.scope, Names: d.names,
			Versions: []apiextensionsv1.CustomResourceDefinitionVersion{version},
		},
	}
	data, err := yaml.Marshal(crd)
	if err != nil {
		t.Fatal(err)
	}
	// The API server fills in status; an empty one in a manifest only confuses.
	var tree map[string]any
	if err := yaml.Unmarshal(data, &tree); err != nil {
		t.Fatal(err)
	}
	delete(tree, "status")
	if data, err = yaml.Marshal(tree); err != nil {
		t.Fatal(err)
	}
	return append([]byte("# Generated from api/v1alpha1/resource.go by a test of internal/kube; do not edit.\n"), data...)
}

type generator struct {
	t           *testing.T
	docs        map[string]string // of "Type" and "Type.Member"
	used        map[string]bool
	constraints map[string]func(*props)
}

func (g generator) object(path, doc string, members map[string]reflect.Type) props {
	p := props{Type: "object", Description: doc, Properties: map[string]props{}}
	for name, typ := range members {
		p.Properties[name] = g.schema(join(path, name), typ, g.docs[typ.Name()])
	}
	g.constrain(path, &p)
	return p
}

func (g generator) schema(path string, typ reflect.Type, doc string) props {
	p := props{Description: doc}
	switch {
	case typ == reflect.TypeFor[time.Time]():
		p.Type, p.Format = "string", "date-time"
	case typ.Kind() == reflect.Pointer:
		return g.schema(path, typ.Elem(), doc)
	case typ.Kind() == reflect.Struct:
		p.Type, p.Properties = "object", map[string]props{}
		for field := range typ.Fields() {
			name, options, _ := strings.Cut(field.Tag.Get("json"), ",")
			p.Properties[name] = g.schema(join(path, name), field.Type, g.docs[typ.Name()+"."+field.Name])
			if options == "" {
				p.Required = append(p.Required, name)
			}
		}
	case typ.Kind() == reflect.Slice:
		p.Type = "array"
		items := g.schema(path+"[]", typ.Elem(), "")
		p.Items = &apiextensionsv1.JSONSchemaPropsOrArray{Schema: &items}
	case typ.Kind() == reflect.Map:
		values := g.schema(path+"{}", typ.Elem(), "")
		p.Type, p.AdditionalProperties = "object", &apiextensionsv1.JSONSchemaPropsOrBool{Allows: true, Schema: &values}
	case typ.Kind() == reflect.Bool:
		p.Type = "boolean"
	case typ.Kind() == reflect.Float64:
		p.Type, p.Minimum = "number", ptr.To(0.0)
	case typ.Kind() == reflect.String:
		p.Type = "string"
		for _, value := range enums[typ] {
			p.Enum = append(p.Enum, *raw(fmt.Sprintf("%q", value)))
		}
		if typ.Name() != "string" && p.Enum == nil {
			g.t.Errorf("%s: type %s has no values in enums", path, typ)
		}
	case typ.Kind() == reflect.Int:
		p.Type, p.Format, p.Minimum = "integer", "int32", ptr.To(0.0)
	case typ.Kind() == reflect.Int64:
		p.Type, p.Format, p.Minimum = "integer", "int64", ptr.To(0.0)
	default:
		g.t.Fatalf("%s: type %s is not understood", path, typ)
	}
	if p.Description == "" && !strings.HasSuffix(path, "[]") && !strings.HasSuffix(path, "{}") {
		g.t.Errorf("%s has no comment", path)
	}
	g.constrain(path, &p)
	return p
}

var enums = map[reflect.Type][]string{
	reflect.TypeFor[v1alpha1.FunctionRuntime](): {string(v1alpha1.RuntimeResident), string(v1alpha1.RuntimeSpin)},
	reflect.TypeFor[v1alpha1.Autoscaler]():      {string(v1alpha1.AutoscalerNone), string(v1alpha1.AutoscalerHPA), string(v1alpha1.AutoscalerKEDA)},
	reflect.TypeFor[v1alpha1.FunctionState]():   {string(v1alpha1.StatePending), string(v1alpha1.StateReady), string(v1alpha1.StateFailed)},
	reflect.TypeFor[v1alpha1.RevisionProgress](): {
		string(v1alpha1.ProgressQueued), string(v1alpha1.ProgressPulling), string(v1alpha1.ProgressCompiling),
		string(v1alpha1.ProgressLoading), string(v1alpha1.ProgressReady), string(v1alpha1.ProgressFailed),
	},
	reflect.TypeFor[v1alpha1.ConditionStatus](): {string(v1alpha1.ConditionTrue), string(v1alpha1.ConditionFalse), string(v1alpha1.ConditionUnknown)},
}

func (g generator) constrain(path string, p *props) {
	if constrain := g.constraints[path]; constrain != nil {
		g.used[path] = true
		constrain(p)
	}
}

func join(path, name string) string { return strings.TrimPrefix(path+"."+name, ".") }

func docs(t *testing.T) map[string]string {
	t.Helper()
	out := map[string]string{}
	for _, name := range []string{"resource.go", "function.go", "node.go"} {
		file, err := parser.ParseFile(token.NewFileSet(), filepath.Join(apiDir, name), nil, parser.ParseComments)
		if err != nil {
			t.Fatal(err)
		}
		for _, declaration := range file.Decls {
			d, ok := declaration.(*ast.GenDecl)
			if !ok || d.Tok != token.TYPE {
				continue
			}
			spec := d.Specs[0].(*ast.TypeSpec)
			out[spec.Name.Name] = sentence(d.Doc)
			if s, ok := spec.Type.(*ast.StructType); ok {
				for _, field := range s.Fields.List {
					for _, name := range field.Names {
						out[spec.Name.Name+"."+name.Name] = sentence(field.Doc)
					}
				}
			}
		}
	}
	return out
}

func sentence(g *ast.CommentGroup) string { return strings.Join(strings.Fields(g.Text()), " ") }
