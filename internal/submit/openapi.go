package submit

import (
	"cmp"
	"encoding/json"
	"fmt"
	"net/http"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/hearth-sh/hearth/api/v1alpha1"
	"github.com/hearth-sh/hearth/internal/access"
)

// The OpenAPI document is built from what the server runs on: paths and query
// parameters from the table of operations, problems from the table of
// problems, schemas from the Go types. Only prose and which answer belongs to
// which operation are written here; tests drive every operation and hold
// each answer against the document.

type object = map[string]any

// operationDoc is what the table of operations does not say.
type operationDoc struct {
	id, summary, description string
	headers                  []string // names in headerDocs
	body                     object   // media type to schema
	bodyRequired             bool
	// answers maps a success status to its media type, schema and headers.
	answers map[int]answerDoc
	// problems lists codes beyond those that every operation can answer.
	problems []string
}

type answerDoc struct {
	description string
	media       string
	schema      object
	headers     []string
}

var (
	// problemsOfAll can come from any operation.
	problemsOfAll = []string{"malformed-request", "unknown-parameter", "invalid-parameter", "method-not-allowed", "internal", "store-unavailable"}
	// problemsOfAccess can come from any below /v1.
	problemsOfAccess = []string{"unauthorized", "forbidden", "access-unavailable", "not-installed", "too-many-api-requests"}
	// problemsOfChanges can come from any that changes something.
	problemsOfChanges = []string{
		"invalid-name", "invalid-idempotency-key", "cross-origin", "function-not-found", "body-stalled", "name-taken",
		"request-in-flight", "precondition-failed", "body-too-large", "unsupported-media-type", "idempotency-mismatch", "disk-full",
		"quota-exceeded", "too-many-changes", "tenant-not-found",
	}
	// problemsOfRevisions are why a recorded revision cannot be served.
	problemsOfRevisions = []string{
		"invalid-settings", "runtime-unsupported", "memory-over-limit", "revision-failed", "digest-mismatch", "registry-refused", "registry-unavailable", "component-unsupported",
		"native-artifact", "malformed-module", "invalid-module", "unsupported-import", "limit-exceeded", "no-start-function",
		"unsupported-feature", "compile-timeout", "compile-memory", "compiler-crashed", "compiler-unavailable",
		"image-invalid", "image-not-found", "registry-unauthorized", "not-wasm", "module-too-large",
	}
)

var (
	runtimes    = []v1alpha1.FunctionRuntime{v1alpha1.RuntimeResident, v1alpha1.RuntimeSpin}
	autoscalers = []v1alpha1.Autoscaler{v1alpha1.AutoscalerNone, v1alpha1.AutoscalerHPA, v1alpha1.AutoscalerKEDA}
)

func ref(name string) object { return object{"$ref": "#/components/schemas/" + name} }

var functionAnswers = map[int]answerDoc{
	200: {"Ready: the revision answers requests.", "application/json", ref("Function"), []string{"ETag", "Location"}},
	202: {"Recorded, and on its way: follow Location.", "application/json", ref("Function"), []string{"ETag", "Location"}},
}

func answers(a map[int]answerDoc, status int, more answerDoc) map[int]answerDoc {
	out := map[int]answerDoc{status: more}
	for k, v := range a {
		out[k] = v
	}
	return out
}

