package bootstrap

import (
	"cmp"
	"errors"
	"fmt"
	"net/url"
	"path"
	"slices"
	"strings"

	"github.com/hearth-sh/hearth/api/v1alpha1"
	"github.com/hearth-sh/hearth/internal/artifact"
	"github.com/hearth-sh/hearth/internal/host"
	"github.com/hearth-sh/hearth/internal/nodeconfig"
)

// Where artifacts go unless the configuration says otherwise. k3s looks for
// shims on its PATH, for images and manifests below its data directory, and for
// the credential provider where kubelet's default flags say.
const (
	binDir      = "/usr/local/bin"
	providerDir = "/var/lib/rancher/credentialprovider/bin"
	imagesDir   = "/var/lib/rancher/k3s/agent/images"
	manifestDir = "/var/lib/rancher/k3s/server/manifests"
	// manifestSeries is the name of Hearth's own list of artifacts.
	manifestSeries = "hearth"
)

// need is an artifact the node cannot do without, or would rather have.
type need struct {
	name    string
	version string
	// optional ones are left out where nobody knows them.
	optional bool
}

// needs lists what a node of this configuration is made of.
func needs(spec v1alpha1.NodeConfigSpec) []need {
	list := []need{
		{name: nodeconfig.ArtifactK3s, version: spec.K3s.Version},
		{name: nodeconfig.ArtifactAirgap, version: spec.K3s.Version, optional: true},
		{name: nodeconfig.ArtifactNodeAgent, optional: true},
	}
	for _, s := range spec.Shims {
		list = append(list, need{name: cmp.Or(s.Artifact, nodeconfig.ShimBinary(s.Name))})
	}
	if ecr := spec.Registries.ECR; ecr == nil || *ecr {
		list = append(list, need{name: nodeconfig.ArtifactECRProvider, optional: ecr == nil})
	}
	if on := spec.Addons.Hearth.Enabled; on != nil && *on && !nodeconfig.PullsHearth(&spec) {
		// Where it must be there, nodeconfig.CheckArtifacts says so.
		list = append(list, need{name: nodeconfig.ArtifactHearthImage, optional: true})
	}
	if handedOver(spec) && spec.Role == v1alpha1.RoleServer {
		list = append(list, need{name: nodeconfig.ArtifactCNIManifest})
	}
	return list
}

// handedOver says whether somebody else than k3s connects the pods.
func handedOver(spec v1alpha1.NodeConfigSpec) bool {
	return spec.Network.CNI != "" && spec.Network.CNI != "flannel"
}

// pinned returns the artifacts of a configuration with everything known about
// them: from the configuration itself, else from the signed list, which is nil
// where there is none.
func pinned(spec v1alpha1.NodeConfigSpec, list *artifact.Manifest, goarch string) ([]artifact.Artifact, error) {
	wanted := needs(spec)
	// What the configuration names beside is wanted too.
	for _, f := range spec.Artifacts.Files {
		known := slices.ContainsFunc(wanted, func(n need) bool { return n.name == f.Name })
		if !known && (f.Arch == "" || f.Arch == goarch) {
			wanted = append(wanted, need{name: f.Name})
		}
	}
	var out []artifact.Artifact
	var missing []error
	for _, n := range wanted {
		a, err := find(spec.Artifacts, list, n, goarch)
		if err != nil {
			if !n.optional {
				missing = append(missing, err)
			}
			continue
		}
		place(&a)
		mirror(&a, spec.Artifacts.Mirrors)
		out = append(out, a)
	}
	return out, errors.Join(missing...)
}

// known lists the names of what a signed list has for a processor.
func known(list *artifact.Manifest, goarch string) []string {
	if list == nil {
		return nil
	}
	var names []string
	for _, a := range list.Artifacts {
		if (a.OS == "" || a.OS == "linux") && (a.Arch == "" || a.Arch == goarch) {
			names = append(names, a.Name)
		}
	}
	slices.Sort(names)
	return slices.Compact(names)
}

func find(config v1alpha1.ArtifactsConfig, list *artifact.Manifest, n need, goarch string) (artifact.Artifact, error) {
	// The one for this processor goes before one for any.
	for _, arch := range []string{goarch, ""} {
		for _, f := range config.Files {
			if f.Name == n.name && f.Arch == arch {
				return fromConfig(f)
			}
		}
	}
	if list == nil {
		return artifact.Artifact{}, fmt.Errorf("no artifact %s is named; add it to spec.artifacts.files with its digest, or name a signed list in spec.artifacts.manifest", n.name)
	}
	return list.Find(n.name, n.version, "linux", goarch)
}

