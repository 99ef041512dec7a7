package k3s

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

const (
	// maxTornBytes bounds the files that are looked at: the largest that k3s
	// makes there, a kubeconfig, has some 10 KiB.
	maxTornBytes = 1 << 20
	// tornAge is how long a file must have been without content: k3s may be
	// starting at this moment, and makes files before it fills them.
	tornAge = 2 * time.Second
	// maxTornFiles bounds how many are looked at; k3s makes some sixty.
	maxTornFiles = 4096
)

// RemoveTorn removes certificates, keys and what else k3s derives from its
// authorities that a loss of power left without content, and returns their
// paths. k3s writes them without syncing, takes a file that exists for a good
// one, and would fail to start for ever; one that is missing it makes anew.
// Call it while k3s is not up; that it is just starting does no harm.
//
// Programs that it unpacked and that are not what it unpacked go as well, for
// the same reason.
//
// The authorities themselves are not touched: k3s would make others, and with
// them another cluster. Torn tells which of them bootstrap has to install anew.
func RemoveTorn(p Paths) ([]string, error) { return removeTorn("/", p) }

func removeTorn(root string, p Paths) (removed []string, err error) {
	seen := 0
	for _, dir := range []string{p.ServerTLS, filepath.Join(p.DataDir, "server/cred"), filepath.Join(p.DataDir, "agent")} {
		top := filepath.Join(root, dir)
		err := filepath.WalkDir(top, func(name string, d fs.DirEntry, err error) error {
			if errors.Is(err, fs.ErrNotExist) {
				return nil // nothing was made yet
			}
			if err != nil {
				return err
			}
			if d.IsDir() {
				// Of the agent's directories only those of certificates and
				// settings: images and containers have files of millions.
				switch rel, _ := filepath.Rel(filepath.Join(root, p.DataDir, "agent"), name); rel {
				case "containerd", "images", "pod-manifests", "libexec":
					return fs.SkipDir
				}
				return nil
			}
			switch filepath.Ext(name) {
			case ".crt", ".key", ".kubeconfig", ".json", ".psk":
			default:
				return nil
			}
			if seen++; seen > maxTornFiles || !d.Type().IsRegular() || isAuthority(filepath.Base(name)) {
				return nil
			}
			torn, err := isTorn(name)
			if err == nil && torn {
				err = os.Remove(name)
			}
			if errors.Is(err, fs.ErrNotExist) {
				return nil // k3s replaced it meanwhile
			}
			if err != nil || !torn {
				return err
			}
			removed = append(removed, filepath.Join("/", name[len(root):]))
			return nil
		})
		if err != nil {
			return removed, fmt.Errorf("look for files that a loss of power left without content: %w", err)
		}
	}
	// The name of etcd's member: with its data there, any name will do, and an
	// empty one would not.
	name := filepath.Join(p.EtcdDir, "name")
	torn, err := isTorn(filepath.Join(root, name))
	if err == nil && torn {
		if err = os.Remove(filepath.Join(root, name)); err == nil {
			removed = append(removed, name)
		}
	}
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return removed, fmt.Errorf("look for files that a loss of power left without content: %w", err)
	}
	programs, err := removeTornPrograms(filepath.Join(root, p.DataDir, "data"))
	for _, name := range programs {
		removed = append(removed, filepath.Join("/", name[len(root):]))
	}
	if err != nil {
		return removed, fmt.Errorf("look for programs that a loss of power left without content: %w", err)
	}
	return removed, nil
}

const (
	// sumsFile is k3s's list of the files that it unpacked (pkg/dataverify).
	// Links need no look: they are part of the directory, and k3s's scripts for
	// packet filters point them elsewhere.
	sumsFile = ".sha256sums"
	// wholeFile marks programs that were compared with that list when they were
	// on the disk.
	wholeFile = ".hearth-whole"
	// maxSumsBytes bounds the list; k3s's has some 4 KiB.
	maxSumsBytes = 1 << 20
)

// programsDir is the name of a directory of programs: the digest of what they
// were unpacked from.
var programsDir = regexp.MustCompile(`^[0-9a-f]{64}$`)

