package agent

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"os"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// settled is how long after its start an agent has run everything once.
const settled = 30 * time.Second

// releaseStart lets go, once the agent has settled, of the pages of its program
// file that only starting needed: the initialisers of some five hundred
// packages touch two thirds of it, never to come back. The pages are clean and
// stay in the page cache while there is room; what is used again is mapped
// again by a minor fault. Our own memory is not touched.
func (a *agent) releaseStart(ctx context.Context) {
	timer := time.NewTimer(settled)
	defer timer.Stop()
	select {
	case <-ctx.Done():
		return
	case <-timer.C:
	}
	released, err := releaseProgram()
	if err != nil {
		a.o.Logger.Debug("pages of the start are kept", "err", err)
		return
	}
	a.o.Logger.Debug("pages of the start were let go", "mapped", released)
}

// releaseProgram unmaps the pages of this program's file that were never
// written to, and returns how many bytes of mappings that concerns.
func releaseProgram() (int64, error) {
	program, err := os.Readlink("/proc/self/exe")
	if err != nil {
		return 0, fmt.Errorf("find this program's file: %w", err)
	}
	maps, err := os.Open("/proc/self/smaps")
	if err != nil {
		return 0, fmt.Errorf("read this program's mappings: %w", err)
	}
	defer maps.Close()
	ranges, err := cleanMappings(maps, program)
	if err != nil {
		return 0, err
	}
	var released int64
	for _, r := range ranges {
		size := r[1] - r[0]
		// A private mapping comes back from the file, see MADV_DONTNEED in
		// madvise(2). The address is none of Go's heap, hence no pointer.
		if _, _, errno := unix.Syscall(unix.SYS_MADVISE, r[0], size, unix.MADV_DONTNEED); errno != 0 {
			return released, fmt.Errorf("let go of %d bytes of %s: %w", size, program, errno)
		}
		released += int64(size)
	}
	return released, nil
}

// cleanMappings returns the first and the end address of each private mapping
// of a file that is not writable and holds nothing but the file's content. A
// dynamic loader writes relocations before it takes the permission away
// (RELRO), so the permission alone says nothing. From proc_pid_smaps(5):
//
//	00400000-02646000 r-xp 00000000 fe:00 1312  /usr/bin/nodeagent
//	Size:              35096 kB
//	...
//	Anonymous:             0 kB
//	Swap:                  0 kB
func cleanMappings(smaps io.Reader, file string) ([][2]uintptr, error) {
	var out [][2]uintptr
	var current [2]uintptr
	var considered bool
	lines := bufio.NewScanner(smaps)
	for lines.Scan() {
		fields := strings.Fields(lines.Text())
		switch {
		case len(fields) >= 5 && strings.Contains(fields[0], "-"):
			considered = len(fields) == 6 && fields[5] == file && !strings.Contains(fields[1], "w") && strings.HasSuffix(fields[1], "p")
			if !considered {
				continue
			}
			if _, err := fmt.Sscanf(fields[0], "%x-%x", &current[0], &current[1]); err != nil || current[0] >= current[1] {
				return nil, fmt.Errorf("this program's mapping %q is not understood", fields[0])
			}
		case considered && len(fields) == 3 && fields[0] == "Anonymous:":
			considered = fields[1] == "0"
		case considered && len(fields) == 3 && fields[0] == "Swap:":
			if considered = false; fields[1] == "0" {
				out = append(out, current)
			}
		}
	}
	if err := lines.Err(); err != nil {
		return nil, fmt.Errorf("read this program's mappings: %w", err)
	}
	return out, nil
}
