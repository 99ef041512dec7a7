// Command spin is hostile: a goroutine and the main one both never end.
package main

func main() {
	go spin()
	spin()
}

//go:noinline
func spin() {
	for i := 0; ; i++ {
		sink = i
	}
}

var sink int