var operationDocs = map[string]operationDoc{
	"GET /v1/functions": {
		id: "listFunctions", summary: "List functions, ordered by name",
		answers:  map[int]answerDoc{200: {"A page of functions.", "application/json", ref("FunctionList"), nil}},
		problems: []string{"invalid-name", "tenant-not-found"},
	},
	"PUT /v1/functions/{name}": {
		id: "putFunction", summary: "Submit a function, or a new revision of it",
		description: "Checks the module, publishes it to the registry, records an immutable revision (durable from here on) and waits until it answers requests. " +
			"A raw module keeps the settings of the wanted revision; settings given are a merge patch (RFC 7396) of those. " +
			"Submitting what is already wanted changes nothing. A client that disconnects before the revision is recorded leaves nothing behind.",
		headers: []string{"If-Match", "If-None-Match", "Idempotency-Key", "Prefer"},
		body: object{
			"application/wasm": object{"schema": object{"description": "A core WebAssembly module, at most 50 MiB."}},
			"application/json": object{"schema": ref("ImageSubmission")},
			"multipart/form-data": object{"schema": object{
				"type": "object", "required": []string{"module"}, "additionalProperties": false,
				"description": "The part settings, if any, comes before the part module.",
				"properties":  object{"settings": ref("SettingsPatch"), "module": object{"description": "A core WebAssembly module, at most 50 MiB."}},
			}},
		},
		bodyRequired: true,
		answers:      answers(functionAnswers, 201, answerDoc{"A new function, ready.", "application/json", ref("Function"), []string{"ETag", "Location"}}),
		problems:     slices.Concat(problemsOfChanges, problemsOfRevisions, []string{"too-many-submits"}),
	},
	"GET /v1/functions/{name}": {
		id: "getFunction", summary: "Get a function", headers: []string{"If-None-Match"},
		answers: map[int]answerDoc{
			200: {"The function.", "application/json", ref("Function"), []string{"ETag"}},
			304: {"It is as If-None-Match says.", "", nil, []string{"ETag"}},
		},
		problems: []string{"invalid-name", "function-not-found"},
	},
	"PATCH /v1/functions/{name}": {
		id: "patchFunction", summary: "Change settings: a new revision with the same module",
		headers:      []string{"If-Match", "If-None-Match", "Idempotency-Key", "Prefer"},
		body:         object{"application/merge-patch+json": object{"schema": ref("SettingsPatch")}},
		bodyRequired: true, answers: functionAnswers,
		problems: slices.Concat(problemsOfChanges, problemsOfRevisions),
	},
	"DELETE /v1/functions/{name}": {
		id: "deleteFunction", summary: "Delete a function and its revisions",
		headers:  []string{"If-Match", "If-None-Match", "Idempotency-Key"},
		answers:  map[int]answerDoc{204: {"It is gone.", "", nil, nil}},
		problems: problemsOfChanges,
	},
	"GET /v1/functions/{name}/revisions": {
		id: "listRevisions", summary: "List a function's revisions, newest first",
		answers:  map[int]answerDoc{200: {"The last 50 revisions.", "application/json", ref("RevisionList"), nil}},
		problems: []string{"invalid-name", "function-not-found"},
	},
	"POST /v1/functions/{name}/rollback": {
		id: "rollbackFunction", summary: "Make an earlier revision the wanted one",
		description: "Without a body: the newest revision older than the wanted one that has answered requests.",
		headers:     []string{"If-Match", "If-None-Match", "Idempotency-Key", "Prefer"},
		body:        object{"application/json": object{"schema": ref("Rollback")}},
		answers:     functionAnswers,
		problems:    slices.Concat(problemsOfChanges, problemsOfRevisions, []string{"revision-not-found", "no-rollback-target"}),
	},
	"GET /v1/functions/{name}/logs": {
		id: "getLogs", summary: "Get or follow a function's log",
		answers:  map[int]answerDoc{200: {"One LogLine a line (NDJSON), flushed as they come.", "application/x-ndjson", ref("LogLine"), nil}},
		problems: []string{"invalid-name", "function-not-found", "logs-unavailable"},
	},
	"GET /openapi.json": {
		id: "getOpenAPI", summary: "This document",
		answers: map[int]answerDoc{200: {"An OpenAPI 3.1 document.", "application/json", object{"type": "object"}, nil}},
	},
	"GET /livez": {
		id: "getLive", summary: "Does the process make progress?",
		answers:  map[int]answerDoc{200: {"It does.", "text/plain", object{"type": "string"}, nil}},
		problems: []string{"not-ready"},
	},
	"GET /readyz": {
		id: "getReady", summary: "Can the API do its work?",
		description: "With verbose, the checks one by one, as application/json with either status.",
		answers:     map[int]answerDoc{200: {"It can.", "text/plain", object{"type": "string"}, nil}},
		problems:    []string{"not-ready"},
	},
	"GET /metrics": {
		id: "getMetrics", summary: "Metrics in a Prometheus exposition format",
		answers: map[int]answerDoc{200: {"Metrics.", "text/plain", object{"type": "string"}, nil}},
	},
	"GET /": {
		id: "getFront", summary: "What this is and what to try",
		answers: map[int]answerDoc{200: {"Text for people.", "text/plain", object{"type": "string"}, nil}},
	},
}

