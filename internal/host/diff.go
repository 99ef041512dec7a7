package host

import (
	"fmt"
	"strings"
	"unicode/utf8"
)

const (
	// diffContext is how many equal lines are shown around a change.
	diffContext = 3
	// maxDiffCells bounds the table of the comparison: lines before times lines
	// after. Configuration files are far below it.
	maxDiffCells = 4 << 20
)

// unified is a unified diff between two texts ("" if they are equal), or a
// sentence where one cannot be made.
func unified(name, before, after string) string {
	if before == after {
		return ""
	}
	if !utf8.ValidString(before) || !utf8.ValidString(after) || strings.ContainsRune(before+after, 0) {
		return fmt.Sprintf("binary content differs: %d bytes become %d\n", len(before), len(after))
	}
	a, b := lines(before), lines(after)
	if (len(a)+1)*(len(b)+1) > maxDiffCells {
		return fmt.Sprintf("too long to compare line by line: %d lines become %d\n", len(a), len(b))
	}
	edits := compareLines(a, b)
	var out strings.Builder
	fmt.Fprintf(&out, "--- %s\n+++ %s\n", name, name)
	for start := 0; start < len(edits); {
		if edits[start].op == ' ' {
			start++
			continue
		}
		// A hunk ends where more than twice the context is equal.
		end, equal := start, 0
		for i := start; i < len(edits) && equal <= 2*diffContext; i++ {
			if edits[i].op == ' ' {
				equal++
			} else {
				equal, end = 0, i+1
			}
		}
		first, last := max(start-diffContext, 0), min(end+diffContext, len(edits))
		hunk(&out, edits, first, last)
		start = last
	}
	return out.String()
}

// lines splits a text and marks a last line without an end, as diff does.
func lines(s string) (out []string) {
	for line := range strings.Lines(s) {
		if !strings.HasSuffix(line, "\n") {
			line += "\n\\ No newline at end of file\n"
		}
		out = append(out, line)
	}
	return out
}

type edit struct {
	op   byte // ' ', '-' or '+'
	line string
}

// compareLines finds a shortest edit through the longest common subsequence.
func compareLines(a, b []string) []edit {
	common := make([][]int32, len(a)+1)
	for i := range common {
		common[i] = make([]int32, len(b)+1)
	}
	for i := len(a) - 1; i >= 0; i-- {
		for j := len(b) - 1; j >= 0; j-- {
			if a[i] == b[j] {
				common[i][j] = common[i+1][j+1] + 1
			} else {
				common[i][j] = max(common[i+1][j], common[i][j+1])
			}
		}
	}
	var out []edit
	i, j := 0, 0
	for i < len(a) || j < len(b) {
		switch {
		case i < len(a) && j < len(b) && a[i] == b[j]:
			out = append(out, edit{' ', a[i]})
			i, j = i+1, j+1
		case j == len(b) || i < len(a) && common[i+1][j] >= common[i][j+1]:
			out = append(out, edit{'-', a[i]})
			i++
		default:
			out = append(out, edit{'+', b[j]})
			j++
		}
	}
	return out
}

func hunk(out *strings.Builder, edits []edit, first, last int) {
	var beforeStart, afterStart, before, after int
	for i, e := range edits[:last] {
		if e.op != '+' {
			if i < first {
				beforeStart++
			} else {
				before++
			}
		}
		if e.op != '-' {
			if i < first {
				afterStart++
			} else {
				after++
			}
		}
	}
	// An empty range names the line before it.
	if before > 0 {
		beforeStart++
	}
	if after > 0 {
		afterStart++
	}
	fmt.Fprintf(out, "@@ -%d,%d +%d,%d @@\n", beforeStart, before, afterStart, after)
	for _, e := range edits[first:last] {
		out.WriteByte(e.op)
		out.WriteString(e.line)
	}
}
