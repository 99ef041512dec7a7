// Package command is what the command lines of Hearth's programs have in
// common: manners (wrong usage is one sentence and exit code 2), completion
// scripts, manual pages, reference pages, the version and the logger.
//
// It knows no command of either program.
package command

import (
	"log/slog"
	"os"
	"runtime/debug"

	"github.com/urfave/cli/v2"
	"golang.org/x/term"
)

// Version says what a binary is: linked, what the linker set, else the commit
// the source tree was at.
func Version(linked string) string {
	if linked != "" {
		return linked
	}
	info, ok := debug.ReadBuildInfo()
	if !ok {
		return "unknown"
	}
	for _, setting := range info.Settings {
		if setting.Key == "vcs.revision" && len(setting.Value) >= 12 {
			return "devel-" + setting.Value[:12]
		}
	}
	return "devel"
}

// LogLevelFlag is the option that Logger reads.
func LogLevelFlag(value string) *cli.StringFlag {
	return &cli.StringFlag{
		Name:    "log-level",
		Usage:   "how much is logged to stderr: debug, info, warn or error",
		EnvVars: []string{"HEARTH_LOG_LEVEL"},
		Value:   value,
	}
}

// Logger logs to stderr what --log-level asks for: as text to a terminal and as
// JSON to anything else.
func Logger(c *cli.Context) (*slog.Logger, error) {
	var level slog.Level
	if err := level.UnmarshalText([]byte(c.String("log-level"))); err != nil {
		return nil, UsageError("--log-level %q is not one of debug, info, warn, error", c.String("log-level"))
	}
	options := &slog.HandlerOptions{Level: level}
	if term.IsTerminal(int(os.Stderr.Fd())) {
		return slog.New(slog.NewTextHandler(os.Stderr, options)), nil
	}
	return slog.New(slog.NewJSONHandler(os.Stderr, options)), nil
}
