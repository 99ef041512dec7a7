package engine

import (
	"encoding/json"
	"net/http"
	"strconv"

	"github.com/hearth-sh/hearth/api/v1alpha1"
)

// problemPrefix begins the type of every problem.
const problemPrefix = "https://hearth.sh/problems/"

// titles are the problems' short names, one for each code.
var titles = map[string]string{
	"api-unavailable":          "API unavailable",
	"body-too-large":           "Request body too large",
	"cross-origin":             "Cross-origin request refused",
	"deadline-exceeded":        "Function exceeded its time limit",
	"function-exited":          "Function failed",
	"function-failed":          "Function cannot be served",
	"function-not-found":       "No such function",
	"function-not-ready":       "Function is not ready",
	"function-out-of-memory":   "Function ran out of memory",
	"function-trapped":         "Function trapped",
	"host-not-served":          "Host not served here",
	"invalid-response":         "Function gave an invalid response",
	"method-not-allowed":       "Method not allowed",
	"node-out-of-touch":        "Node does not know what there is",
	"not-found":                "Nothing here",
	"peer-lost":                "Node that has the function was lost",
	"peer-unreachable":         "Nodes that have the function are not reached",
	"request-body-failed":      "Request body ended early",
	"request-timeout":          "Request body came too slowly",
	"response-too-large":       "Function's response too large",
	"stack-overflow":           "Function overflowed its stack",
	"too-many-invocations":     "Tenant's functions are asked too often",
	"too-many-requests":        "Function is busy",
	"upgrade-unsupported":      "Protocol upgrade not supported",
	"worker-lost":              "Function's worker ended",
	"worker-out-of-memory":     "Worker is out of memory",
	"function-not-loaded":      "Function is not ready",
	"client-gone":              "Client went away",
	"internal":                 "Internal error",
	"state-invalid":            "State cannot be used",
	"log-parameters-invalid":   "Parameters of the log request cannot be used",
	"status-parameter-invalid": "Parameters of the status request cannot be used",
}

func problem(status int, code, detail string, retryable bool) *v1alpha1.Problem {
	title := titles[code]
	if title == "" {
		title = http.StatusText(status)
	}
	return &v1alpha1.Problem{
		Type: problemPrefix + code, Title: title, Status: status, Detail: detail, Retryable: retryable,
	}
}

// code is the last segment of the problem's type.
func code(p *v1alpha1.Problem) string { return p.Type[len(problemPrefix):] }

// writeProblem answers with a problem document (RFC 9457).
func writeProblem(w http.ResponseWriter, p *v1alpha1.Problem) {
	body, err := json.Marshal(p)
	if err != nil { // strings and numbers always encode
		body = []byte("{}")
	}
	body = append(body, '\n')
	h := w.Header()
	h.Set("Content-Type", "application/problem+json")
	h.Set("Content-Length", strconv.Itoa(len(body)))
	h.Set("Cache-Control", "no-store")
	h.Set("X-Content-Type-Options", "nosniff")
	w.WriteHeader(p.Status)
	_, _ = w.Write(body) // the client is gone
}
