//go:build !race

package precompile

// raceDetector says that this program was built with the race detector.
const raceDetector = false
