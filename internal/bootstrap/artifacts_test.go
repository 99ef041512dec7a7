package bootstrap

import (
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/hearth-sh/hearth/api/v1alpha1"
	"github.com/hearth-sh/hearth/internal/artifact"
)

const (
	someDigest  = "2c26b46b68ffc68ff99b453c1d30413413422d706483bfa0f98a5e886266e7ae"
	otherDigest = "fcde2b2edba56bf408601fb721fe9b5c338d10ee429ea04fae5511b68fbf8fb9"
)

func file(name, arch, url, digest string) v1alpha1.ArtifactFile {
	return v1alpha1.ArtifactFile{Name: name, Arch: arch, URLs: []string{url}, SHA256: digest}
}

func listed(name, version, arch string) artifact.Artifact {
	return artifact.Artifact{Name: name, Version: version, OS: "linux", Arch: arch, URLs: []string{"https://example.com/" + name + "-" + arch}, SHA256: artifact.Digest{1}, Size: 1}
}

func TestWhatANodeIsMadeOf(t *testing.T) {
	yes, no := true, false
	list := &artifact.Manifest{Artifacts: []artifact.Artifact{
		listed("k3s", "v1", "arm64"), listed("k3s", "v1", "amd64"), listed("k3s", "v2", "arm64"),
		listed("containerd-shim-spin-v2", "v0.24.0", "arm64"), listed("ecr-credential-provider", "v1", "arm64"), listed("nodeagent", "v1", "arm64"),
		listed("unwanted", "v1", "arm64"),
	}}
	agent := func(change func(*v1alpha1.NodeConfigSpec)) v1alpha1.NodeConfigSpec {
		s := v1alpha1.NodeConfigSpec{Role: v1alpha1.RoleAgent, K3s: v1alpha1.K3sConfig{Version: "v1"}}
		if change != nil {
			change(&s)
		}
		return s
	}
	for _, tt := range []struct {
		name string
		spec v1alpha1.NodeConfigSpec
		list *artifact.Manifest
		want []string // name@path
		fail []string // words of the error
	}{
		{"from the list", agent(nil), list,
			[]string{"k3s@/usr/local/bin/k3s", "nodeagent@/usr/local/bin/nodeagent", "ecr-credential-provider@/var/lib/rancher/credentialprovider/bin/ecr-credential-provider"}, nil},
		{"with a shim", agent(func(s *v1alpha1.NodeConfigSpec) {
			s.Shims, s.Registries.ECR = []v1alpha1.ShimConfig{{Name: "spin"}}, &no
		}), list,
			[]string{"k3s@/usr/local/bin/k3s", "nodeagent@/usr/local/bin/nodeagent", "containerd-shim-spin-v2@/usr/local/bin/containerd-shim-spin-v2"}, nil},
		{"without a list what may be missing is left out", agent(func(s *v1alpha1.NodeConfigSpec) {
			s.Artifacts.Files = []v1alpha1.ArtifactFile{file("k3s", "", "s3://b/k3s", someDigest)}
		}), nil,
			[]string{"k3s@/usr/local/bin/k3s"}, nil},
		{"what must be there is named, all at once", agent(func(s *v1alpha1.NodeConfigSpec) {
			s.Shims, s.Registries.ECR = []v1alpha1.ShimConfig{{Name: "spin"}}, &yes
		}), nil, nil,
			[]string{"k3s", "containerd-shim-spin-v2", "ecr-credential-provider", "spec.artifacts.files"}},
		{"a network of somebody else's has a manifest on servers", agent(func(s *v1alpha1.NodeConfigSpec) {
			s.Role, s.Network.CNI, s.Registries.ECR = v1alpha1.RoleServer, "cilium", &no
			s.Artifacts.Files = []v1alpha1.ArtifactFile{file("cni-manifest", "", "s3://b/cilium.yaml", someDigest)}
		}), list,
			[]string{"k3s@/usr/local/bin/k3s", "nodeagent@/usr/local/bin/nodeagent", "cni-manifest@/var/lib/rancher/k3s/server/manifests/hearth-cni.yaml"}, nil},
		{"images keep the name that tells their compression", agent(func(s *v1alpha1.NodeConfigSpec) {
			s.Registries.ECR = &no
			s.Artifacts.Files = []v1alpha1.ArtifactFile{file("k3s-airgap-images", "arm64", "s3://b/v1/k3s-airgap-images-arm64.tar.zst", someDigest)}
		}), list,
			[]string{"k3s@/usr/local/bin/k3s", "k3s-airgap-images@/var/lib/rancher/k3s/agent/images/k3s-airgap-images-arm64.tar.zst", "nodeagent@/usr/local/bin/nodeagent"}, nil},
		{"the image of our chart, under a name that tells its compression", agent(func(s *v1alpha1.NodeConfigSpec) {
			s.Registries.ECR, s.Addons.Hearth.Enabled = &no, &yes
			s.Artifacts.Files = []v1alpha1.ArtifactFile{file("hearth-image", "", "s3://b/v1/image.tar.zst?region=x", someDigest)}
		}), list,
			[]string{"k3s@/usr/local/bin/k3s", "nodeagent@/usr/local/bin/nodeagent", "hearth-image@/var/lib/rancher/k3s/agent/images/hearth-image.tar.zst"}, nil},
		{"an image that is unpacked on the way is an archive as it is", agent(func(s *v1alpha1.NodeConfigSpec) {
			f := file("hearth-image", "", "s3://b/v1/image.tar.gz", someDigest)
			f.Format, f.InstalledSHA256 = "gzip", otherDigest
			s.Registries.ECR, s.Artifacts.Files = &no, []v1alpha1.ArtifactFile{f}
		}), list,
			[]string{"k3s@/usr/local/bin/k3s", "nodeagent@/usr/local/bin/nodeagent", "hearth-image@/var/lib/rancher/k3s/agent/images/hearth-image.tar"}, nil},
		{"no archive where the image of our chart is pulled", agent(func(s *v1alpha1.NodeConfigSpec) {
			s.Registries.ECR, s.Addons.Hearth = &no, v1alpha1.AddonConfig{Enabled: &yes, Values: map[string]any{"image": map[string]any{"repository": "x.example/nodeagent"}}}
		}), &artifact.Manifest{Artifacts: append(slices.Clone(list.Artifacts), listed("hearth-image", "v1", "arm64"))},
			[]string{"k3s@/usr/local/bin/k3s", "nodeagent@/usr/local/bin/nodeagent"}, nil},
		{"what the configuration names beside comes too, for its processor", agent(func(s *v1alpha1.NodeConfigSpec) {
			s.Registries.ECR = &no
			extra, foreign := file("tool", "arm64", "s3://b/tool", someDigest), file("tool-x86", "amd64", "s3://b/tool", someDigest)
			extra.Path = "/opt/tool"
			s.Artifacts.Files = []v1alpha1.ArtifactFile{extra, foreign}
		}), list,
			[]string{"k3s@/usr/local/bin/k3s", "nodeagent@/usr/local/bin/nodeagent", "tool@/opt/tool"}, nil},
		{"a version that the list does not have", agent(func(s *v1alpha1.NodeConfigSpec) { s.K3s.Version, s.Registries.ECR = "v9", &no }), list, nil, []string{"k3s", "v9"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			got, err := pinned(tt.spec, tt.list, "arm64")
			if (err != nil) != (tt.fail != nil) {
				t.Fatalf("%v", err)
			}
			for _, word := range tt.fail {
				if !strings.Contains(err.Error(), word) {
					t.Errorf("%q is missing in %v", word, err)
				}
			}
			if err != nil {
				return
			}
			var names []string
			for _, a := range got {
				names = append(names, a.Name+"@"+a.Path)
				if a.Mode == 0 {
					t.Errorf("%s has no mode", a.Name)
				}
			}
			if diff := cmp.Diff(tt.want, names); diff != "" {
				t.Error(diff)
			}
		})
	}
}