var parameterDocs = map[string]object{
	"tenant":      {"description": "The tenant that owns the function, or whose functions are listed.", "schema": object{"type": "string"}},
	"limit":       {"description": "Functions on a page.", "schema": object{"type": "integer", "minimum": 1, "maximum": maxList}},
	"continue":    {"description": "The member continue of the previous page.", "schema": object{"type": "string"}},
	"wait":        {"description": `How long to wait until the revision is ready, e.g. "90s"; at most 300s, 0s answers 202 as soon as it is recorded.`, "schema": object{"type": "string", "default": "60s"}},
	"memoryMiB":   {"description": "Memory limit; with application/wasm only.", "schema": object{"type": "integer", "minimum": v1alpha1.MinMemoryMiB, "maximum": v1alpha1.MaxMemoryMiB}},
	"timeoutMs":   {"description": "Deadline of a request; with application/wasm only.", "schema": object{"type": "integer", "minimum": v1alpha1.MinTimeoutMS, "maximum": v1alpha1.MaxTimeoutMS}},
	"concurrency": {"description": "Requests at once; with application/wasm only.", "schema": object{"type": "integer", "minimum": v1alpha1.MinConcurrency, "maximum": v1alpha1.MaxConcurrency}},
	"runtime":     {"description": "What runs the function, where the API has more than the resident runtime; with application/wasm only.", "schema": object{"type": "string", "enum": runtimes}},
	"follow":      {"description": "Go on with lines as they are written.", "schema": object{"type": "boolean", "default": false}},
	"tail":        {"description": "How many past lines.", "schema": object{"type": "integer", "minimum": 0, "maximum": maxTail, "default": defaultTail}},
	"since":       {"description": "Leave out lines before this time (RFC 3339) or longer ago than this duration (10m).", "schema": object{"type": "string"}},
	"verbose":     {"description": "Answer with every check.", "allowEmptyValue": true, "schema": object{"type": "string"}},
}

var headerDocs = map[string]object{
	"If-Match":        {"description": "Only if the function's configuration is still the one of this entity tag. What nodes report in between does not matter.", "schema": object{"type": "string"}},
	"If-None-Match":   {"description": "For a change only *: only if there is no such function. For GET: answer 304 if nothing changed.", "schema": object{"type": "string"}},
	"Idempotency-Key": {"description": "Identifies the request for 24 hours: sent again, it is answered again, with Idempotency-Replayed: true, instead of done again.", "schema": object{"type": "string", "minLength": 1, "maxLength": 257}},
	"Prefer":          {"description": "respond-async is the same as wait=0s.", "schema": object{"type": "string"}},
}

