// Package spinkube carries the resource definitions of the SpinKube operator,
// which its chart lacks.
package spinkube

import (
	"bytes"
	_ "embed"
)

//go:embed core.spinkube.dev_spinapps.yaml
var apps []byte

//go:embed core.spinkube.dev_spinappexecutors.yaml
var executors []byte

// CRDs is one manifest with all definitions.
func CRDs() []byte {
	return bytes.Join([][]byte{bytes.TrimSpace(apps), bytes.TrimSpace(executors), nil}, []byte("\n"))
}