func TestTheConfigurationsFileGoesBeforeTheLists(t *testing.T) {
	list := &artifact.Manifest{Artifacts: []artifact.Artifact{listed("k3s", "v1", "arm64")}}
	config := v1alpha1.ArtifactsConfig{Files: []v1alpha1.ArtifactFile{file("k3s", "", "s3://b/any", someDigest), file("k3s", "arm64", "s3://b/arm64", otherDigest)}}
	for arch, want := range map[string]string{"arm64": "s3://b/arm64", "amd64": "s3://b/any"} {
		a, err := find(config, list, need{name: "k3s", version: "v1"}, arch)
		if err != nil || a.URLs[0] != want {
			t.Errorf("%s: %v %v", arch, a.URLs, err)
		}
	}
}

func TestFilesWhoseDigestsAreNone(t *testing.T) {
	f := file("k3s", "", "s3://b/k3s", "abc")
	f.InstalledSHA256, f.Mode = "xyz", "rwx"
	_, err := fromConfig(f)
	for _, want := range []string{"sha256 of artifact k3s", "installedSHA256 of artifact k3s", "mode of artifact k3s"} {
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%q is missing in %v", want, err)
		}
	}
}

func TestMirrorsGoFirst(t *testing.T) {
	many := slices.Repeat([]string{"https://example.com/x/k3s"}, artifact.MaxURLs)
	for _, tt := range []struct {
		name          string
		urls, mirrors []string
		want          []string
	}{
		{"none", []string{"https://example.com/k3s"}, nil, []string{"https://example.com/k3s"}},
		{"a bucket", []string{"https://example.com/v1/k3s-arm64"}, []string{"s3://b/p"}, []string{"s3://b/p/k3s-arm64", "https://example.com/v1/k3s-arm64"}},
		{"a slash at the end", []string{"https://example.com/k3s"}, []string{"https://m/p/"}, []string{"https://m/p/k3s", "https://example.com/k3s"}},
		{"a query stays at the end", []string{"https://example.com/k3s"}, []string{"s3://b/p?region=eu-west-1"}, []string{"s3://b/p/k3s?region=eu-west-1", "https://example.com/k3s"}},
		{"names are escaped", []string{"https://example.com/k3s%20x"}, []string{"https://m"}, []string{"https://m/k3s%20x", "https://example.com/k3s%20x"}},
	} {
		a := artifact.Artifact{URLs: tt.urls}
		mirror(&a, tt.mirrors)
		if diff := cmp.Diff(tt.want, a.URLs); diff != "" {
			t.Errorf("%s: %s", tt.name, diff)
		}
	}
	a := artifact.Artifact{URLs: many}
	mirror(&a, []string{"s3://b"})
	if len(a.URLs) != artifact.MaxURLs || a.URLs[0] != "s3://b/k3s" {
		t.Errorf("%d URLs, the first %s", len(a.URLs), a.URLs[0])
	}
}

