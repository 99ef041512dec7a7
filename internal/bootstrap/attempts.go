package bootstrap

import (
	"encoding/json"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"github.com/google/renameio/v2"
)

// attemptsFile counts the runs of a machine that never became a node, in the
// state directory.
const attemptsFile = "attempts.json"

// restartPause is what the unit waits between two runs (RestartSec).
const restartPause = 15 * time.Second

// attempts are what a machine has tried so far.
type attempts struct {
	// Node says that a run succeeded. Nobody waits for such a machine any more,
	// and what it lacks may come back whenever it does.
	Node bool `json:"node,omitempty"`
	Runs int  `json:"runs,omitempty"`
	// SpentMS is how long they took with the pauses between them. It is counted
	// and no difference of clocks, which may be set meanwhile.
	SpentMS int64 `json:"spentMs,omitempty"`
}

// overdue says whether runs that failed took longer together than one may.
func (a attempts) overdue(total time.Duration) bool {
	return !a.Node && total > 0 && time.Duration(a.SpentMS)*time.Millisecond >= total
}

// count adds a run and remembers it. What cannot be read counts for nothing:
// the worst of it is trying longer.
func count(dir string, took time.Duration, succeeded bool) (attempts, error) {
	path := filepath.Join(dir, attemptsFile)
	var a attempts
	if b, err := os.ReadFile(path); err == nil {
		if json.Unmarshal(b, &a) != nil {
			a = attempts{}
		}
	} else if !errors.Is(err, fs.ErrNotExist) {
		return a, err
	}
	before := a
	switch {
	case succeeded:
		a = attempts{Node: true}
	case !a.Node:
		a.Runs++
		a.SpentMS += (took + restartPause).Milliseconds()
	}
	if a == before {
		return a, nil
	}
	b, err := json.Marshal(a)
	if err != nil {
		return a, err
	}
	return a, renameio.WriteFile(path, append(b, '\n'), 0o644, renameio.WithTempDir(dir))
}

// ownPhase says whether a phase waits for nothing but this machine. A run that
// fails in another one may succeed whenever somebody else is ready: metadata, a
// mirror, the store, servers.
func ownPhase(name PhaseName) bool {
	switch name {
	case PhasePreflight, PhasePrepare, PhaseInstall, PhaseStart, PhaseReady, PhaseProve:
		return true
	case PhaseDiscover, PhaseConfigure, PhaseFetch, PhaseElect, PhaseSignal:
	}
	return false
}
