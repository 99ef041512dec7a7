package election

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/google/renameio/v2"

	"github.com/hearth-sh/hearth/internal/bootstrap/fault"
)

// Phase is how far this machine got with a generation.
type Phase string

// The phases of a machine that remembers a generation.
const (
	// PhaseHolding: it tried to hold the generation, and may have started k3s
	// for it.
	PhaseHolding Phase = "holding"
	// PhaseFounder: it founded the generation.
	PhaseFounder Phase = "founder"
	// PhaseMember: it joined the generation, or began to.
	PhaseMember Phase = "member"
)

// Memory is what a machine remembers of elections. The zero Memory remembers
// nothing.
type Memory struct {
	// Store and Instance say what the rest is about. A memory of another store
	// or instance, as in an image made of a running node, counts for nothing.
	Store      string `json:"store,omitempty"`
	Instance   string `json:"instance,omitempty"`
	Generation int    `json:"generation,omitempty"`
	Phase      Phase  `json:"phase,omitempty"`
	// Nonce is this machine's in the holder record, if it wrote it.
	Nonce string `json:"nonce,omitempty"`
	// DataOf is the older generation whose data this machine has while it
	// tries to hold one that restores it.
	DataOf int `json:"dataOf,omitempty"`
}

// State keeps a Memory across restarts of the machine.
type State interface {
	// Load returns what was saved last, or the zero Memory.
	Load() (Memory, error)
	// Save returns when the memory survives a loss of power.
	Save(Memory) error
}

// maxStateBytes bounds the file.
const maxStateBytes = 16 << 10

// FileState keeps a Memory in a file of mode 0600.
type FileState struct{ path string }

// NewFileState returns the state in a file, whose directory is made when it is
// first saved.
func NewFileState(path string) *FileState { return &FileState{path} }

// Load returns what was saved last. A file that is not a memory is an error,
// with the code CodeState: guessing could found a second cluster.
func (s *FileState) Load() (Memory, error) {
	f, err := os.Open(s.path)
	if errors.Is(err, fs.ErrNotExist) {
		return Memory{}, nil
	}
	if err != nil {
		return Memory{}, s.fault("read", err)
	}
	defer func() { _ = f.Close() }()
	b, err := io.ReadAll(io.LimitReader(f, maxStateBytes+1))
	if err != nil {
		return Memory{}, s.fault("read", err)
	}
	var m Memory
	if len(b) > maxStateBytes {
		return Memory{}, s.fault("read", fmt.Errorf("more than %d bytes", maxStateBytes))
	}
	if err := json.Unmarshal(b, &m); err != nil {
		return Memory{}, s.fault("read", err)
	}
	switch {
	case m == Memory{}:
	case m.Generation < 1 || m.DataOf < 0 || m.Store == "" || m.Instance == "":
		return Memory{}, s.fault("read", errors.New("incomplete"))
	case m.Phase != PhaseHolding && m.Phase != PhaseFounder && m.Phase != PhaseMember:
		return Memory{}, s.fault("read", fmt.Errorf("unknown phase %.20q", m.Phase))
	case m.Phase == PhaseHolding && m.Nonce == "":
		return Memory{}, s.fault("read", errors.New("held without a nonce"))
	}
	return m, nil
}

// Save replaces the file, durably.
func (s *FileState) Save(m Memory) error {
	b, err := json.Marshal(m)
	if err != nil {
		return s.fault("write", err)
	}
	dir := filepath.Dir(s.path)
	if err := makeDirectories(dir); err != nil {
		return s.fault("write", err)
	}
	if err := renameio.WriteFile(s.path, append(b, '\n'), 0o600, renameio.WithTempDir(dir)); err != nil {
		return s.fault("write", err)
	}
	if err := syncDirectory(dir); err != nil {
		return s.fault("write", err)
	}
	return nil
}

func (s *FileState) fault(action string, err error) error {
	return fault.New(CodeState, err, "if this machine is no node yet, or no longer, run bootstrap reset", "cannot %s what this machine remembers of the election in %s", action, s.path)
}
