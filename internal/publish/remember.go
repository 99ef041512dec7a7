package publish

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"sync"

	"github.com/hearth-sh/hearth/internal/submit"
)

// maxOutcomes bounds what is remembered, some 200 bytes each; the oldest goes first.
const maxOutcomes = 1024

// unlucky are codes of outcomes that the same module need not have again: they
// depend on how busy the machine is.
var unlucky = []string{"compile-timeout", "compile-memory", "compiler-crashed", "compiler-unavailable"}

// RememberOptions configure Remember.
type RememberOptions struct {
	// File keeps outcomes over restarts; empty: they are not. Nobody else may
	// write it: whoever can decides what passes.
	File string
	// Build names what checks; outcomes of another are forgotten. It must differ
	// where a check can come out differently.
	Build string
	// Logger is told when File cannot be used. nil discards it.
	Logger *slog.Logger
}

// Remembered is a Checker that has no module checked twice: a check compiles it,
// which is most of the time of a submit, and comes out the same for the same
// bytes and limit. Nodes verify and compile by themselves whatever was said here.
type Remembered struct {
	next submit.Checker
	o    RememberOptions

	// mu guards what follows; it is not held while a module is checked.
	mu       sync.Mutex
	outcomes []outcome // oldest first
	under    map[checkKey]chan struct{}
}

type checkKey struct {
	// Digest is "sha256:<hex>" of the module, MemoryMiB the limit it was checked for.
	Digest    string `json:"digest"`
	MemoryMiB int    `json:"memoryMiB"`
}

type outcome struct {
	checkKey
	Report submit.CheckReport `json:"report"`
	// Code and Detail are why it did not pass.
	Code   string `json:"code,omitempty"`
	Detail string `json:"detail,omitempty"`
}

// outcomesFile is the form of RememberOptions.File.
type outcomesFile struct {
	Build    string    `json:"build"`
	Outcomes []outcome `json:"outcomes"`
}

var _ submit.Checker = (*Remembered)(nil)

// Remember returns a Remembered in front of next. A file that cannot be read is
// begun anew.
func Remember(next submit.Checker, o RememberOptions) *Remembered {
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	r := &Remembered{next: next, o: o, under: map[checkKey]chan struct{}{}}
	if o.File == "" {
		return r
	}
	data, err := os.ReadFile(o.File)
	var f outcomesFile
	if err == nil {
		err = json.Unmarshal(data, &f)
	}
	switch {
	case err != nil && !errors.Is(err, os.ErrNotExist):
		o.Logger.Warn("what was known of modules is forgotten", "file", o.File, "error", err)
	case err == nil && f.Build == o.Build:
		r.outcomes = f.Outcomes[max(0, len(f.Outcomes)-maxOutcomes):]
	}
	return r
}

// Check implements submit.Checker. Of many who have the same bytes checked at
// once, one does.
func (r *Remembered) Check(ctx context.Context, path string, memoryMiB int) (submit.CheckReport, error) {
	digest, err := digestOf(path)
	if err != nil {
		return submit.CheckReport{}, fmt.Errorf("read the received module: %w", err)
	}
	key := checkKey{digest, memoryMiB}
	for {
		r.mu.Lock()
		if i := slices.IndexFunc(r.outcomes, func(o outcome) bool { return o.checkKey == key }); i >= 0 {
			o := r.outcomes[i]
			r.outcomes = append(slices.Delete(r.outcomes, i, i+1), o) // it is in use
			r.mu.Unlock()
			if o.Code != "" {
				return submit.CheckReport{}, &submit.CheckError{Code: o.Code, Detail: o.Detail}
			}
			return o.Report, nil
		}
		other, busy := r.under[key]
		if !busy {
			r.under[key] = make(chan struct{})
		}
		r.mu.Unlock()
		if !busy {
			return r.check(ctx, path, key)
		}
		select {
		case <-other: // whose outcome may be nobody else's
		case <-ctx.Done():
			return submit.CheckReport{}, ctx.Err()
		}
	}
}

// check has the module checked and remembers what came out.
func (r *Remembered) check(ctx context.Context, path string, key checkKey) (report submit.CheckReport, err error) {
	keep := false
	defer func() {
		r.mu.Lock()
		defer r.mu.Unlock()
		close(r.under[key])
		delete(r.under, key)
		if keep {
			o := outcome{checkKey: key, Report: report}
			var refused *submit.CheckError
			if errors.As(err, &refused) {
				o.Code, o.Detail = refused.Code, refused.Detail
			}
			r.outcomes = append(r.outcomes[max(0, len(r.outcomes)+1-maxOutcomes):], o)
			r.save()
		}
	}()
	report, err = r.next.Check(ctx, path, key.MemoryMiB)
	var refused *submit.CheckError
	switch {
	case err == nil:
		// A file that changed under the check is somebody's fault, and not known.
		keep = report.Digest == "" || report.Digest == key.Digest
	case errors.As(err, &refused):
		keep = !refused.Retryable && !slices.Contains(unlucky, refused.Code)
	}
	return report, err
}

// save writes the file, whole or not at all. It needs mu. A crash loses the last
// outcomes at most, which are found out again.
func (r *Remembered) save() {
	if r.o.File == "" {
		return
	}
	err := func() error {
		data, err := json.Marshal(outcomesFile{Build: r.o.Build, Outcomes: r.outcomes})
		if err != nil {
			return err
		}
		temp, err := os.CreateTemp(filepath.Dir(r.o.File), filepath.Base(r.o.File)+".*")
		if err != nil {
			return err
		}
		_, err = temp.Write(data)
		if err = errors.Join(err, temp.Close()); err == nil {
			err = os.Rename(temp.Name(), r.o.File)
		}
		if err != nil {
			_ = os.Remove(temp.Name())
		}
		return err
	}()
	if err != nil {
		r.o.Logger.Warn("what is known of modules is not kept over a restart", "file", r.o.File, "error", err)
	}
}

func digestOf(path string) (string, error) {
	f, err := os.Open(path)
	if err != nil {
		return "", err
	}
	defer f.Close()
	sum := sha256.New()
	if _, err := io.Copy(sum, f); err != nil {
		return "", err
	}
	return "sha256:" + hex.EncodeToString(sum.Sum(nil)), nil
}
