package bootstrap

import (
	"context"
	"path/filepath"
	"time"

	"github.com/hearth-sh/hearth/internal/host"
	"github.com/hearth-sh/hearth/internal/k3s"
	"github.com/hearth-sh/hearth/internal/systemd"
	units "github.com/hearth-sh/hearth/systemd"
)

// Enable installs the unit that runs bootstrap at every boot, and has systemd
// run it now, in the background.
func Enable(ctx context.Context, stateDir string, within time.Duration) error {
	ctx, cancel := context.WithTimeout(ctx, within)
	defer cancel()
	h, err := resetHost(&stateDir)
	if err != nil {
		return err
	}
	if _, err := h.Apply(ctx, []host.File{{
		Path: filepath.Join(k3s.UnitDir, units.BootstrapName), Content: units.Bootstrap, Mode: 0o644, Reason: "runs bootstrap at every boot",
	}}); err != nil {
		return err
	}
	manager, err := systemd.Connect(ctx, systemd.Options{})
	if err != nil {
		return err
	}
	defer manager.Close()
	if err := manager.Reload(ctx); err != nil {
		return err
	}
	if _, err := manager.Enable(ctx, units.BootstrapName); err != nil {
		return err
	}
	return manager.Queue(ctx, units.BootstrapName)
}
