package bootstrap

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"github.com/hearth-sh/hearth/api/v1alpha1"
	"github.com/hearth-sh/hearth/internal/artifact"
	"github.com/hearth-sh/hearth/internal/host"
	"github.com/hearth-sh/hearth/internal/k3s"
	"github.com/hearth-sh/hearth/internal/systemd"
)

// ResetReport says what Reset took away, or would.
type ResetReport struct {
	Stopped []string          `json:"stopped,omitempty"`
	K3s     k3s.CleanupReport `json:"k3s"`
	Files   host.Removal      `json:"files"`
}

const (
	// stopWithin bounds stopping k3s; pods are killed afterwards.
	stopWithin = 90 * time.Second
	// resetWithin bounds a reset.
	resetWithin = 10 * time.Minute
)

// PlanReset says what Reset would take away. It changes nothing.
func PlanReset(ctx context.Context, stateDir string) (ResetReport, error) {
	h, err := resetHost(&stateDir)
	if err != nil {
		return ResetReport{}, err
	}
	files, err := h.PlanRemove(ctx)
	return ResetReport{Files: files}, err
}

func resetHost(stateDir *string) (*host.Host, error) {
	if *stateDir == "" {
		*stateDir = DefaultStateDir
	}
	return host.New(host.Options{Ledger: filepath.Join(*stateDir, filepath.Base(host.DefaultLedger))})
}

// Reset removes everything that bootstrap installed, and what k3s made of it:
// services, files, programs, data, mounts and network. What was there before
// comes back; what somebody changed since stays and is reported. It can be
// repeated after any failure. The Node stays in the cluster until somebody
// deletes it, and what the store knows of this machine as well.
func Reset(ctx context.Context, stateDir string, say func(string)) (ResetReport, error) {
	ctx, cancel := context.WithTimeout(ctx, resetWithin)
	defer cancel()
	h, err := resetHost(&stateDir)
	if err != nil {
		return ResetReport{}, err
	}
	release, err := lock(stateDir)
	if err != nil {
		return ResetReport{}, err
	}
	defer release()
	var r ResetReport
	ledger, err := h.Ledger()
	if err != nil {
		return r, err
	}
	manager, err := systemd.Connect(ctx, systemd.Options{})
	if err != nil {
		return r, err
	}
	defer manager.Close()
	// Only services whose unit is ours: somebody else's k3s is none of our business.
	ours := false
	for _, role := range []v1alpha1.NodeRole{v1alpha1.RoleServer, v1alpha1.RoleAgent} {
		name := k3s.Unit(role)
		if _, installed := ledger.Entry(k3s.UnitDir + "/" + name); !installed {
			continue
		}
		ours = true
		say("stopping " + name)
		if err := manager.Stop(ctx, name, stopWithin); err != nil {
			return r, err
		}
		if _, err := manager.Disable(ctx, name); err != nil {
			return r, err
		}
		r.Stopped = append(r.Stopped, name)
	}
	if ours {
		say("removing what k3s left")
		if r.K3s, err = k3s.Cleanup(ctx, k3s.CleanupOptions{Data: k3s.AllData}); err != nil {
			return r, err
		}
	}
	say("removing what bootstrap installed")
	if r.Files, err = h.Remove(ctx); err != nil {
		return r, err
	}
	if ours {
		r.Files.Left = append(r.Files.Left, networkLeft("/")...)
	}
	if err := manager.Reload(ctx); err != nil {
		return r, err
	}
	// The ledger went last of what was installed: until then a reset can be
	// repeated.
	errs := []error{artifact.Discard(filepath.Join(stateDir, "artifacts"))}
	for _, name := range []string{electionFile, attemptsFile, resultFile} {
		errs = append(errs, os.RemoveAll(filepath.Join(stateDir, name)))
	}
	errs = append(errs, os.RemoveAll(systemd.DefaultMarkerDir))
	if err := errors.Join(errs...); err != nil {
		return r, fmt.Errorf("forget the run: %w", err)
	}
	removeLock(stateDir)
	return r, nil
}

// removeLock removes the lock that the caller holds, and the directories around
// it that are empty then. What somebody keeps there stays.
func removeLock(stateDir string) {
	_ = os.Remove(filepath.Join(stateDir, lockFile))
	if os.Remove(stateDir) == nil && filepath.Clean(stateDir) == DefaultStateDir {
		_ = os.Remove(filepath.Dir(DefaultStateDir))
	}
}
