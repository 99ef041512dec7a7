package function_test

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/hearth-sh/hearth/api/v1alpha1"
	"github.com/hearth-sh/hearth/internal/function"
)

func TestSecretsAreNeverPrinted(t *testing.T) {
	const value = "hunter2"
	settings := function.DefaultSettings()
	settings.Secrets = function.Secrets{"PASSWORD": value}
	rev := function.Revision{Settings: settings}
	fn := function.Function{Revision: rev}
	patch, err := function.ParsePatch([]byte(`{"secrets":{"PASSWORD":"` + value + `"}}`))
	if err != nil {
		t.Fatal(err)
	}
	var out bytes.Buffer
	for _, v := range []any{settings.Secrets, settings, &settings, rev, &rev, fn, &fn, patch, &patch, settings.Public(), []any{settings}, map[string]any{"a": rev}} {
		for _, verb := range []string{"%v", "%+v", "%#v", "%s", "%q", "%x", "%X", "%d"} {
			fmt.Fprintf(&out, verb+"\n", v)
		}
		if err := json.NewEncoder(&out).Encode(v); err != nil {
			t.Fatal(err)
		}
		slog.New(slog.NewTextHandler(&out, nil)).Info("m", "v", v)
		slog.New(slog.NewJSONHandler(&out, nil)).Info("m", "v", v)
	}
	for _, shown := range []string{value, fmt.Sprintf("%x", value), fmt.Sprintf("%X", value)} {
		if strings.Contains(out.String(), shown) {
			t.Errorf("%q was printed", shown)
		}
	}
	if !strings.Contains(out.String(), "PASSWORD") {
		t.Error("the name was not printed")
	}
}