func TestOlderK3sFindsMisnamedShims(t *testing.T) {
	files := aliases([]artifact.Artifact{{Name: "k3s", Path: "/usr/local/bin/k3s"}, {Name: "containerd-shim-wasmtime-v1", Path: "/usr/local/bin/containerd-shim-wasmtime-v1"}, {Name: "containerd-shim-spin-v2"}})
	if len(files) != 1 || files[0].Path != "/usr/local/bin/containerd-shim-wasmtime-v2" || files[0].Mode != 0o755 ||
		!strings.HasSuffix(string(files[0].Content), "\nexec /usr/local/bin/containerd-shim-wasmtime-v1 \"$@\"\n") {
		t.Errorf("%+v", files)
	}
}

func TestFileNames(t *testing.T) {
	for url, want := range map[string]string{
		"https://example.com/a/b.tar.zst?x=y": "b.tar.zst", "s3://bucket/k/v": "v", "https://example.com/": "images.tar", "%zz": "images.tar",
	} {
		if got := fileName([]string{url}); got != want {
			t.Errorf("%s: %s", url, got)
		}
	}
}

func TestAmountsAndSpans(t *testing.T) {
	if n, err := parseQuantity("8Gi"); err != nil || n != 8<<30 {
		t.Errorf("%d %v", n, err)
	}
	for _, bad := range []string{"", "-1", "eight"} {
		if _, err := parseQuantity(bad); err == nil {
			t.Errorf("%q is an amount", bad)
		}
	}
	if d := duration("90s"); d.Seconds() != 90 {
		t.Error(d)
	}
}
