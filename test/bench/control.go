package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"runtime"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// control is what a guest's lateness is compared with: a native thread of this
// process that computes until the same deadline and then sends one byte on its
// way through two others, as an answer goes from worker to engine to client.
// It looks at the clock all the time and shares nothing with Hearth, so what
// it is late by is what the machine's scheduler takes from any program.
type control struct {
	turns chan time.Time
	first [2]int // pipes
	last  [2]int
	late  chan time.Duration
	done  chan struct{} // closed when all threads have ended
}

func newControl() (*control, error) {
	c := &control{turns: make(chan time.Time), late: make(chan time.Duration, 1), done: make(chan struct{})}
	if err := unix.Pipe2(c.first[:], unix.O_CLOEXEC); err != nil {
		return nil, fmt.Errorf("making the control: %w", err)
	}
	if err := unix.Pipe2(c.last[:], unix.O_CLOEXEC); err != nil {
		return nil, errors.Join(fmt.Errorf("making the control: %w", err), unix.Close(c.first[0]), unix.Close(c.first[1]))
	}
	deadlines := make(chan time.Time, 1)
	go func() {
		runtime.LockOSThread()
		defer unix.Close(c.first[1])
		for deadline := range c.turns {
			deadlines <- deadline
			for time.Now().Before(deadline) { //nolint:revive // being busy is the point
			}
			_, _ = unix.Write(c.first[1], []byte{0}) // fails when the reader has ended
		}
	}()
	go func() {
		runtime.LockOSThread()
		defer unix.Close(c.first[0])
		defer unix.Close(c.last[1])
		for readByte(c.first[0]) {
			_, _ = unix.Write(c.last[1], []byte{0}) // the same
		}
	}()
	go func() {
		runtime.LockOSThread()
		defer close(c.done)
		defer unix.Close(c.last[0])
		for readByte(c.last[0]) {
			c.late <- time.Since(<-deadlines)
		}
	}()
	return c, nil
}

// readByte blocks its thread, as ordinary programs do.
func readByte(fd int) bool {
	var b [1]byte
	for {
		n, err := unix.Read(fd, b[:])
		if !errors.Is(err, unix.EINTR) {
			return n == 1 && err == nil
		}
	}
}

// turn computes for as long as given and returns how late its answer came.
func (c *control) turn(length time.Duration) time.Duration {
	c.turns <- time.Now().Add(length)
	return <-c.late
}

func (c *control) close() {
	close(c.turns)
	<-c.done
}

// burnEnv makes this program a burner.
const burnEnv = "HEARTH_BENCH_BURN"

// burn takes a processor until stdin ends.
func burn() {
	go func() {
		_, _ = io.Copy(io.Discard, os.Stdin) // ends with the parent
		os.Exit(0)
	}()
	runtime.LockOSThread()
	for !time.Now().IsZero() { //nolint:revive // being busy is the point
	}
}

// startBurners runs n programs that each want a processor for themselves. Each
// has a session of its own, which kernels with autogroups treat as a user of
// its own.
func startBurners(ctx context.Context, n int) (stop func(), err error) {
	var ends []func()
	stop = func() {
		for _, end := range ends {
			end()
		}
	}
	self, err := os.Executable()
	if err != nil {
		return stop, err
	}
	for range n {
		cmd := exec.CommandContext(ctx, self)
		cmd.Env = append(os.Environ(), burnEnv+"=1")
		cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
		stdin, err := cmd.StdinPipe()
		if err == nil {
			err = cmd.Start()
		}
		if err != nil {
			stop()
			return func() {}, fmt.Errorf("starting a burner: %w", err)
		}
		ends = append(ends, func() {
			_ = stdin.Close()
			_ = cmd.Process.Kill() // fails when it has ended
			_ = cmd.Wait()         // it was killed
		})
	}
	return stop, nil
}
