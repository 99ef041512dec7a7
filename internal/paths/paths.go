// Package paths says where Hearth keeps things on a machine unless it is told
// otherwise. It owns names only: it creates, opens and checks nothing.
package paths

import (
	"os"
	"path/filepath"
	"strconv"
)

// NodeAgentSocket is the agent's control socket on a machine that runs Hearth
// as a system service.
const NodeAgentSocket = "/run/hearth/agent.sock"

// DataDir is the default data directory of `nodeagent dev`:
// $XDG_DATA_HOME/hearth, or ~/.local/share/hearth when the variable is unset
// or not absolute (the XDG Base Directory Specification says to ignore
// relative values). Without a home directory it falls back to a directory
// named after the user's id below the directory for temporary files.
func DataDir() string {
	if dir := os.Getenv("XDG_DATA_HOME"); filepath.IsAbs(dir) {
		return filepath.Join(dir, "hearth")
	}
	if home, err := os.UserHomeDir(); err == nil && filepath.IsAbs(home) {
		return filepath.Join(home, ".local", "share", "hearth")
	}
	return filepath.Join(os.TempDir(), "hearth-"+strconv.Itoa(os.Getuid()))
}

// AgentSocket is the agent's control socket below a data directory.
func AgentSocket(dataDir string) string { return filepath.Join(dataDir, "run", "agent.sock") }

// APISocket is the submit API's socket below a data directory.
func APISocket(dataDir string) string { return filepath.Join(dataDir, "run", "api.sock") }

// EngineSocket is the engine's control socket below a data directory.
func EngineSocket(dataDir string) string { return filepath.Join(dataDir, "run", "engine.sock") }
