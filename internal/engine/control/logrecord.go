package control

import "github.com/hearth-sh/hearth/api/v1alpha1"

// LogRecord is a line of a function's log as the engine writes it to its
// standard output, one JSON object a line, where it is told to: in a cluster
// that is where functions' logs are read and collected from. The engine's own
// log goes to standard error; LogRecordPrefix tells the two apart where a
// container runtime mixes them.
type LogRecord struct {
	// Log is LogRecordKind.
	Log string `json:"log"`
	// Tenant is whose function it is: a name may change hands.
	Tenant string `json:"tenant"`
	v1alpha1.LogLine
}

const (
	// LogRecordKind is the value of LogRecord.Log.
	LogRecordKind = "function"
	// LogRecordPrefix begins every encoded LogRecord.
	LogRecordPrefix = `{"log":"` + LogRecordKind + `",`
)
