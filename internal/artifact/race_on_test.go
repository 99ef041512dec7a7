//go:build race

package artifact

// raceDetector says that this program was built with the race detector.
const raceDetector = true
