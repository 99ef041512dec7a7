//go:build race

package wasm_test

// raceDetector says that these tests run with the race detector.
const raceDetector = true
