// Command api stands for the submit API in the pods of this package's tests:
// it serves https with the key pair in a directory, says which pod answered
// and what token it got, and follows a log that never ends.
//
//	api ADDRESS DIRECTORY
package main

import (
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"
	"time"
)

func main() {
	if len(os.Args) != 3 {
		fmt.Fprintln(os.Stderr, "usage: api ADDRESS DIRECTORY")
		os.Exit(2)
	}
	pod, err := os.Hostname()
	if err != nil {
		panic(err)
	}
	mux := http.NewServeMux()
	mux.HandleFunc("/v1/functions/{name}", func(w http.ResponseWriter, r *http.Request) {
		n, _ := io.Copy(io.Discard, r.Body)
		w.Header().Set("Content-Type", "application/json")
		_ = json.NewEncoder(w).Encode(map[string]any{
			"name": pod, "image": strings.TrimPrefix(r.Header.Get("Authorization"), "Bearer "), "url": r.Proto, "revision": n,
		})
	})
	mux.HandleFunc("/v1/functions/{name}/logs", func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Type", "application/x-ndjson")
		for {
			_ = json.NewEncoder(w).Encode(map[string]any{"time": time.Now().UTC(), "function": r.PathValue("name"), "revision": 1, "stream": "stderr", "line": pod})
			if http.NewResponseController(w).Flush() != nil {
				return
			}
			select {
			case <-r.Context().Done():
				return
			case <-time.After(50 * time.Millisecond):
			}
		}
	})
	server := &http.Server{Addr: os.Args[1], Handler: mux, ReadHeaderTimeout: 10 * time.Second}
	failed := make(chan error, 1)
	go func() {
		failed <- server.ListenAndServeTLS(filepath.Join(os.Args[2], "tls.crt"), filepath.Join(os.Args[2], "tls.key"))
	}()
	stop := make(chan os.Signal, 1)
	signal.Notify(stop, syscall.SIGTERM)
	select {
	case err := <-failed:
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	case <-stop:
	}
}
