//go:build !local

package main

import (
	"context"
	"errors"
	"io"
	"time"

	"github.com/urfave/cli/v2"

	"github.com/hearth-sh/hearth/internal/client"
	"github.com/hearth-sh/hearth/internal/connect"
)

// connectWait bounds finding the API and opening the way to it.
const connectWait = 45 * time.Second

func loadCluster(a apiChoice, userAgent string, noPrompt bool) (*connect.Cluster, error) {
	cluster, err := connect.Load(connect.Options{
		Kubeconfig: a.Kubeconfig, Context: a.Context, Namespace: a.SystemNamespace, ServiceAccount: a.Account,
		UserAgent: userAgent, NoPrompt: noPrompt,
	})
	return cluster, clusterError(err)
}

// connectCluster opens the way to the API of a cluster. ctx bounds only that.
func connectCluster(ctx context.Context, a apiChoice, o client.Options, interactive bool) (*clusterWay, error) {
	cluster, err := loadCluster(a, o.UserAgent, !interactive)
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, connectWait)
	defer cancel()
	k, err := cluster.Connect(ctx, connect.ConnectOptions{Token: o.Token, RootCAs: o.RootCAs})
	if err != nil {
		cluster.Close()
		return nil, clusterError(err)
	}
	return &clusterWay{
		url: k.URL(), name: k.String(), tenant: cluster.Tenant(),
		transport: k.RoundTripper(), token: k.Token, closer: closers{k, closeFunc(cluster.Close)},
	}, nil
}

// clusterError turns an error of package connect into an exit error.
func clusterError(err error) error {
	var known *connect.Error
	switch {
	case err == nil:
		return nil
	case !errors.As(err, &known):
		return err
	case errors.Is(err, context.Canceled):
		return context.Canceled
	case known.Usage:
		return fail(exitUsage, printable(known.Message), printable(known.Remedy))
	case known.Denied:
		return fail(exitRefused, printable(known.Message), printable(known.Remedy))
	}
	return fail(exitUnreachable, printable(known.Message), printable(known.Remedy))
}

// laterRemedy is what to do about an error of the way to a cluster that was
// open before.
func laterRemedy(err error) (string, bool) {
	var known *connect.Error
	if errors.As(err, &known) {
		return printable(known.Remedy), true
	}
	return "", false
}

type closers []io.Closer

func (all closers) Close() error {
	var errs []error
	for _, c := range all {
		errs = append(errs, c.Close())
	}
	return errors.Join(errs...)
}

type closeFunc func()

func (f closeFunc) Close() error { f(); return nil }

// mintToken makes a token for people and scripts that use --api.
func mintToken(c *cli.Context, a apiChoice, lifetime time.Duration) (madeToken, error) {
	cluster, err := loadCluster(a, "nodeagent/"+c.App.Version, false)
	if err != nil {
		return madeToken{}, err
	}
	defer cluster.Close()
	made, err := cluster.NewToken(c.Context, lifetime)
	if err != nil {
		return madeToken{}, clusterError(err)
	}
	return madeToken{
		Token: made.Value, ExpiresAt: made.ExpiresAt, Audience: connect.Audience,
		ServiceAccount: made.ServiceAccount, Cluster: cluster.String(),
	}, nil
}
