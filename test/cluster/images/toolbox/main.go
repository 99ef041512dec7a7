// Command toolbox is what test pods run where others would take busybox: a
// static program whose first argument says what to do.
//
//	toolbox echo WORDS...         prints the words
//	toolbox exit CODE             exits
//	toolbox sleep DURATION        waits, or until SIGTERM
//	toolbox serve ADDRESS TEXT    answers every HTTP request with TEXT; ?work=20ms
//	                              costs that much processor time before
//	toolbox get URL               prints the body of a response; retries 30 s
//	toolbox api PATH              asks the API server as the pod's service account
//	toolbox cat FILE              prints a file
//	toolbox write FILE TEXT       writes a file
package main

import (
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/signal"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

const (
	// getFor is how long get tries: a Service may take seconds to be routed.
	getFor = 30 * time.Second
	// maxBody bounds what get prints.
	maxBody = 1 << 20
)

func main() {
	if err := run(os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "toolbox:", err)
		os.Exit(1)
	}
}

func run(args []string) error {
	if len(args) == 0 {
		return fmt.Errorf("say what to do: echo, exit, sleep, serve, get, api, cat or write")
	}
	verb, args := args[0], args[1:]
	need := map[string]int{"exit": 1, "sleep": 1, "serve": 2, "get": 1, "api": 1, "cat": 1, "write": 2}[verb]
	if len(args) < need {
		return fmt.Errorf("%s needs %d arguments, got %d", verb, need, len(args))
	}
	stop := make(chan os.Signal, 1)
	signal.Notify(stop, syscall.SIGTERM, syscall.SIGINT)
	switch verb {
	case "echo":
		fmt.Fprintln(os.Stdout, strings.Join(args, " "))
		return nil
	case "exit":
		code, err := strconv.Atoi(args[0])
		if err != nil {
			return err
		}
		os.Exit(code)
	case "sleep":
		d, err := time.ParseDuration(args[0])
		if err != nil {
			return err
		}
		select {
		case <-time.After(d):
		case <-stop:
		}
		return nil
	case "serve":
		server := &http.Server{Addr: args[0], ReadHeaderTimeout: 10 * time.Second, Handler: http.HandlerFunc(
			func(w http.ResponseWriter, r *http.Request) {
				if err := work(r.URL.Query().Get("work")); err != nil {
					http.Error(w, err.Error(), http.StatusBadRequest)
					return
				}
				fmt.Fprintln(w, args[1])
			})}
		failed := make(chan error, 1)
		go func() { failed <- server.ListenAndServe() }()
		select {
		case err := <-failed:
			return err
		case <-stop:
			return nil
		}
	case "get":
		return get(func() (*http.Response, error) {
			return (&http.Client{Timeout: 5 * time.Second}).Get(args[0])
		})
	case "api":
		return get(func() (*http.Response, error) { return askAPI(args[0]) })
	case "cat":
		file, err := os.Open(args[0])
		if err != nil {
			return err
		}
		defer file.Close()
		_, err = io.Copy(os.Stdout, file)
		return err
	case "write":
		return os.WriteFile(args[0], []byte(args[1]), 0o644)
	}
	return fmt.Errorf("unknown verb %q", verb)
}

// work takes processor time, not time that others have the processor.
func work(duration string) error {
	if duration == "" {
		return nil
	}
	want, err := time.ParseDuration(duration)
	if err != nil {
		return err
	}
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	start, err := threadTime()
	if err != nil {
		return err
	}
	for {
		now, err := threadTime()
		if err != nil || now-start >= want {
			return err
		}
	}
}

// threadTime is the processor time that this thread has had.
func threadTime() (time.Duration, error) {
	var usage unix.Rusage
	if err := unix.Getrusage(unix.RUSAGE_THREAD, &usage); err != nil {
		return 0, err
	}
	return time.Duration(usage.Utime.Nano() + usage.Stime.Nano()), nil
}

// get prints what ask returns, trying again when it fails.
func get(ask func() (*http.Response, error)) error {
	end := time.Now().Add(getFor)
	for {
		body, err := read(ask)
		if err == nil {
			fmt.Fprint(os.Stdout, body)
			return nil
		}
		if time.Now().After(end) {
			return err
		}
		time.Sleep(200 * time.Millisecond)
	}
}

func read(ask func() (*http.Response, error)) (string, error) {
	response, err := ask()
	if err != nil {
		return "", err
	}
	defer response.Body.Close()
	body, err := io.ReadAll(io.LimitReader(response.Body, maxBody))
	if err == nil && response.StatusCode != http.StatusOK {
		err = fmt.Errorf("the answer is %s: %s", response.Status, body)
	}
	return string(body), err
}

// askAPI does what every in-cluster client does, by hand.
func askAPI(path string) (*http.Response, error) {
	const account = "/var/run/secrets/kubernetes.io/serviceaccount/"
	token, err := os.ReadFile(account + "token")
	if err != nil {
		return nil, err
	}
	ca, err := os.ReadFile(account + "ca.crt")
	if err != nil {
		return nil, err
	}
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM(ca)
	server := net.JoinHostPort(os.Getenv("KUBERNETES_SERVICE_HOST"), os.Getenv("KUBERNETES_SERVICE_PORT"))
	request, err := http.NewRequest(http.MethodGet, "https://"+server+path, nil)
	if err != nil {
		return nil, err
	}
	request.Header.Set("Authorization", "Bearer "+string(token))
	client := &http.Client{Timeout: 5 * time.Second, Transport: &http.Transport{TLSClientConfig: &tls.Config{RootCAs: roots, MinVersion: tls.VersionTLS12}}}
	return client.Do(request)
}
