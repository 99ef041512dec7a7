package access

import (
	"bufio"
	"bytes"
	"context"
	"crypto/rand"
	"crypto/sha256"
	"crypto/subtle"
	"encoding/base64"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"os"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/hearth-sh/hearth/internal/function"
)

const (
	// maxFileBytes and maxTokens bound a token file: each request compares
	// its token with all of them.
	maxFileBytes = 1 << 20
	maxTokens    = 1000
	maxUserBytes = 256
	// settled is how old a file must be before its time and size are believed
	// to show every change: file systems keep time in ticks of up to 2 s.
	settled = 2 * time.Second

	hashPrefix  = "sha256:"
	tokenPrefix = "hearth_"
	allTenants  = "*"
	readOnly    = ":read"
)

// File is access to one machine by a file of tokens.
//
// The file is text of at most 1 MiB and 1000 tokens. A line is a token:
//
//	sha256:<64 hexadecimal digits> <user> <tenants>
//
// with the SHA-256 of the token, the name of who has it, and a comma-separated
// list of the tenants whose functions the token may do everything with;
// "<tenant>:read" allows to get, list and read logs only, "*" and "*:read" mean
// every tenant. Fields are separated by spaces or tabs. Empty lines and lines
// that begin with # mean nothing. A token's hash may be there once; a user may
// have several tokens, each with its own rights.
//
// The hash has no salt and takes no time to compute: tokens must be random, as
// GenerateToken makes them, not chosen by people.
//
// Changes hold from the next request on. A file that cannot be read, that
// somebody but its owner can write, or that has an error lets nobody in
// (ErrUnavailable): rights that were just taken away must not live on because
// of a slip in another line. Replace the file by renaming another over it.
type File struct {
	path string
	now  func() time.Time
	log  *slog.Logger

	// mu keeps two requests from reading the file at once, and guards what
	// was read.
	mu      sync.Mutex
	seen    fileState
	sure    bool // seen was settled when it was read
	entries []entry
	err     error
}

// fileState is what changes when a file does.
type fileState struct {
	modified time.Time
	size     int64
	inode    uint64
}

type entry struct {
	hash  [sha256.Size]byte
	user  string
	grant *grant
}

// grant maps a tenant, or allTenants, to whether it may be changed.
type grant map[string]bool

// FileOptions of OpenFile. The zero value is good.
type FileOptions struct {
	// Now is the clock; nil means time.Now.
	Now func() time.Time
	// Logger is told when the file changed or cannot be used; nil discards it.
	Logger *slog.Logger
}

// OpenFile reads the file once, so that its errors are seen at the start.
func OpenFile(path string, o FileOptions) (*File, error) {
	f := &File{path: path, now: o.Now, log: o.Logger}
	if f.now == nil {
		f.now = time.Now
	}
	if f.log == nil {
		f.log = slog.New(slog.DiscardHandler)
	}
	if _, err := f.current(); err != nil {
		return nil, err
	}
	return f, nil
}

// Authenticate finds the caller by the request's bearer token. Errors are an
// *UnauthenticatedError or match ErrUnavailable.
func (f *File) Authenticate(_ context.Context, r *http.Request) (Caller, error) {
	const remedy = "Send Authorization: Bearer <token>, with a token whose SHA-256 is in the server's token file"
	token, err := BearerToken(r)
	if err != nil {
		var ue *UnauthenticatedError
		if errors.As(err, &ue) {
			ue.Remedy = remedy
		}
		return Caller{}, err
	}
	entries, err := f.current()
	if err != nil {
		return Caller{}, fmt.Errorf("%w: %w", ErrUnavailable, err)
	}
	sum := sha256.Sum256([]byte(token))
	// All of them, whichever matches: the time taken says nothing.
	found := -1
	for i := range entries {
		if subtle.ConstantTimeCompare(sum[:], entries[i].hash[:]) == 1 {
			found = i
		}
	}
	if found < 0 {
		return Caller{}, &UnauthenticatedError{Presented: true, Reason: "The token is not known here", Remedy: remedy}
	}
	return Caller{User: entries[found].user, grant: entries[found].grant}, nil
}

// Authorize allows what the caller's line of the file does. The error is a
// *DeniedError.
func (f *File) Authorize(_ context.Context, c Caller, a Action) error {
	change := a.Verb != VerbGet && a.Verb != VerbList
	if c.grant != nil {
		for _, tenant := range []string{allTenants, a.Tenant} {
			if may, ok := (*c.grant)[tenant]; ok && tenant != "" && (may || !change) {
				return nil
			}
		}
	}
	return &DeniedError{User: c.User, Action: a, Why: "no line of the token file allows it"}
}

// current returns what is in the file now.
func (f *File) current() ([]entry, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	state, err := stat(f.path)
	if err == nil && f.sure && f.err == nil && state == f.seen {
		return f.entries, nil
	}
	first := f.seen == fileState{}
	var entries []entry
	if err == nil {
		entries, state, err = readFile(f.path)
	}
	if err != nil {
		err = fmt.Errorf("read the token file %s: %w", f.path, err)
		if f.err == nil || f.err.Error() != err.Error() {
			f.log.Error("the token file cannot be used; nobody is let in until it is mended", "error", err)
		}
		f.err, f.entries, f.sure = err, nil, false
		return nil, err
	}
	if !first && (state != f.seen || f.err != nil) {
		f.log.Info("token file read again", "tokens", len(entries))
	}
	f.seen, f.entries, f.err = state, entries, nil
	f.sure = f.now().Sub(state.modified) > settled
	return entries, nil
}

