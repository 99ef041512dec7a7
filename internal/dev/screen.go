package dev

import (
	"fmt"
	"io"
	"strings"
	"sync"
	"time"
)

// screen tells a person what is going on. On a terminal a step is shown while
// it runs and completed in place; elsewhere each step is one plain line.
type screen struct {
	mu       sync.Mutex
	w        io.Writer
	terminal bool
	colour   bool
	pending  string // the step shown without its end, on a terminal
}

const (
	green  = "32"
	yellow = "33"
	bold   = "1"
)

func (s *screen) paint(code, text string) string {
	if !s.colour {
		return text
	}
	return "\x1b[" + code + "m" + text + "\x1b[0m"
}

// step runs f and shows its name, then its result and duration.
func (s *screen) step(name string, f func() (detail string, err error)) error {
	s.mu.Lock()
	if s.terminal {
		s.pending = "  … " + name
		fmt.Fprint(s.w, s.pending)
	}
	s.mu.Unlock()
	began := time.Now()
	detail, err := f()
	took := time.Since(began).Seconds()
	s.mu.Lock()
	defer s.mu.Unlock()
	s.clear()
	s.pending = ""
	if err != nil {
		fmt.Fprintf(s.w, "  %s %s\n", s.paint(yellow, "✗"), name)
		return err
	}
	if detail != "" {
		name += ": " + detail
	}
	fmt.Fprintf(s.w, "  %s %-60s %6.2f s\n", s.paint(green, "✓"), name, took)
	return nil
}

// say prints whole lines between steps.
func (s *screen) say(format string, args ...any) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.clear()
	fmt.Fprintf(s.w, format+"\n", args...)
	if s.pending != "" {
		fmt.Fprint(s.w, s.pending)
	}
}

// clear takes a pending step off the terminal. Callers hold mu.
func (s *screen) clear() {
	if s.terminal && s.pending != "" {
		fmt.Fprint(s.w, "\r"+strings.Repeat(" ", len([]rune(s.pending)))+"\r")
	}
}
