package nodeconfig

import (
	"cmp"
	"fmt"
	"slices"
	"strings"
	"unicode"

	"github.com/hearth-sh/hearth/internal/bootstrap/fault"
)

// Origin is where a value came from.
type Origin struct {
	// Source is the file's path, "user-data", "tag KEY", "built-in profile
	// POOL", "default", "instance metadata", or what a default follows from.
	Source string `json:"source"`
	// Part is the number of the MIME part of user-data, from 1; 0 where there
	// are none.
	Part int `json:"part,omitempty"`
	// File is the path of the file that user-data's cloud-config would write.
	File string `json:"file,omitempty"`
	// Line is the line within the part or file, from 1; 0 where there are none.
	Line int `json:"line,omitempty"`
}

// String is the origin in a sentence, such as "user-data part 2, line 14".
func (o Origin) String() string {
	var b strings.Builder
	b.WriteString(o.Source)
	if o.Part > 0 {
		fmt.Fprintf(&b, " part %d", o.Part)
	}
	if o.File != "" {
		b.WriteString(", write_files " + o.File)
	}
	if o.Line > 0 {
		fmt.Fprintf(&b, ", line %d", o.Line)
	}
	// Names come from outside and end up in comments and on terminals.
	return strings.Map(func(r rune) rune {
		if !unicode.IsPrint(r) {
			return '?'
		}
		return r
	}, b.String())
}

// Problem is one thing that is wrong with the configuration.
type Problem struct {
	// Path is the field, such as spec.k3s.version; empty when the problem is
	// with the source as a whole.
	Path string `json:"path,omitempty"`
	// Origin is where it was said; its Source is empty for what nobody said.
	Origin Origin `json:"origin,omitzero"`
	// Message says what is wrong and how to put it right. It holds no value
	// that looks like a secret.
	Message string `json:"message"`

	code fault.Code
	// secret marks a credential, of which nothing else need be said.
	secret bool
	// missing marks what nobody said, which may be due to another problem.
	missing bool
}

// String is the problem in one line.
func (p Problem) String() string {
	var parts []string
	if p.Origin.Source != "" {
		parts = append(parts, p.Origin.String())
	}
	if p.Path != "" {
		parts = append(parts, p.Path)
	}
	return strings.Join(append(parts, p.Message), ": ")
}

// Invalid is the error that lists all problems of a configuration.
type Invalid struct {
	// Problems has at least one, at most MaxProblems, in the order of sources
	// and lines.
	Problems []Problem
	// Notes say what was read and not used, such as user-data that is for
	// somebody else.
	Notes []string
}

// Error lists the problems, one a line when there are several.
func (e *Invalid) Error() string {
	if len(e.Problems) == 1 {
		return e.Problems[0].String()
	}
	lines := make([]string, len(e.Problems))
	for i, p := range e.Problems {
		lines[i] = "\n  " + p.String()
	}
	return fmt.Sprintf("%d problems:", len(lines)) + strings.Join(lines, "")
}

var remedies = map[fault.Code]string{
	CodeInvalid:    "correct it there; `bootstrap config check` says whether it is right, `bootstrap config schema` what may be said",
	CodeMissing:    "put a NodeConfig into user-data or /etc/hearth/*.yaml, or name the file with --config",
	CodeUnreadable: "make it a readable file of at most 256 KiB",
	CodeUserData:   "give the instance user-data that is YAML or a MIME message, plain or compressed with gzip, of at most 16 KiB",
	CodeSpotServer: "run servers on demand, or set spec.node.allowSpotServer: true if losing a member of etcd at two minutes' notice is acceptable",
}

// problems collects what is wrong.
type problems struct {
	list  []Problem
	notes []string
}

func (ps *problems) add(p Problem) {
	if p.code == "" {
		p.code = CodeInvalid
	}
	said := slices.ContainsFunc(ps.list, func(o Problem) bool {
		return o == p || o.secret && o.Path == p.Path && o.Origin.Source == p.Origin.Source
	})
	if len(ps.list) < MaxProblems && !said {
		ps.list = append(ps.list, p)
	}
}

func (ps *problems) addf(o Origin, path, format string, args ...any) {
	ps.add(Problem{Path: path, Origin: o, Message: fmt.Sprintf(format, args...)})
}

// full says that nothing more will be listed, so that nobody need look.
func (ps *problems) full() bool { return len(ps.list) >= MaxProblems }

// err is the classified failure, or nil.
func (ps *problems) err() error {
	list := ps.list
	// What is missing may well be there under a misspelt name.
	if said := slices.DeleteFunc(slices.Clone(list), func(p Problem) bool { return p.missing }); len(said) > 0 {
		list = said
	}
	if len(list) == 0 {
		return nil
	}
	sources := map[string]int{}
	for _, p := range list {
		if _, known := sources[p.Origin.Source]; !known {
			sources[p.Origin.Source] = len(sources)
		}
	}
	list = slices.SortedStableFunc(slices.Values(list), func(a, b Problem) int {
		return cmp.Or(cmp.Compare(sources[a.Origin.Source], sources[b.Origin.Source]), cmp.Compare(a.Origin.Part, b.Origin.Part),
			cmp.Compare(a.Origin.File, b.Origin.File), cmp.Compare(a.Origin.Line, b.Origin.Line))
	})
	code := list[0].code
	for _, p := range list {
		if p.code == CodeUserData || p.code == CodeUnreadable {
			code = p.code // the others may be due to what could not be read
			break
		}
	}
	message := "the configuration is not valid"
	switch code {
	case CodeMissing:
		message = "there is no NodeConfig"
	case CodeUnreadable:
		message = "the configuration cannot be read"
	case CodeUserData:
		message = "user-data cannot be understood"
	}
	return fault.New(code, &Invalid{Problems: list, Notes: ps.notes}, remedies[code], "%s", message)
}