func TestSettingsLimits(t *testing.T) {
	set := func(f func(*function.Settings)) function.Settings {
		s := function.DefaultSettings()
		f(&s)
		return s
	}
	for _, c := range []struct {
		name  string
		s     function.Settings
		field string // "" valid
	}{
		{"defaults", function.DefaultSettings(), ""},
		{"least", set(func(s *function.Settings) { s.MemoryMiB, s.TimeoutMS, s.Concurrency = 1, 10, 1 }), ""},
		{"most", set(func(s *function.Settings) { s.MemoryMiB, s.TimeoutMS, s.Concurrency = 1024, 300_000, 1000 }), ""},
		{"no memory", set(func(s *function.Settings) { s.MemoryMiB = 0 }), "memoryMiB"},
		{"too much memory", set(func(s *function.Settings) { s.MemoryMiB = 1025 }), "memoryMiB"},
		{"too short", set(func(s *function.Settings) { s.TimeoutMS = 9 }), "timeoutMs"},
		{"too many", set(func(s *function.Settings) { s.Concurrency = 1001 }), "concurrency"},
		{"environment at its limit", set(func(s *function.Settings) {
			s.Env = map[string]string{"A": strings.Repeat("x", v1alpha1.MaxEnvBytes-1)}
		}), ""},
		{"environment and secrets over it together", set(func(s *function.Settings) {
			s.Env = map[string]string{"A": strings.Repeat("x", v1alpha1.MaxEnvBytes-2)}
			s.Secrets = function.Secrets{"B": "x"}
		}), "env"},
		{"bad name", set(func(s *function.Settings) { s.Env = map[string]string{"A=B": ""} }), "env"},
		{"digit first", set(func(s *function.Settings) { s.Secrets = function.Secrets{"1A": ""} }), "secrets"},
		{"empty name", set(func(s *function.Settings) { s.Env = map[string]string{"": ""} }), "env"},
		{"NUL", set(func(s *function.Settings) { s.Env = map[string]string{"A": "\x00"} }), "env.A"},
		{"not UTF-8", set(func(s *function.Settings) { s.Secrets = function.Secrets{"A": "\xff"} }), "secrets.A"},
		{"both", set(func(s *function.Settings) {
			s.Env, s.Secrets = map[string]string{"A": "1"}, function.Secrets{"A": "2"}
		}), "env.A"},
		{"resident by name", set(func(s *function.Settings) { s.Runtime = v1alpha1.RuntimeResident }), ""},
		{"another runtime", set(func(s *function.Settings) { s.Runtime = "jvm" }), "runtime"},
		{"host and routes", set(func(s *function.Settings) { s.Host, s.Routes = "a.example.com", []string{"/", "/api/v1", "/%7Ea"} }), ""},
		{"a host of one label", set(func(s *function.Settings) { s.Host = "localhost" }), "host"},
		{"a host in upper case", set(func(s *function.Settings) { s.Host = "A.example.com" }), "host"},
		{"a host with a port", set(func(s *function.Settings) { s.Host = "a.example.com:80" }), "host"},
		{"a host too long", set(func(s *function.Settings) { s.Host = strings.Repeat("a.", 126) + "example" }), "host"},
		{"routes without a host", set(func(s *function.Settings) { s.Routes = []string{"/"} }), "routes"},
		{"a route without a slash", set(func(s *function.Settings) { s.Host, s.Routes = "a.b", []string{"api"} }), "routes"},
		{"a route that ends with one", set(func(s *function.Settings) { s.Host, s.Routes = "a.b", []string{"/api/"} }), "routes"},
		{"a route with a query", set(func(s *function.Settings) { s.Host, s.Routes = "a.b", []string{"/api?x"} }), "routes"},
		{"a route upwards", set(func(s *function.Settings) { s.Host, s.Routes = "a.b", []string{"/api/../x"} }), "routes"},
		{"a route twice", set(func(s *function.Settings) { s.Host, s.Routes = "a.b", []string{"/x", "/x"} }), "routes"},
		{"too many routes", set(func(s *function.Settings) {
			s.Host = "a.b"
			for i := range v1alpha1.MaxRoutes + 1 {
				s.Routes = append(s.Routes, fmt.Sprintf("/%d", i))
			}
		}), "routes"},
		{"placement", set(func(s *function.Settings) {
			s.Placement = &v1alpha1.FunctionPlacement{NodeSelector: map[string]string{"example.com/pool": "wasm", "kubernetes.io/arch": "arm64", "x": ""}}
		}), ""},
		{"placement of spin", set(func(s *function.Settings) {
			s.Runtime, s.Placement = v1alpha1.RuntimeSpin, &v1alpha1.FunctionPlacement{NodeSelector: map[string]string{"a": "b"}}
		}), "placement"},
		{"no label", set(func(s *function.Settings) {
			s.Placement = &v1alpha1.FunctionPlacement{NodeSelector: map[string]string{"a b": "c"}}
		}), "placement"},
		{"no label value", set(func(s *function.Settings) {
			s.Placement = &v1alpha1.FunctionPlacement{NodeSelector: map[string]string{"a": "b c"}}
		}), "placement"},
		{"autoscaling", set(func(s *function.Settings) {
			s.Runtime, s.Autoscaling = v1alpha1.RuntimeSpin, &v1alpha1.FunctionAutoscaling{Autoscaler: v1alpha1.AutoscalerHPA, MinReplicas: 2, MaxReplicas: 2, TargetCPUPercent: 50}
		}), ""},
		{"autoscaling of resident", set(func(s *function.Settings) {
			s.Autoscaling = &v1alpha1.FunctionAutoscaling{MinReplicas: 2}
		}), "autoscaling"},
		{"another autoscaler", set(func(s *function.Settings) {
			s.Runtime, s.Autoscaling = v1alpha1.RuntimeSpin, &v1alpha1.FunctionAutoscaling{Autoscaler: "magic", MaxReplicas: 2}
		}), "autoscaling.autoscaler"},
		{"most below least", set(func(s *function.Settings) {
			s.Runtime, s.Autoscaling = v1alpha1.RuntimeSpin, &v1alpha1.FunctionAutoscaling{MinReplicas: 3, MaxReplicas: 2}
		}), "autoscaling.maxReplicas"},
		{"an autoscaler without most", set(func(s *function.Settings) {
			s.Runtime, s.Autoscaling = v1alpha1.RuntimeSpin, &v1alpha1.FunctionAutoscaling{Autoscaler: v1alpha1.AutoscalerKEDA}
		}), "autoscaling.maxReplicas"},
		{"too many replicas", set(func(s *function.Settings) {
			s.Runtime, s.Autoscaling = v1alpha1.RuntimeSpin, &v1alpha1.FunctionAutoscaling{MinReplicas: v1alpha1.MaxReplicas + 1}
		}), "autoscaling.minReplicas"},
	} {
		t.Run(c.name, func(t *testing.T) {
			err := c.s.Validate()
			var ve *function.ValidationError
			switch {
			case c.field == "" && err != nil:
				t.Fatal(err)
			case c.field != "" && (!errors.As(err, &ve) || ve.Field != c.field):
				t.Fatalf("error %v, want field %s", err, c.field)
			}
		})
	}
}

