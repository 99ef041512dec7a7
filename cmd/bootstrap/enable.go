package main

import (
	"fmt"
	"os"
	"time"

	"github.com/urfave/cli/v2"

	"github.com/hearth-sh/hearth/internal/bootstrap"
	"github.com/hearth-sh/hearth/internal/command"
)

// enableWithin bounds installing a file and three exchanges with systemd.
const enableWithin = time.Minute

func enableCommand() *cli.Command {
	return &cli.Command{
		Name:  "enable",
		Usage: "install hearth-bootstrap.service, which runs bootstrap now and at every boot; returns at once",
		Description: "For user-data that fetched this program. `bootstrap status` and `journalctl -u hearth-bootstrap` show how it goes. " +
			"The packages bring the unit; there, `systemctl enable --now hearth-bootstrap` does the same.",
		Flags: []cli.Flag{stateDirFlag(), logLevelFlag()},
		Action: func(c *cli.Context) error {
			if err := command.NoArguments(c); err != nil {
				return err
			}
			if os.Geteuid() != 0 {
				return cli.Exit("enable needs root; run it with sudo", bootstrap.ExitHost)
			}
			if err := bootstrap.Enable(c.Context, c.String("state-dir"), enableWithin); err != nil {
				return cli.Exit(err.Error(), bootstrap.ExitHost)
			}
			fmt.Fprintln(c.App.Writer, "bootstrap runs in the background; `bootstrap status` shows how far it is")
			return nil
		},
	}
}