// removeTornPrograms removes the programs that k3s unpacked into DIR/<digest> of
// which a loss of power left not everything. k3s compares them with its list
// when it unpacks them and never again, syncs none of them, and takes a
// directory that exists for a good one. What is whole is written to the disk
// and marked, so that it is read through only once.
func removeTornPrograms(dir string) (removed []string, err error) {
	entries, err := os.ReadDir(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	for _, e := range entries {
		name := filepath.Join(dir, e.Name())
		if !e.IsDir() || !programsDir.MatchString(e.Name()) {
			continue
		}
		if _, err := os.Lstat(filepath.Join(name, wholeFile)); err == nil {
			continue
		}
		if _, err := os.Lstat(filepath.Join(name, "bin", sumsFile)); errors.Is(err, fs.ErrNotExist) && exists(filepath.Join(name, "bin")) {
			continue // not what k3s unpacks: there is nothing to compare it with
		}
		whole, err := isWhole(filepath.Join(name, "bin"))
		switch {
		case err != nil:
			return removed, err
		case whole:
			if err := markWhole(name); err != nil {
				return removed, err
			}
		default:
			// In one step, and to where k3s removes what is left.
			if err := os.Rename(name, name+"-tmp"); err != nil {
				return removed, err
			}
			removed = append(removed, name)
			if err := os.RemoveAll(name + "-tmp"); err != nil {
				return removed, err
			}
		}
	}
	return removed, err
}

// isWhole compares a directory of programs with k3s's list.
func isWhole(bin string) (bool, error) {
	sums, err := readSums(filepath.Join(bin, sumsFile))
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	if err != nil || len(sums) == 0 {
		return false, err
	}
	for _, line := range sums {
		file, err := os.Open(filepath.Join(bin, line[1]))
		if errors.Is(err, fs.ErrNotExist) {
			return false, nil
		}
		if err != nil {
			return false, err
		}
		h := sha256.New()
		_, err = io.Copy(h, file)
		_ = file.Close() // only read
		if err != nil {
			return false, err
		}
		if hex.EncodeToString(h.Sum(nil)) != line[0] {
			return false, nil
		}
	}
	return true, nil
}

// readSums reads lines of a digest and a name. A list with other ones, as a loss
// of power leaves it, is as good as none.
func readSums(name string) (lines [][2]string, err error) {
	info, err := os.Stat(name)
	if err != nil {
		return nil, err
	}
	if info.Size() > maxSumsBytes {
		return nil, nil
	}
	content, err := os.ReadFile(name)
	if err != nil {
		return nil, err
	}
	for line := range strings.Lines(string(content)) {
		switch fields := strings.Fields(line); len(fields) {
		case 0:
		case 1:
			return nil, nil
		default:
			lines = append(lines, [2]string{fields[0], fields[1]})
		}
	}
	return lines, nil
}

// markWhole makes what was compared durable before it says so.
func markWhole(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer d.Close()
	if err := unix.Syncfs(int(d.Fd())); err != nil {
		return fmt.Errorf("write %s to the disk: %w", dir, err)
	}
	mark, err := os.OpenFile(filepath.Join(dir, wholeFile), os.O_CREATE|os.O_WRONLY, 0o644)
	if err != nil {
		return err
	}
	return errors.Join(mark.Close(), d.Sync())
}

// isAuthority says whether a file is of an authority or the key of service
// accounts, by the names that k3s has for them.
func isAuthority(name string) bool {
	stem := name[:len(name)-len(filepath.Ext(name))]
	return stem == "ca" || stem == "service" || len(stem) > 3 && stem[len(stem)-3:] == "-ca"
}

// Torn says whether a file has been without content for a while, as a loss of
// power leaves one that was not synced. A file that is missing is not torn.
func Torn(name string) (bool, error) {
	torn, err := isTorn(name)
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	return torn, err
}

// isTorn says whether a file has no content, or only zeros, which is what file
// systems have in place of blocks that were never written.
func isTorn(name string) (bool, error) {
	info, err := os.Stat(name)
	if err != nil || info.Size() > maxTornBytes || time.Since(info.ModTime()).Abs() < tornAge {
		return false, err
	}
	content, err := os.ReadFile(name)
	if err != nil {
		return false, err
	}
	return len(bytes.Trim(content, "\x00")) == 0, nil
}
