package main

import (
	"fmt"
	"io"
	"os"

	"github.com/google/renameio/v2"
	"github.com/urfave/cli/v2"

	"github.com/hearth-sh/hearth/internal/artifact"
	"github.com/hearth-sh/hearth/internal/bootstrap"
	"github.com/hearth-sh/hearth/internal/command"
)

func manifestCommand() *cli.Command {
	key := &cli.StringSliceFlag{Name: "key", TakesFile: true, Usage: "private key `FILE`; give two while one replaces the other"}
	return &cli.Command{
		Name:  "manifest",
		Usage: "make and check the signed list of files that nodes are made of",
		Description: "A release publishes the list and, beside it, its signatures (the same name with .sig). Nodes trust the keys in " +
			"spec.artifacts.publicKeys and nothing else: not the server the list comes from, nor the mirrors.",
		Subcommands: []*cli.Command{
			{
				Name: "keygen", Usage: "make a signing key; the private one goes to FILE, the public one is printed", ArgsUsage: "FILE",
				Action: func(c *cli.Context) error {
					if c.NArg() != 1 {
						return command.UsageError("keygen takes the file for the private key")
					}
					private, err := artifact.GenerateKey()
					if err != nil {
						return err
					}
					encoded, err := private.Encode()
					if err != nil {
						return err
					}
					// Never over a key that somebody has.
					f, err := os.OpenFile(c.Args().First(), os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
					if err != nil {
						return err
					}
					if _, err := f.Write(encoded); err != nil {
						return err
					}
					if err := f.Sync(); err != nil {
						return err
					}
					if err := f.Close(); err != nil {
						return err
					}
					_, err = fmt.Fprintln(c.App.Writer, private.Public())
					return err
				},
			},
			{
				Name: "sign", Usage: "check a list and write its signatures beside it", ArgsUsage: "FILE", Flags: []cli.Flag{key},
				Action: func(c *cli.Context) error {
					if len(c.StringSlice("key")) == 0 {
						return command.UsageError("say with which key: --key FILE, as `bootstrap manifest keygen FILE` makes one")
					}
					list, err := readList(c)
					if err != nil {
						return err
					}
					var keys []artifact.PrivateKey
					for _, file := range c.StringSlice("key") {
						text, err := readBounded(file)
						if err != nil {
							return err
						}
						private, err := artifact.ParsePrivateKey(text)
						if err != nil {
							return fmt.Errorf("%s: %w", file, err)
						}
						keys = append(keys, private)
					}
					signatures, err := artifact.Sign(list, keys...)
					if err != nil {
						return err
					}
					return renameio.WriteFile(c.Args().First()+artifact.SignatureSuffix, signatures, 0o644)
				},
			},
			{
				Name: "verify", Usage: "say whether a list is valid and signed by one of the public keys", ArgsUsage: "FILE",
				Flags: []cli.Flag{&cli.StringSliceFlag{Name: "public-key", Usage: "`KEY` as keygen prints it"}},
				Action: func(c *cli.Context) error {
					if len(c.StringSlice("public-key")) == 0 {
						return command.UsageError("say whom to trust: --public-key KEY, as keygen printed it")
					}
					list, err := readList(c)
					if err != nil {
						return err
					}
					signatures, err := readBounded(c.Args().First() + artifact.SignatureSuffix)
					if err != nil {
						return err
					}
					var trust artifact.Trust
					for _, text := range c.StringSlice("public-key") {
						public, err := artifact.ParsePublicKey(text)
						if err != nil {
							return command.UsageError("--public-key: %v", err)
						}
						trust.Keys = append(trust.Keys, public)
					}
					m, err := artifact.OpenManifest(list, signatures, trust)
					if err != nil {
						return cli.Exit(err.Error(), bootstrap.ExitFetch)
					}
					_, err = fmt.Fprintf(c.App.Writer, "%s serial %d, %d artifacts\n", m.Name, m.Serial, len(m.Artifacts))
					return err
				},
			},
		},
	}
}

func readList(c *cli.Context) ([]byte, error) {
	if c.NArg() != 1 {
		return nil, command.UsageError("%s takes the list's file", c.Command.Name)
	}
	return readBounded(c.Args().First())
}

// readBounded reads a file of at most the size of a list.
func readBounded(path string) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, artifact.MaxManifestBytes+1))
	if err == nil && len(b) > artifact.MaxManifestBytes {
		err = fmt.Errorf("%s has more than %d bytes", path, artifact.MaxManifestBytes)
	}
	return b, err
}