// buildOpenAPI returns the document as JSON. secured says whether a token is
// needed below /v1.
func buildOpenAPI(version string, secured bool) []byte {
	schemas := object{}
	for _, v := range []any{
		v1alpha1.Function{}, v1alpha1.FunctionList{}, v1alpha1.Revision{}, v1alpha1.RevisionList{}, v1alpha1.LogLine{}, v1alpha1.Problem{},
	} {
		schemaOf(reflect.TypeOf(v), schemas)
	}
	variables := object{
		"type": []string{"object", "null"}, "additionalProperties": object{"type": []string{"string", "null"}},
		"description": "Name to value; null removes one, or all.",
	}
	number := func(lo, hi, def int) object {
		return object{"type": []string{"integer", "null"}, "minimum": lo, "maximum": hi, "description": fmt.Sprintf("null is the default, %d.", def)}
	}
	replicas := object{"type": []string{"integer", "null"}, "minimum": 1, "maximum": v1alpha1.MaxReplicas}
	schemas["SettingsPatch"] = object{
		"type": "object", "additionalProperties": false,
		"description": "A merge patch (RFC 7396) of the wanted revision's settings. Values of secrets are never returned.",
		"properties": object{
			"memoryMiB":   number(v1alpha1.MinMemoryMiB, v1alpha1.MaxMemoryMiB, v1alpha1.DefaultMemoryMiB),
			"timeoutMs":   number(v1alpha1.MinTimeoutMS, v1alpha1.MaxTimeoutMS, v1alpha1.DefaultTimeoutMS),
			"concurrency": number(v1alpha1.MinConcurrency, v1alpha1.MaxConcurrency, v1alpha1.DefaultConcurrency),
			"env":         variables, "secrets": variables,
			"runtime": object{"enum": []any{v1alpha1.RuntimeResident, v1alpha1.RuntimeSpin, nil}, "description": "What runs the function; null is resident. This and what follows are refused where there is no cluster."},
			"host":    object{"type": []string{"string", "null"}, "description": "An additional DNS name, in lower case, with at least two labels."},
			"routes": object{
				"type": []string{"array", "null"}, "items": object{"type": "string", "pattern": "^/", "maxLength": v1alpha1.MaxRouteBytes}, "maxItems": v1alpha1.MaxRoutes,
				"description": "The paths of host that reach the function; null is all.",
			},
			"placement": object{
				"type": []string{"object", "null"}, "additionalProperties": false, "description": "On which nodes a resident function is kept ready; null is on all.",
				"properties": object{"nodeSelector": variables},
			},
			"autoscaling": object{
				"type": []string{"object", "null"}, "additionalProperties": false, "description": "How many pods a spin function has.",
				"properties": object{
					"autoscaler":  object{"enum": []any{v1alpha1.AutoscalerNone, v1alpha1.AutoscalerHPA, v1alpha1.AutoscalerKEDA, nil}},
					"minReplicas": replicas, "maxReplicas": replicas,
					"targetCPUPercent": object{"type": []string{"integer", "null"}, "minimum": 1, "maximum": v1alpha1.MaxTargetCPUPercent},
				},
			},
		},
	}
	schemas["ImageSubmission"] = object{
		"type": "object", "required": []string{"image"}, "additionalProperties": false,
		"properties": object{
			"image":    object{"type": "string", "maxLength": maxImageBytes, "description": "OCI reference, by tag or digest."},
			"settings": ref("SettingsPatch"),
		},
	}
	schemas["Rollback"] = object{
		"type": "object", "additionalProperties": false,
		"properties": object{"revision": object{"type": "integer", "minimum": 1}},
	}

	paths := object{}
	for _, op := range publicOperations {
		item, ok := paths[op.path].(object)
		if !ok {
			item = object{}
			if strings.Contains(op.path, "{name}") {
				item["parameters"] = []object{{
					"name": "name", "in": "path", "required": true, "description": "A DNS label, not punycode.",
					"schema": object{"type": "string", "pattern": "^[a-z]([-a-z0-9]{0,61}[a-z0-9])?$"},
				}}
			}
			paths[op.path] = item
		}
		d := describe(op)
		if secured && op.needsCaller() {
			d["security"] = []object{{"bearer": []string{}}}
		}
		item[strings.ToLower(op.method)] = d
	}
	doc := object{
		"openapi": "3.1.0",
		"info": object{
			"title": "Hearth submit API", "version": cmp.Or(version, "dev"),
			"description": "Submit WebAssembly functions to machines you own. Every error is a problem document (RFC 9457) whose type ends in one of the codes below; retryable says whether the same request can succeed later.\n\n" + problemTable(),
			"license":     object{"name": "Apache-2.0", "identifier": "Apache-2.0"},
		},
		"servers": []object{{"url": "/"}},
		"paths":   paths,
		"components": object{"schemas": schemas, "securitySchemes": object{"bearer": object{
			"type": "http", "scheme": "bearer",
			"description": "In a cluster a token of audience " + v1alpha1.Group + " of a user who may do with " + access.Resource + ", in the tenant's namespace, what the operation does; on one machine a token of its token file, if it has one.",
		}}},
	}
	data, err := json.MarshalIndent(doc, "", " ")
	if err != nil {
		panic(err) // made of strings and numbers
	}
	return data
}