func fromConfig(f v1alpha1.ArtifactFile) (artifact.Artifact, error) {
	a := artifact.Artifact{
		Name: f.Name, Version: f.Version, Arch: f.Arch, URLs: slices.Clone(f.URLs), Size: f.Size,
		Format: artifact.Format(f.Format), Member: f.Member, Path: f.Path,
	}
	if f.Arch != "" {
		a.OS = "linux"
	}
	var errs []error
	parse := func(what, text string, into *artifact.Digest) {
		if text == "" {
			return
		}
		d, err := artifact.ParseDigest(text)
		if err != nil {
			errs = append(errs, fmt.Errorf("%s of artifact %s: %w", what, f.Name, err))
		}
		*into = d
	}
	parse("sha256", f.SHA256, &a.SHA256)
	parse("installedSHA256", f.InstalledSHA256, &a.InstalledSHA256)
	if f.Mode != "" {
		if err := a.Mode.UnmarshalText([]byte(f.Mode)); err != nil {
			errs = append(errs, fmt.Errorf("mode of artifact %s: %w", f.Name, err))
		}
	}
	return a, errors.Join(errs...)
}

// place fills in where an artifact of a known name goes.
func place(a *artifact.Artifact) {
	dir, mode := binDir, artifact.Mode(0o755)
	file := a.Name
	switch a.Name {
	case nodeconfig.ArtifactAirgap:
		// k3s tells the compression by the file's name.
		dir, mode = imagesDir, 0o644
		file = fileName(a.URLs)
	case nodeconfig.ArtifactHearthImage:
		// Never the name of k3s's own archive, whatever the URLs end in.
		dir, mode = imagesDir, 0o644
		file = a.Name + archiveSuffix(*a)
	case nodeconfig.ArtifactECRProvider:
		dir = providerDir
	case nodeconfig.ArtifactCNIManifest:
		dir, mode, file = manifestDir, 0o600, "hearth-cni.yaml"
	}
	if a.Path == "" {
		a.Path = path.Join(dir, file)
	}
	if a.Mode == 0 {
		a.Mode = mode
	}
}

// archiveSuffixes are those by which k3s knows archives of images, and how they
// are compressed (tarfile of rancher/wharfie).
var archiveSuffixes = []string{".tar", ".tar.gz", ".tgz", ".tar.zst", ".tar.bz2", ".tbz", ".tar.lz4"}

// archiveSuffix is what the name of an archive of images must end in.
func archiveSuffix(a artifact.Artifact) string {
	if a.Format == "" || a.Format == artifact.FormatRaw {
		name := fileName(a.URLs)
		for _, suffix := range archiveSuffixes {
			if strings.HasSuffix(name, suffix) {
				return suffix
			}
		}
	}
	return ".tar"
}

// misnamed are the shims that older k3s looks for under one name and that its
// containerd then looks for under another: the table (findWasiRuntimes in
// pkg/agent/containerd) gave them runtime types that end in v2 and binaries that
// end in v1.
var misnamed = []string{
	"containerd-shim-lunatic-v1", "containerd-shim-slight-v1", "containerd-shim-wasmedge-v1",
	"containerd-shim-wasmer-v1", "containerd-shim-wasmtime-v1", "containerd-shim-wws-v1",
}

// aliases are files under the names that the containerd of older k3s looks for.
func aliases(artifacts []artifact.Artifact) []host.File {
	var files []host.File
	for _, a := range artifacts {
		if !slices.Contains(misnamed, a.Name) {
			continue
		}
		files = append(files, host.File{
			Path: path.Join(binDir, strings.TrimSuffix(a.Name, "-v1")+"-v2"), Mode: 0o755,
			Content: []byte("#!/bin/sh\n# The containerd of older k3s looks for this name.\nexec " + a.Path + " \"$@\"\n"),
			Reason:  "lets older k3s find the shim",
		})
	}
	return files
}

// fileName is the last element of the first URL's path.
func fileName(urls []string) string {
	for _, u := range urls {
		parsed, err := url.Parse(u)
		if err != nil {
			continue
		}
		if name := path.Base(parsed.Path); name != "." && name != "/" {
			return name
		}
	}
	return "images.tar"
}

// mirror puts the mirrors before an artifact's own URLs.
func mirror(a *artifact.Artifact, mirrors []string) {
	if len(mirrors) == 0 {
		return
	}
	name := url.PathEscape(fileName(a.URLs))
	var urls []string
	for _, m := range mirrors {
		base, query, _ := strings.Cut(m, "?")
		u := strings.TrimSuffix(base, "/") + "/" + name
		if query != "" {
			u += "?" + query
		}
		urls = append(urls, u)
	}
	urls = append(urls, a.URLs...)
	a.URLs = urls[:min(len(urls), artifact.MaxURLs)]
}