func stat(path string) (fileState, error) {
	info, err := os.Stat(path)
	if err != nil {
		return fileState{}, err
	}
	return stateOf(info), nil
}

func stateOf(info os.FileInfo) fileState {
	s := fileState{modified: info.ModTime(), size: info.Size()}
	if sys, ok := info.Sys().(*syscall.Stat_t); ok {
		s.inode = sys.Ino
	}
	return s
}

func readFile(path string) ([]entry, fileState, error) {
	// Without O_NONBLOCK opening a named pipe would wait for its writer.
	file, err := os.OpenFile(path, os.O_RDONLY|syscall.O_NONBLOCK, 0)
	if err != nil {
		return nil, fileState{}, err
	}
	defer func() { _ = file.Close() }()
	info, err := file.Stat()
	if err != nil {
		return nil, fileState{}, err
	}
	switch {
	case !info.Mode().IsRegular():
		return nil, fileState{}, errors.New("it is not a regular file")
	case info.Mode().Perm()&0o022 != 0:
		return nil, fileState{}, fmt.Errorf("others than its owner can write it (mode %04o); run chmod go-w on it", info.Mode().Perm())
	}
	data, err := io.ReadAll(io.LimitReader(file, maxFileBytes+1))
	if err != nil {
		return nil, fileState{}, err
	}
	entries, err := parseTokens(data)
	return entries, stateOf(info), err
}

// parseTokens reads the format that File describes. Its errors name lines and
// quote no hash.
func parseTokens(data []byte) ([]entry, error) {
	if len(data) > maxFileBytes {
		return nil, fmt.Errorf("it is larger than %d bytes", maxFileBytes)
	}
	var entries []entry
	seen := map[[sha256.Size]byte]int{}
	lines := bufio.NewScanner(bytes.NewReader(data))
	lines.Buffer(nil, maxFileBytes+1)
	for n := 1; lines.Scan(); n++ {
		line := strings.TrimSpace(lines.Text())
		if line == "" || line[0] == '#' {
			continue
		}
		e, err := parseLine(line)
		if err != nil {
			return nil, fmt.Errorf("line %d: %w", n, err)
		}
		if first, twice := seen[e.hash]; twice {
			return nil, fmt.Errorf("line %d: the token is the one of line %d; remove one of the two", n, first)
		}
		if len(entries) == maxTokens {
			return nil, fmt.Errorf("line %d: there are more than %d tokens", n, maxTokens)
		}
		seen[e.hash] = n
		entries = append(entries, e)
	}
	return entries, lines.Err()
}

func parseLine(line string) (entry, error) {
	var e entry
	fields := strings.Fields(line)
	if len(fields) != 3 {
		return e, fmt.Errorf("it must have three fields, sha256:<hash> <user> <tenants>, and has %d", len(fields))
	}
	digits, ok := strings.CutPrefix(fields[0], hashPrefix)
	sum, err := hex.DecodeString(digits)
	if !ok || err != nil || len(sum) != sha256.Size {
		return e, errors.New("the first field must be sha256: and 64 hexadecimal digits, the SHA-256 of the token")
	}
	e.hash = [sha256.Size]byte(sum)
	if e.user = fields[1]; len(e.user) > maxUserBytes || strings.ContainsFunc(e.user, func(c rune) bool { return c <= ' ' || c > '~' }) {
		return e, fmt.Errorf("the user must be at most %d printable ASCII characters", maxUserBytes)
	}
	g := grant{}
	for tenant := range strings.SplitSeq(fields[2], ",") {
		tenant, read := strings.CutSuffix(tenant, readOnly)
		if tenant != allTenants {
			if err := function.ValidateTenant(tenant); err != nil {
				return e, err
			}
		}
		if _, twice := g[tenant]; twice {
			return e, fmt.Errorf("the tenant %s is named twice", tenant)
		}
		g[tenant] = !read
	}
	e.grant = &g
	return e, nil
}

// GenerateToken returns a new token (192 random bits) and its line of a token
// file. tenants are as in the file. The line does not tell the token.
func GenerateToken(user string, tenants ...string) (token, line string, err error) {
	var random [24]byte
	_, _ = rand.Read(random[:]) // never fails
	token = tokenPrefix + base64.RawURLEncoding.EncodeToString(random[:])
	sum := sha256.Sum256([]byte(token))
	line = hashPrefix + hex.EncodeToString(sum[:]) + " " + user + " " + strings.Join(slices.Compact(tenants), ",")
	_, err = parseLine(line)
	if err == nil && strings.Join(strings.Fields(line), " ") != line {
		err = errors.New("neither user nor tenants may have spaces in them")
	}
	if err != nil {
		return "", "", fmt.Errorf("make a token for %q: %w", user, err)
	}
	return token, line, nil
}