func describe(op operation) object {
	d := operationDocs[op.method+" "+op.path]
	out := object{"operationId": d.id, "summary": d.summary}
	if d.description != "" {
		out["description"] = d.description
	}
	var parameters []object
	for in, names := range map[string][]string{"query": op.query, "header": d.headers} {
		for _, name := range names {
			p := object{"name": name, "in": in}
			docs := parameterDocs
			if in == "header" {
				docs = headerDocs
			}
			for k, v := range docs[name] {
				p[k] = v
			}
			parameters = append(parameters, p)
		}
	}
	if len(parameters) > 0 {
		slices.SortFunc(parameters, func(a, b object) int { return cmp.Compare(a["name"].(string), b["name"].(string)) })
		out["parameters"] = parameters
	}
	if d.body != nil {
		out["requestBody"] = object{"required": d.bodyRequired, "content": d.body}
	}
	responses := object{}
	for status, a := range d.answers {
		r := object{"description": a.description}
		if a.media != "" {
			r["content"] = object{a.media: object{"schema": a.schema}}
		}
		if len(a.headers) > 0 {
			h := object{}
			for _, name := range a.headers {
				h[name] = object{"schema": object{"type": "string"}}
			}
			r["headers"] = h
		}
		responses[strconv.Itoa(status)] = r
	}
	byStatus := map[int][]string{}
	codes := slices.Concat(problemsOfAll, d.problems)
	if op.needsCaller() {
		codes = append(codes, problemsOfAccess...)
	}
	for _, code := range codes {
		kind := problemByCode[code]
		if !slices.Contains(byStatus[kind.Status], code) {
			byStatus[kind.Status] = append(byStatus[kind.Status], code)
		}
	}
	for status, codes := range byStatus {
		slices.Sort(codes)
		types := make([]string, len(codes))
		for i, code := range codes {
			types[i] = ProblemBase + code
		}
		responses[strconv.Itoa(status)] = object{
			"description": "Problem: " + strings.Join(codes, ", ") + ".",
			"content": object{"application/problem+json": object{"schema": object{
				"allOf": []object{ref("Problem"), {"type": "object", "properties": object{"type": object{"enum": types}}}},
			}}},
		}
		if status == http.StatusUnauthorized {
			responses[strconv.Itoa(status)].(object)["headers"] = object{"WWW-Authenticate": object{"schema": object{"type": "string"}}}
		}
	}
	if op.path == "/readyz" {
		checks := object{"schema": object{
			"type": "object", "required": []string{"ready", "checks"},
			"properties": object{"ready": object{"type": "boolean"}, "checks": object{"type": "array", "items": object{
				"type": "object", "required": []string{"name", "ok"},
				"properties": object{"name": object{"type": "string"}, "ok": object{"type": "boolean"}, "message": object{"type": "string"}},
			}}},
		}}
		responses["200"].(object)["content"].(object)["application/json"] = checks
		responses["503"].(object)["content"].(object)["application/json"] = checks
	}
	out["responses"] = responses
	return out
}

// problemTable is the table of problems in Markdown.
func problemTable() string {
	var b strings.Builder
	b.WriteString("| code | status | retryable | meaning |\n|---|---|---|---|\n")
	for _, k := range problemKinds {
		fmt.Fprintf(&b, "| %s | %d | %t | %s |\n", k.Code, k.Status, k.Retryable, k.Title)
	}
	return b.String()
}

// schemaOf returns the schema of a type of package v1alpha1, and adds named
// structs to schemas. Members without omitempty are required, and no others
// than the type's are allowed.
func schemaOf(t reflect.Type, schemas object) object {
	switch {
	case t == reflect.TypeFor[time.Time]():
		return object{"type": "string", "format": "date-time"}
	case t == reflect.TypeFor[v1alpha1.FunctionRuntime]():
		return object{"type": "string", "enum": runtimes}
	case t == reflect.TypeFor[v1alpha1.Autoscaler]():
		return object{"type": "string", "enum": autoscalers}
	case t == reflect.TypeFor[v1alpha1.FunctionState]():
		return object{"type": "string", "enum": []v1alpha1.FunctionState{v1alpha1.StatePending, v1alpha1.StateReady, v1alpha1.StateFailed}}
	}
	switch t.Kind() {
	case reflect.Pointer:
		return schemaOf(t.Elem(), schemas)
	case reflect.String:
		return object{"type": "string"}
	case reflect.Bool:
		return object{"type": "boolean"}
	case reflect.Int, reflect.Int64:
		return object{"type": "integer"}
	case reflect.Float64:
		return object{"type": "number"}
	case reflect.Slice:
		return object{"type": "array", "items": schemaOf(t.Elem(), schemas)}
	case reflect.Map:
		return object{"type": "object", "additionalProperties": schemaOf(t.Elem(), schemas)}
	case reflect.Struct:
		if _, done := schemas[t.Name()]; !done {
			schemas[t.Name()] = nil // before its members: types may be nested
			properties := object{}
			required := []string{}
			for i := range t.NumField() {
				name, options, _ := strings.Cut(t.Field(i).Tag.Get("json"), ",")
				properties[name] = schemaOf(t.Field(i).Type, schemas)
				if options == "" {
					required = append(required, name)
				}
			}
			if t == reflect.TypeFor[v1alpha1.Settings]() {
				properties["secrets"].(object)["description"] = "Names of secrets, sorted. Their values are never returned."
			}
			schemas[t.Name()] = object{"type": "object", "properties": properties, "required": required, "additionalProperties": false}
		}
		return ref(t.Name())
	}
	panic("no schema for " + t.String())
}
