package main

import (
	"fmt"
	"os"
	"slices"
	"time"

	"github.com/urfave/cli/v2"

	"github.com/hearth-sh/hearth/internal/access"
	"github.com/hearth-sh/hearth/internal/command"
)

// tokenLifetime is the default of --duration, and the least that Kubernetes
// makes a token for.
const tokenLifetime = 10 * time.Minute

func tokenCommand() *cli.Command {
	return &cli.Command{
		Name:  "token",
		Usage: "make a token for the API of a cluster",
		Description: "Needs a kubeconfig whose user may make tokens for the ServiceAccount; the cluster may shorten the duration. " +
			"The token alone goes to stdout, so that it can be put where it is used; whoever has it can do what the ServiceAccount may.\n\n" +
			"Example:\n" +
			"   export HEARTH_API=https://hearth.example.com HEARTH_TOKEN=\"$(nodeagent token)\"",
		Flags: append([]cli.Flag{
			&cli.DurationFlag{Name: "duration", Value: tokenLifetime, Usage: "how long it is good for, a `DURATION` of at least 10m"},
		}, append(slices.DeleteFunc(clusterFlags(), func(f cli.Flag) bool { return f.Names()[0] == "cluster" }), outputFlag())...),
		Action:      action(tokenAction),
		Subcommands: []*cli.Command{tokenLineCommand()},
	}
}

// tokenLineCommand is for one machine, whose tokens are in a file.
func tokenLineCommand() *cli.Command {
	return &cli.Command{
		Name:      "line",
		Usage:     "make a token for one machine, and the line of its token file that lets it in",
		ArgsUsage: "USER TENANT[:read] …",
		Description: "Add the line to the file that `nodeagent dev --token-file` reads, and give the token to whoever it is for; it is not in the line and is shown only now. " +
			"The tenant * stands for all.\n\n" +
			"Example:\n" +
			"   nodeagent token line ann default >> tokens",
		Flags: []cli.Flag{outputFlag()},
		Action: action(func(c *cli.Context) error {
			asJSON, err := wantsJSON(c)
			if err != nil {
				return err
			}
			args := c.Args().Slice()
			if len(args) < 2 {
				return usageError("name a user and the tenants it may work for")
			}
			token, line, err := access.GenerateToken(args[0], args[1:]...)
			if err != nil {
				return usageError("%v", err)
			}
			if asJSON {
				return printJSON(c.App.Writer, struct {
					Token string `json:"token"`
					Line  string `json:"line"`
				}{token, line})
			}
			if _, err := fmt.Fprintln(c.App.Writer, line); err != nil {
				return err
			}
			fprintf(c.App.ErrWriter, "token of %s: %s\n", printable(args[0]), token)
			return nil
		}),
	}
}

// madeToken is what -o json prints.
type madeToken struct {
	Token          string    `json:"token"`
	ExpiresAt      time.Time `json:"expiresAt"`
	Audience       string    `json:"audience"`
	ServiceAccount string    `json:"serviceAccount"`
	Cluster        string    `json:"-"`
}

func tokenAction(c *cli.Context) error {
	if err := command.NoArguments(c); err != nil {
		return err
	}
	asJSON, err := wantsJSON(c)
	if err != nil {
		return err
	}
	if d := c.Duration("duration"); d < tokenLifetime {
		return usageError("--duration %v is less than the %v that Kubernetes makes a token for", d, tokenLifetime)
	}
	choice, err := clusterOf(c)
	if err != nil {
		return err
	}
	made, err := mintToken(c, choice, c.Duration("duration"))
	if err != nil {
		return err
	}
	if asJSON {
		return printJSON(c.App.Writer, made)
	}
	if _, err := fmt.Fprintln(c.App.Writer, made.Token); err != nil {
		return err
	}
	fprintf(c.App.ErrWriter, "for %s of %s, good until %s\n", printable(made.ServiceAccount), printable(made.Cluster), made.ExpiresAt.UTC().Format(time.RFC3339))
	return nil
}

// clusterOf is apiOf for a command that is always about a cluster: it needs
// no --cluster, and what the environment says of an API's URL means nothing.
func clusterOf(c *cli.Context) (apiChoice, error) {
	return chooseAPI(func(name string) (string, bool) {
		switch {
		case c.IsSet(name):
			return c.String(name), true
		case name == "cluster":
			// HEARTH_CONTEXT still chooses.
			return "", true
		}
		return "", false
	}, os.Getenv)
}
