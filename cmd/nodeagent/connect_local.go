//go:build local

package main

import (
	"context"
	"time"

	"github.com/urfave/cli/v2"

	"github.com/hearth-sh/hearth/internal/client"
)

// errNoClusters refuses what a build for one machine cannot do.
func errNoClusters() error {
	return fail(exitUsage, "this nodeagent was built for one machine and knows no kubeconfig",
		"use one from `make build` or a package, or give the API's address with --api and a token with --token-file")
}

func connectCluster(context.Context, apiChoice, client.Options, bool) (*clusterWay, error) {
	return nil, errNoClusters()
}

func laterRemedy(error) (string, bool) { return "", false }

func mintToken(*cli.Context, apiChoice, time.Duration) (madeToken, error) {
	return madeToken{}, errNoClusters()
}
