package nodeconfig

import (
	_ "embed"
	"io"
)

// schema is written by this package's tests from the Go types, their comments
// and the rules of validate.go.
//
//go:embed nodeconfig.schema.json
var schema []byte

// Schema returns the JSON Schema (draft 2020-12) of a NodeConfig document. A
// document may say as little as it likes, so the schema asks for less than a
// resolved configuration needs, and it cannot express what depends on other
// fields.
func Schema() []byte { return append([]byte(nil), schema...) }

// WriteSchema prints the schema.
func WriteSchema(w io.Writer) error {
	_, err := w.Write(schema)
	return err
}
