// Command cgi serves an ordinary http.Handler through net/http/cgi.
package main

import (
	"fmt"
	"io"
	"net/http"
	"net/http/cgi"
	"os"
)

func main() {
	err := cgi.Serve(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		body, err := io.ReadAll(r.Body)
		if err != nil {
			http.Error(w, err.Error(), http.StatusBadRequest)
			return
		}
		w.Header().Set("X-Guest", "go-cgi")
		w.WriteHeader(http.StatusAccepted)
		fmt.Fprintf(w, "%s %s q=%s ua=%s body=%s\n", r.Method, r.URL.Path, r.URL.Query().Get("q"), r.UserAgent(), body)
	}))
	if err != nil {
		fmt.Fprintln(os.Stderr, "serving:", err)
		os.Exit(1)
	}
}
