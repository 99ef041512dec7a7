// Command hello-go is the smallest useful Hearth function in Go: it reads the
// request from the environment and standard input, as RFC 3875 (CGI)
// describes, and writes a response to standard output.
//
// It avoids net/http on purpose: that package makes the module three times
// as large. A program that prefers handlers can call net/http/cgi.Serve.
package main

import (
	"cmp"
	"fmt"
	"net/url"
	"os"
)

func main() {
	query, err := url.ParseQuery(os.Getenv("QUERY_STRING"))
	if err != nil {
		fmt.Print("Status: 400 Bad Request\r\nContent-Type: text/plain; charset=utf-8\r\n\r\n")
		fmt.Println("the query string cannot be read:", err)
		return
	}
	name := cmp.Or(query.Get("name"), os.Getenv("GREETING_NAME"), "world")

	// The header block ends with an empty line; everything after it is the body.
	fmt.Print("Content-Type: text/plain; charset=utf-8\r\n\r\n")
	fmt.Printf("Hello, %s, from Go!\n", name)

	// Standard error goes to the function's log.
	fmt.Fprintln(os.Stderr, "greeted", name)
}
