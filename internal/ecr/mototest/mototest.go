// Package mototest runs moto, an independent implementation of AWS's APIs, for
// tests: what talks to our own fakes only proves that we agree with ourselves.
package mototest

import (
	"context"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"
)

const (
	// Version of moto that is installed.
	Version = "5.2.5"
	// installTimeout bounds installing it, once per machine.
	installTimeout = 5 * time.Minute
	// startTimeout bounds its start: it imports much Python.
	startTimeout = 2 * time.Minute
)

// Start runs moto for as long as the test and returns its URL. It installs it
// below the user's cache directory first if need be. Where that is impossible
// the test is skipped, but with CI set it fails.
func Start(t testing.TB) string {
	t.Helper()
	python, err := install(t.Context())
	if err != nil {
		missing(t, "no moto here, which Python 3 and its package index would give: %v", err)
	}
	ln, err := (&net.ListenConfig{}).Listen(t.Context(), "tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	address := ln.Addr().(*net.TCPAddr)
	_ = ln.Close() // moto takes a number, not a socket
	log, err := os.Create(filepath.Join(t.TempDir(), "moto.log"))
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	cmd := exec.CommandContext(ctx, python, "-m", "moto.server", "-H", "127.0.0.1", "-p", fmt.Sprint(address.Port))
	cmd.Stdout, cmd.Stderr, cmd.Env = log, log, append(os.Environ(), "PYTHONDONTWRITEBYTECODE=1")
	if err := cmd.Start(); err != nil {
		cancel()
		t.Fatal(err)
	}
	exited := make(chan struct{})
	go func() { _ = cmd.Wait(); close(exited) }()
	t.Cleanup(func() {
		cancel()
		<-exited
		_ = log.Close()
		if t.Failed() {
			if b, err := os.ReadFile(log.Name()); err == nil {
				t.Logf("moto: %s", b[max(0, len(b)-2000):])
			}
		}
	})
	url := "http://" + address.String()
	client := &http.Client{Timeout: 5 * time.Second, Transport: &http.Transport{DisableKeepAlives: true}}
	for began := time.Now(); time.Since(began) < startTimeout; time.Sleep(50 * time.Millisecond) {
		select {
		case <-exited:
			t.Fatal("moto ended at its start")
		default:
		}
		req, err := http.NewRequestWithContext(ctx, http.MethodGet, url+"/moto-api/", nil)
		if err != nil {
			t.Fatal(err)
		}
		if resp, err := client.Do(req); err == nil {
			_ = resp.Body.Close()
			return url
		}
	}
	t.Fatal("moto did not start in time")
	return ""
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

func missing(t testing.TB, format string, args ...any) {
	t.Helper()
	if os.Getenv("CI") != "" {
		t.Fatalf(format, args...)
	}
	t.Skipf(format, args...)
}
