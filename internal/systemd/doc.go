// Package systemd starts, watches and stops units through systemd's D-Bus
// interface (org.freedesktop.systemd1(5)), and writes to the journal.
//
// A unit with Type=notify may take minutes to say that it is ready, or never
// do; `systemctl start` then blocks for as long. Here a job is only put into the
// queue, and the unit is watched under a deadline of the caller's, with progress
// reported and every way to fail told apart: no such unit, a broken one, one
// that failed, one that is restarted again and again, one that takes too long.
//
// The package knows no unit by name. It reads unit files no further than to
// tell whether a running service is older than what it was started from.
package systemd
