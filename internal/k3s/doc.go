// Package k3s knows the files k3s reads and leaves: what to write so that a
// machine becomes the server or agent that its NodeConfig asks for, how to read
// what is there, and how to take away what k3s itself leaves behind.
//
// Render is pure: the same input gives the same files, as values of package
// host, which shows, writes and removes them. Secrets are in files of mode 0600
// of their own and in nothing else that is written here.
//
// The package elects nobody, joins nothing and starts nothing (packages
// election, join and systemd do). What it knows of k3s was read in k3s's source
// around v1.36; each path and format names its origin there.
package k3s
