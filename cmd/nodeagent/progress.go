package main

import (
	"fmt"
	"io"
	"sync"
	"time"
)

// progressInterval is how often a step's numbers are redrawn: faster only
// flickers.
const progressInterval = 100 * time.Millisecond

// progress shows what a command is doing on stderr: one line that is redrawn
// on a terminal, one line a step elsewhere. Safe for concurrent use.
type progress struct {
	w     io.Writer
	term  terminal
	quiet bool

	mu      sync.Mutex
	step    string
	drawn   bool
	lastPut time.Time
}

// newProgress writes to w; quiet says nothing unless w is a terminal.
func newProgress(w io.Writer, quiet bool) *progress {
	t := terminalOf(w)
	return &progress{w: w, term: t, quiet: quiet && !t.tty}
}

// start begins a step, such as "building hello".
func (p *progress) start(step string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if step == p.step {
		return
	}
	p.step = step
	if p.quiet {
		return
	}
	if p.term.tty {
		p.redraw(step + " …")
		return
	}
	_, _ = fmt.Fprintln(p.w, step+" …")
}

// update shows how far the step is, on a terminal only.
func (p *progress) update(detail string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if !p.term.tty || time.Since(p.lastPut) < progressInterval {
		return
	}
	p.redraw(p.step + " " + detail)
}

// note says something that should stay on the screen.
func (p *progress) note(text string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.quiet {
		return
	}
	p.clear()
	_, _ = fmt.Fprintln(p.w, text)
	if p.term.tty && p.step != "" {
		p.redraw(p.step + " …")
	}
}

// stop removes the line that is being redrawn.
func (p *progress) stop() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.clear()
	p.step = ""
}

func (p *progress) redraw(text string) {
	if runes := []rune(text); len(runes) >= p.term.width {
		text = string(runes[:max(0, p.term.width-1)]) // a wrapped line cannot be redrawn
	}
	_, _ = fmt.Fprint(p.w, "\r\x1b[K"+p.term.paint(cyan, text))
	p.drawn, p.lastPut = true, time.Now()
}

func (p *progress) clear() {
	if p.drawn {
		_, _ = fmt.Fprint(p.w, "\r\x1b[K")
		p.drawn = false
	}
}
