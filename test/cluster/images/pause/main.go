// Command pause holds the namespaces of a pod and does nothing else: the
// sandbox image of the clusters of tests, which can pull none.
package main

import (
	"os"
	"os/signal"
	"syscall"
)

func main() {
	// As the first process of a pod's namespace it would inherit orphans, but
	// only where a pod shares its process namespace; the kernel reaps them for
	// a parent that ignores SIGCHLD.
	signal.Ignore(syscall.SIGCHLD)
	stop := make(chan os.Signal, 1)
	signal.Notify(stop, syscall.SIGTERM, syscall.SIGINT)
	<-stop
}
