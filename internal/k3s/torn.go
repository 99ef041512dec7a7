package k3s

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"time"
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
// The authorities themselves are not touched: bootstrap installs them durably,
// and nobody could make them anew.
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
			case ".crt", ".key", ".kubeconfig", ".json":
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
	return removed, nil
}

// isAuthority says whether a file is of an authority or the key of service
// accounts, by the names that k3s has for them.
func isAuthority(name string) bool {
	stem := name[:len(name)-len(filepath.Ext(name))]
	return stem == "ca" || stem == "service" || len(stem) > 3 && stem[len(stem)-3:] == "-ca"
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
