package agent

import (
	"context"
	"fmt"
	"time"

	"github.com/coreos/go-systemd/v22/daemon"
)

// notifySystemd tells systemd, if it started this process with Type=notify,
// that the agent is up, how it is (STATUS=), and, with WatchdogSec=, that its
// loops turn. The watchdog is not told anything while they do not: then systemd
// restarts the agent. Whether a registry or an API server answers never counts.
//
// Protocol: sd_notify(3), sd_watchdog_enabled(3).
func (a *agent) notifySystemd(ctx context.Context) error {
	watchdog, err := daemon.SdWatchdogEnabled(false)
	if err != nil {
		return fmt.Errorf("WATCHDOG_USEC or WATCHDOG_PID is not as systemd sets it: %w", err)
	}
	sent, err := daemon.SdNotify(false, daemon.SdNotifyReady)
	if err != nil {
		return fmt.Errorf("tell systemd that the agent is up: %w", err)
	}
	if !sent {
		return nil // not a service of systemd's
	}
	pause := observeEvery
	if watchdog > 0 {
		pause = min(pause, watchdog/3)
	}
	tick := time.NewTicker(pause)
	defer tick.Stop()
	var said string
	var petted time.Time
	for {
		snapshot := a.health.Snapshot()
		if status := fmt.Sprintf("%s: %s", snapshot.State, snapshot.Summary); status != said {
			if _, err := daemon.SdNotify(false, "STATUS="+oneLine(status)); err == nil {
				said = status
			}
		}
		if watchdog > 0 && time.Since(petted) >= watchdog/3 && a.health.Live() == nil {
			if _, err := daemon.SdNotify(false, daemon.SdNotifyWatchdog); err == nil {
				petted = time.Now()
			}
		}
		select {
		case <-ctx.Done():
			_, _ = daemon.SdNotify(false, daemon.SdNotifyStopping)
			return nil
		case <-tick.C:
		}
	}
}

// oneLine keeps a message from being read as further assignments.
func oneLine(s string) string {
	b := []byte(s)
	for i, c := range b {
		if c < ' ' {
			b[i] = ' '
		}
	}
	return string(b)
}
