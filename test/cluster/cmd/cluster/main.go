// Command cluster runs a test cluster for a person to try things in:
//
//	go run ./test/cluster/cmd/cluster up [-nodes 2]
//	go run ./test/cluster/cmd/cluster build
//
// up prints a KUBECONFIG and how to get onto the nodes, runs until it is
// interrupted, and then removes everything. build only builds the programs of
// Kubernetes and containerd, and Traefik, so that no test spends its time on
// that.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"syscall"

	"github.com/hearth-sh/hearth/test/cluster"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := run(ctx, os.Args[1:], os.Stdout, os.Stderr); err != nil {
		fmt.Fprintln(os.Stderr, "cluster:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, args []string, out, progress io.Writer) error {
	if len(args) == 1 && args[0] == "build" {
		dir, err := cluster.Tools(ctx, progress)
		if err != nil {
			return err
		}
		fmt.Fprintln(out, dir)
		traefik, err := cluster.TraefikBinary(ctx, progress)
		if err != nil {
			return err
		}
		fmt.Fprintln(out, traefik)
		return nil
	}
	if len(args) == 0 || args[0] != "up" {
		return errors.New("say what to do: cluster up [-nodes N], or cluster build")
	}
	flags := flag.NewFlagSet("cluster up", flag.ContinueOnError)
	nodes := flags.Int("nodes", 1, "how many nodes, 16 at most")
	if err := flags.Parse(args[1:]); err != nil {
		if errors.Is(err, flag.ErrHelp) {
			return nil
		}
		return err
	}
	if *nodes < 1 || *nodes > 16 {
		return fmt.Errorf("-nodes is from 1 to 16, not %d", *nodes)
	}
	options := cluster.Options{Progress: progress}
	for n := range *nodes {
		options.Nodes = append(options.Nodes, cluster.Node{Name: "node-" + string(rune('a'+n))})
	}
	c, err := cluster.New(ctx, options)
	if err != nil {
		return err
	}
	toolbox, err := cluster.GoBinary(ctx, "./test/cluster/images/toolbox")
	if err == nil {
		err = c.LoadBinaryImage(ctx, "hearth.test/toolbox:1", map[string]string{"/toolbox": toolbox})
	}
	if err != nil {
		return errors.Join(err, c.Close())
	}
	fmt.Fprintf(out, "export KUBECONFIG=%s\n", c.Kubeconfig())
	fmt.Fprintf(out, "# logs: %s/logs, %s/<node>/logs; image on every node: hearth.test/toolbox:1\n", c.Dir(), c.Dir())
	for _, m := range c.Nodes() {
		fmt.Fprintf(out, "# a shell on %s: %s\n", m.Name, m.Shell())
	}
	fmt.Fprintln(out, "# Interrupt (Ctrl-C) stops and removes it.")
	<-ctx.Done()
	return c.Close()
}
