// Package chart carries Hearth's Helm chart within programs, so that a cluster
// gets the chart that belongs to the bootstrap that made it, from no registry.
package chart

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"embed"
	"io/fs"
	"path"
	"strings"
	"sync"
)

// ImageTag is the tag under which `make image` names the image of a version: a
// tag may hold no "+", which versions may.
func ImageTag(version string) string { return strings.ReplaceAll(version, "+", "-") }

//go:embed all:hearth
var files embed.FS

// Archive is the chart as `helm package` would make it: a .tgz whose bytes
// depend on the chart alone.
var Archive = sync.OnceValue(func() []byte {
	var out bytes.Buffer
	compressed := gzip.NewWriter(&out)
	archive := tar.NewWriter(compressed)
	err := fs.WalkDir(files, "hearth", func(name string, entry fs.DirEntry, err error) error {
		if err != nil || entry.IsDir() {
			return err
		}
		content, err := files.ReadFile(name)
		if err != nil {
			return err
		}
		if err := archive.WriteHeader(&tar.Header{Name: path.Clean(name), Mode: 0o644, Size: int64(len(content)), Format: tar.FormatUSTAR}); err != nil {
			return err
		}
		_, err = archive.Write(content)
		return err
	})
	for _, close := range []func() error{archive.Close, compressed.Close} {
		if err == nil {
			err = close()
		}
	}
	if err != nil {
		panic("the embedded chart cannot be packed: " + err.Error()) // memory to memory
	}
	return out.Bytes()
})
