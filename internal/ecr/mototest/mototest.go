// Package mototest runs moto, an independent implementation of AWS's APIs, for
// tests: what talks to our own fakes only proves that we agree with ourselves.
package mototest

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"github.com/hearth-sh/hearth/test/needs"
)

const (
	// Version of moto that is installed.
	Version = "5.2.5"
	// installTimeout bounds installing it, once per machine.
	installTimeout = 5 * time.Minute
	// startTimeout bounds its start: it imports much Python.
	startTimeout = 2 * time.Minute
)

// ErrMissing: there is no moto here, and no way to install it.
var ErrMissing = errors.New("no moto here, which Python 3 and its package index would give")

// Start runs moto for as long as the test and returns its URL. It installs it
// below the user's cache directory first if need be. Where that is impossible
// the test is skipped, but with CI set it fails.
func Start(t testing.TB) string {
	t.Helper()
	log, err := os.Create(filepath.Join(t.TempDir(), "moto.log"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = log.Close() })
	url, stop, err := Run(t.Context(), log)
	if errors.Is(err, ErrMissing) {
		needs.Missing(t, "%v", err)
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		stop()
		if t.Failed() {
			if b, err := os.ReadFile(log.Name()); err == nil {
				t.Logf("moto: %s", b[max(0, len(b)-2000):])
			}
		}
	})
	return url
}

// Run is Start for tests that share one moto: it runs until the caller calls
// stop. ctx bounds installing and starting it only. What it says goes to log.
func Run(ctx context.Context, log *os.File) (url string, stop func(), err error) {
	python, err := install(ctx)
	if err != nil {
		return "", nil, fmt.Errorf("%w: %w", ErrMissing, err)
	}
	ln, err := (&net.ListenConfig{}).Listen(ctx, "tcp4", "127.0.0.1:0")
	if err != nil {
		return "", nil, err
	}
	address := ln.Addr().(*net.TCPAddr)
	_ = ln.Close() // moto takes a number, not a socket
	cmd := exec.CommandContext(context.WithoutCancel(ctx), python, "-m", "moto.server", "-H", "127.0.0.1", "-p", fmt.Sprint(address.Port))
	cmd.Stdout, cmd.Stderr, cmd.Env = log, log, append(os.Environ(), "PYTHONDONTWRITEBYTECODE=1")
	if err := cmd.Start(); err != nil {
		return "", nil, err
	}
	exited := make(chan struct{})
	go func() { _ = cmd.Wait(); close(exited) }()
	stop = func() { _ = cmd.Process.Kill(); <-exited }
	url = "http://" + address.String()
	if err := answers(ctx, url, exited); err != nil {
		stop()
		return "", nil, err
	}
	return url, stop, nil
}

// answers waits until moto answers.
func answers(ctx context.Context, url string, exited <-chan struct{}) error {
	client := &http.Client{Timeout: 5 * time.Second, Transport: &http.Transport{DisableKeepAlives: true}}
	for began := time.Now(); time.Since(began) < startTimeout; time.Sleep(50 * time.Millisecond) {
		select {
		case <-exited:
			return errors.New("moto ended at its start")
		default:
		}
		req, err := http.NewRequestWithContext(ctx, http.MethodGet, url+"/moto-api/", nil)
		if err != nil {
			return err
		}
		if resp, err := client.Do(req); err == nil {
			_ = resp.Body.Close()
			return nil
		}
	}
	return fmt.Errorf("moto did not start within %s", startTimeout)
}

// install returns the Python that has moto.
func install(ctx context.Context) (string, error) {
	cache, err := os.UserCacheDir()
	if err != nil {
		return "", err
	}
	dir := filepath.Join(cache, "hearth", "moto-"+Version)
	python := filepath.Join(dir, "bin", "python")
	if _, err := os.Stat(python); err == nil {
		return python, nil
	}
	if err := os.MkdirAll(filepath.Dir(dir), 0o755); err != nil {
		return "", err
	}
	// Made beside its place and renamed, since other tests may do the same now.
	tmp, err := os.MkdirTemp(filepath.Dir(dir), ".moto-")
	if err != nil {
		return "", err
	}
	defer func() { _ = os.RemoveAll(tmp) }()
	ctx, cancel := context.WithTimeout(ctx, installTimeout)
	defer cancel()
	for _, argv := range [][]string{
		{"python3", "-m", "venv", tmp},
		{filepath.Join(tmp, "bin", "python"), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "moto[server]==" + Version},
	} {
		if out, err := exec.CommandContext(ctx, argv[0], argv[1:]...).CombinedOutput(); err != nil {
			return "", fmt.Errorf("%s: %w: %.500s", argv[0], err, out)
		}
	}
	if err := os.Rename(tmp, dir); err != nil {
		if _, there := os.Stat(python); there != nil {
			return "", err
		}
	}
	return python, nil
}
