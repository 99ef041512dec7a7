package images

import (
	"fmt"
	"strings"
	"unicode"
	"unicode/utf8"
)

const (
	// MaxListImages bounds the images of one list.
	MaxListImages = 2000
	// maxListBytes bounds one list; an API object is smaller than that.
	maxListBytes = 1 << 20
	// maxListProblems bounds how many bad lines are reported.
	maxListProblems = 5
)

// ListEntry is one line of a list of images.
type ListEntry struct {
	Reference Reference
	// Handler is the runtime handler to warm the image for, empty for none.
	Handler string
}

// ParseList reads a list of images, one per line:
//
//	# a comment
//	registry.example/app@sha256:…
//	registry.example/other:1.2 handler=spin
//
// Blank lines and everything after "#" at the start of a word are ignored. A
// bad line spoils only itself; problems has one sentence for each of the
// first few. At most [MaxListImages] entries are returned, duplicates once.
func ParseList(text string) (entries []ListEntry, problems []string) {
	problem := func(format string, args ...any) {
		if len(problems) < maxListProblems {
			problems = append(problems, fmt.Sprintf(format, args...))
		}
	}
	if len(text) > maxListBytes {
		text = text[:maxListBytes]
		problem("the list has more than %d bytes, the rest is ignored", maxListBytes)
	}
	text = strings.TrimPrefix(text, "\ufeff")
	seen := make(map[ListEntry]bool)
	number := 0
lines:
	for line := range strings.Lines(text) {
		number++
		if !utf8.ValidString(line) {
			problem("line %d is not UTF-8", number)
			continue
		}
		var e ListEntry
		for i, word := range strings.FieldsFunc(line, unicode.IsSpace) {
			if word[0] == '#' {
				break
			}
			if i == 0 {
				r, err := ParseReference(word)
				if err != nil {
					problem("line %d: %v", number, err)
					continue lines
				}
				e.Reference = r
				continue
			}
			h, ok := strings.CutPrefix(word, "handler=")
			if !ok || !validHandler(h) {
				problem("line %d: %.60q is not understood; after the image only handler=<name> may follow", number, word)
				continue lines
			}
			e.Handler = h
		}
		if e.Reference.Name == "" || seen[e] {
			continue
		}
		if len(entries) == MaxListImages {
			problem("line %d: a list has at most %d images, the rest is ignored", number, MaxListImages)
			break
		}
		seen[e] = true
		entries = append(entries, e)
	}
	return entries, problems
}

// validHandler follows the API's rule for RuntimeClass.handler: a DNS label.
func validHandler(s string) bool {
	if s == "" || len(s) > 63 || s[0] == '-' || s[len(s)-1] == '-' {
		return false
	}
	for _, c := range []byte(s) {
		if (c < 'a' || c > 'z') && (c < '0' || c > '9') && c != '-' {
			return false
		}
	}
	return true
}