func TestPatch(t *testing.T) {
	base := function.DefaultSettings()
	base.MemoryMiB = 64
	base.Env = map[string]string{"A": "1", "B": "2"}
	base.Secrets = function.Secrets{"S": "s"}
	base.Host, base.Routes = "a.example.com", []string{"/a"}
	base.Placement = &v1alpha1.FunctionPlacement{NodeSelector: map[string]string{"pool": "wasm"}}
	for _, c := range []struct {
		name, patch string
		want        func(*function.Settings)
		err         string
	}{
		{"empty changes nothing", `{}`, func(*function.Settings) {}, ""},
		{"numbers", `{"memoryMiB":32,"timeoutMs":50,"concurrency":2}`, func(s *function.Settings) { s.MemoryMiB, s.TimeoutMS, s.Concurrency = 32, 50, 2 }, ""},
		{"null is the default", `{"memoryMiB":null}`, func(s *function.Settings) { s.MemoryMiB = v1alpha1.DefaultMemoryMiB }, ""},
		{"one variable", `{"env":{"A":"x","B":null,"C":"3"}}`, func(s *function.Settings) { s.Env = map[string]string{"A": "x", "C": "3"} }, ""},
		{"no variables", `{"env":null}`, func(s *function.Settings) { s.Env = nil }, ""},
		{"env becomes secret", `{"env":{"A":null},"secrets":{"A":"1"}}`, func(s *function.Settings) {
			s.Env, s.Secrets = map[string]string{"B": "2"}, function.Secrets{"S": "s", "A": "1"}
		}, ""},
		{"last secret goes", `{"secrets":{"S":null}}`, func(s *function.Settings) { s.Secrets = nil }, ""},
		{"spin", `{"runtime":"spin","placement":null}`, func(s *function.Settings) { s.Runtime, s.Placement = v1alpha1.RuntimeSpin, nil }, ""},
		{"no runtime is resident", `{"runtime":null}`, func(*function.Settings) {}, ""},
		{"resident by name is resident", `{"runtime":"resident"}`, func(*function.Settings) {}, ""},
		{"another host", `{"host":"b.example.com"}`, func(s *function.Settings) { s.Host = "b.example.com" }, ""},
		{"no host and routes", `{"host":null,"routes":null}`, func(s *function.Settings) { s.Host, s.Routes = "", nil }, ""},
		{"routes are replaced whole", `{"routes":["/b","/c"]}`, func(s *function.Settings) { s.Routes = []string{"/b", "/c"} }, ""},
		{"one label more", `{"placement":{"nodeSelector":{"arch":"arm64"}}}`, func(s *function.Settings) {
			s.Placement = &v1alpha1.FunctionPlacement{NodeSelector: map[string]string{"pool": "wasm", "arch": "arm64"}}
		}, ""},
		{"last label goes", `{"placement":{"nodeSelector":{"pool":null}}}`, func(s *function.Settings) { s.Placement = nil }, ""},
		{"no labels", `{"placement":{"nodeSelector":null}}`, func(s *function.Settings) { s.Placement = nil }, ""},
		{"autoscaling", `{"autoscaling":{"autoscaler":"hpa","minReplicas":2,"maxReplicas":5,"targetCPUPercent":null}}`, func(s *function.Settings) {
			s.Autoscaling = &v1alpha1.FunctionAutoscaling{Autoscaler: v1alpha1.AutoscalerHPA, MinReplicas: 2, MaxReplicas: 5}
		}, ""},
		{"no autoscaling", `{"autoscaling":null}`, func(*function.Settings) {}, ""},
		{"number for a runtime", `{"runtime":1}`, nil, "runtime must be a string"},
		{"routes as text", `{"routes":"/a"}`, nil, "routes must be a list"},
		{"a null among routes", `{"routes":["/a",null]}`, nil, "routes must be a list"},
		{"unknown member of placement", `{"placement":{"zone":"a"}}`, nil, `placement member "zone"`},
		{"placement as text", `{"placement":"a"}`, nil, "placement must be a JSON object"},
		{"unknown member of autoscaling", `{"autoscaling":{"replicas":1}}`, nil, `autoscaling member "replicas"`},
		{"text for replicas", `{"autoscaling":{"minReplicas":"1"}}`, nil, "autoscaling.minReplicas must be a whole number"},
		{"unknown member", `{"memory":1}`, nil, `"memory"`},
		{"other case", `{"MemoryMiB":1}`, nil, `"MemoryMiB"`},
		{"member twice", `{"env":{},"env":{}}`, nil, "twice"},
		{"variable twice", `{"env":{"A":"1","A":"2"}}`, nil, "twice"},
		{"fraction", `{"memoryMiB":1.5}`, nil, "memoryMiB must be a whole number"},
		{"text for a number", `{"memoryMiB":"1"}`, nil, "memoryMiB must be a whole number"},
		{"number for a text", `{"env":{"A":1}}`, nil, "env.A must be a string"},
		{"list of secrets", `{"secrets":["S"]}`, nil, "secrets must be an object"},
		{"not an object", `[]`, nil, "must be a JSON object"},
		{"nothing", ``, nil, "must be a JSON object"},
		{"cut", `{"env":{"A":"1"`, nil, "must be a JSON object"},
		{"more", `{}{}`, nil, "nothing after"},
	} {
		t.Run(c.name, func(t *testing.T) {
			p, err := function.ParsePatch([]byte(c.patch))
			if c.err != "" {
				var ve *function.ValidationError
				if !errors.As(err, &ve) || !strings.Contains(err.Error(), c.err) {
					t.Fatalf("error %v, want %q", err, c.err)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			want := base
			c.want(&want)
			if got := p.Apply(base); !got.Equal(want) {
				t.Fatal(cmp.Diff(want.Public(), got.Public()))
			}
			if len(base.Placement.NodeSelector) != 1 || base.Env["A"] != "1" || base.Secrets["S"] != "s" {
				t.Fatal("the patch changed its input")
			}
		})
	}
}

func TestNames(t *testing.T) {
	for name, ok := range map[string]bool{
		"a": true, "hello-2": true, strings.Repeat("a", 63): true,
		"": false, strings.Repeat("a", 64): false, "2a": false, "a-": false, "-a": false, "a_b": false,
		"a.b": false, "A": false, "xn--a": false, "ä": false, "a/b": false, "a\x00": false,
	} {
		if err := function.ValidateName(name); (err == nil) != ok {
			t.Errorf("%q: %v", name, err)
		}
	}
}

func FuzzName(f *testing.F) {
	for _, s := range []string{"hello", "a-b", "xn--a", "A", "..", "a/b", "\x00"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		if function.ValidateName(s) != nil {
			return
		}
		if len(s) > 63 || strings.ToLower(s) != s || strings.ContainsAny(s, "./\\:@ \x00") {
			t.Errorf("%q was accepted", s)
		}
	})
}

func FuzzPatch(f *testing.F) {
	for _, s := range []string{`{}`, `{"env":{"A":null}}`, `{"secrets":null}`, `{"memoryMiB":1e3}`, `{"env":{"A":"1","A":""}}`, `{"a":{"b":[1,{}]}}`, `{"runtime":"spin","host":"a.b","routes":["/"],"placement":{"nodeSelector":{"a":null}},"autoscaling":{"minReplicas":null}}`, "\x00", `{"env":"` + "`" + `"}`} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		p, err := function.ParsePatch(data)
		if err != nil {
			var ve *function.ValidationError
			if !errors.As(err, &ve) {
				t.Fatalf("untyped error %v", err)
			}
			return
		}
		if !json.Valid(data) {
			t.Fatalf("accepted what is not JSON: %q", data)
		}
		once := p.Apply(function.DefaultSettings())
		if !p.Apply(once).Equal(once) {
			t.Fatalf("applying %q twice is not applying it once", data)
		}
		_ = once.Validate()
	})
}

func TestOnlyADeadlineThatIsNotKeptIsWarnedOf(t *testing.T) {
	for _, c := range []struct {
		runtime   v1alpha1.FunctionRuntime
		timeoutMS int
		warned    bool
	}{
		{v1alpha1.RuntimeSpin, 5000, true},
		{v1alpha1.RuntimeSpin, v1alpha1.DefaultTimeoutMS, false}, // nobody asked for it
		{v1alpha1.RuntimeSpin, 0, false},
		{v1alpha1.RuntimeResident, 5000, false},
		{"", 5000, false},
	} {
		w := function.TimeoutIgnored(c.runtime, c.timeoutMS)
		if (w != nil) != c.warned || w != nil && (w.Code != "timeout-ignored" || !strings.Contains(w.Detail, "5000 ms")) {
			t.Errorf("%q with %d ms: %+v", c.runtime, c.timeoutMS, w)
		}
	}
}
