package harness

import (
	"bufio"
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"
)

// Process is one process of a Dev.
type Process struct {
	PID int
	// Role is the subcommand it runs: dev, run, engine, worker, precompile.
	Role string
}

func (p Process) String() string { return fmt.Sprintf("%s(%d)", p.Role, p.PID) }

// Processes lists the living processes of this dev, parent first, found by
// the session they were started in. Zombies are not counted: they are their
// parent's to reap and do nothing.
func (d *Dev) Processes() []Process {
	dirs, err := filepath.Glob("/proc/[0-9]*/stat")
	if err != nil {
		return nil
	}
	var out []Process
	for _, path := range dirs {
		stat, err := os.ReadFile(path)
		if err != nil {
			continue // gone meanwhile
		}
		// pid (comm) state ppid pgrp session …; comm may hold anything.
		end := bytes.LastIndexByte(stat, ')')
		if end < 0 {
			continue
		}
		fields := strings.Fields(string(stat[end+1:]))
		if len(fields) < 4 || fields[3] != strconv.Itoa(d.PID()) || fields[0] == "Z" || fields[0] == "X" {
			continue
		}
		pid, err := strconv.Atoi(filepath.Base(filepath.Dir(path)))
		if err != nil {
			continue
		}
		out = append(out, Process{PID: pid, Role: role(pid)})
	}
	slices.SortFunc(out, func(a, b Process) int { return a.PID - b.PID })
	return out
}

func role(pid int) string {
	cmdline, err := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid))
	if err != nil {
		return "?"
	}
	argv := strings.Split(string(cmdline), "\x00")
	for _, arg := range argv[min(1, len(argv)):] {
		if arg != "" && !strings.HasPrefix(arg, "-") {
			return arg
		}
	}
	return "?"
}

// PIDs lists the process ids that have the role.
func (d *Dev) PIDs(role string) []int {
	var out []int
	for _, p := range d.Processes() {
		if p.Role == role {
			out = append(out, p.PID)
		}
	}
	return out
}

// Memory is what processes use, in bytes.
type Memory struct {
	// RSS counts shared pages once per process, PSS divides them among the
	// processes that share them, Private is what would be freed if each
	// process alone ended.
	RSS, PSS, Private uint64
}

// Memory adds up the memory of all processes of this dev.
func (d *Dev) Memory() (Memory, error) {
	var sum Memory
	for _, p := range d.Processes() {
		m, err := memory(p.PID)
		if err != nil {
			if os.IsNotExist(err) {
				continue
			}
			return sum, err
		}
		sum.RSS += m.RSS
		sum.PSS += m.PSS
		sum.Private += m.Private
	}
	return sum, nil
}

func memory(pid int) (Memory, error) {
	// Format: proc(5), smaps_rollup; values in kB.
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/smaps_rollup", pid))
	if err != nil {
		return Memory{}, err
	}
	var m Memory
	lines := bufio.NewScanner(bytes.NewReader(b))
	for lines.Scan() {
		fields := strings.Fields(lines.Text())
		if len(fields) < 2 {
			continue
		}
		kb, err := strconv.ParseUint(fields[1], 10, 64)
		if err != nil {
			continue
		}
		switch fields[0] {
		case "Rss:":
			m.RSS += kb << 10
		case "Pss:":
			m.PSS += kb << 10
		case "Private_Clean:", "Private_Dirty:":
			m.Private += kb << 10
		}
	}
	return m, lines.Err()
}

// CPU is the processor time that the threads of all processes of one role
// have used.
func (d *Dev) CPU(role string) time.Duration {
	var sum time.Duration
	for _, pid := range d.PIDs(role) {
		threads, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/schedstat", pid))
		if err != nil {
			continue
		}
		for _, path := range threads {
			// The first field is the time on a processor in nanoseconds (kernel
			// documentation, scheduler/sched-stats); stat(5) has only 10 ms steps.
			b, err := os.ReadFile(path)
			if err != nil {
				continue // gone meanwhile
			}
			first, _, _ := strings.Cut(string(b), " ")
			if ns, err := strconv.ParseInt(first, 10, 64); err == nil {
				sum += time.Duration(ns)
			}
		}
	}
	return sum
}
