package artifact

import (
	"strings"
	"testing"
)

func validArtifact() Artifact {
	return Artifact{
		Name: "spin-shim", Version: "v0.22.0", OS: "linux", Arch: "arm64", URLs: []string{"https://mirror.example/shim.tar.gz"},
		SHA256: digestOf([]byte("a")), Size: 10, Format: FormatTarGzip, Member: "containerd-shim-spin-v2",
		InstalledSHA256: digestOf([]byte("b")), InstalledSize: 20, Path: "/usr/local/bin/containerd-shim-spin-v2", Mode: 0o755,
	}
}

func TestValidateNamesTheMistake(t *testing.T) {
	tests := []struct {
		name   string
		change func(*Artifact)
		says   string // "" means that it is valid
	}{
		{"valid", func(*Artifact) {}, ""},
		{"a version with a plus", func(a *Artifact) { a.Version = "v1.36.2+k3s1" }, ""},
		{"no sizes and platform", func(a *Artifact) { a.Size, a.InstalledSize, a.OS, a.Arch = 0, 0, "", "" }, ""},
		{"plain http, which the fetcher judges", func(a *Artifact) { a.URLs[0] = "http://mirror.example/shim" }, ""},
		{"s3", func(a *Artifact) { a.URLs[0] = "s3://my.bucket/k%2Bey?region=eu-west-1" }, ""},
		{"no name", func(a *Artifact) { a.Name = "" }, "name"},
		{"a name that is a path", func(a *Artifact) { a.Name = "../shim" }, "name"},
		{"a version with a line break", func(a *Artifact) { a.Version = "v1\nv2" }, "version"},
		{"a platform that is none", func(a *Artifact) { a.Arch = "arm 64" }, "names no platform"},
		{"no URL", func(a *Artifact) { a.URLs = nil }, "urls is empty"},
		{"too many URLs", func(a *Artifact) { a.URLs = make([]string, 17) }, "at most 16"},
		{"a URL without host", func(a *Artifact) { a.URLs[0] = "https:///shim" }, "names no host"},
		{"a URL with only a port", func(a *Artifact) { a.URLs[0] = "https://:443/shim" }, "names no host"},
		{"a relative URL", func(a *Artifact) { a.URLs[0] = "shim" }, "names no host"},
		{"a file", func(a *Artifact) { a.URLs[0] = "file:///usr/share/hearth/shim%20arm64.tar.gz" }, ""},
		{"a file elsewhere", func(a *Artifact) { a.URLs[0] = "file://host/shim" }, "no file of this machine"},
		{"a relative file", func(a *Artifact) { a.URLs[0] = "file:shim" }, "no file of this machine"},
		{"a file path that climbs", func(a *Artifact) { a.URLs[0] = "file:///usr/../etc/shadow" }, "no file of this machine"},
		{"another scheme", func(a *Artifact) { a.URLs[0] = "ftp://mirror.example/shim" }, `scheme "ftp"`},
		{"a URL with a password", func(a *Artifact) { a.URLs[0] = "https://me:hunter2@mirror.example/" }, "carries credentials"},
		{"a URL with a fragment", func(a *Artifact) { a.URLs[0] = "https://mirror.example/#sha" }, "fragment"},
		{"a very long URL", func(a *Artifact) { a.URLs[0] = "https://mirror.example/" + strings.Repeat("a", 3000) }, "at most 2048"},
		{"s3 without key", func(a *Artifact) { a.URLs[0] = "s3://bucket/" }, "key of an object"},
		{"s3 with a bad bucket", func(a *Artifact) { a.URLs[0] = "s3://Bucket_1/key" }, "no S3 bucket"},
		{"s3 with a bad region", func(a *Artifact) { a.URLs[0] = "s3://bucket/key?region=evil.example" }, "?region=REGION"},
		{"s3 with something else", func(a *Artifact) { a.URLs[0] = "s3://bucket/key?versionId=1" }, "?region=REGION"},
		{"no digest", func(a *Artifact) { a.SHA256 = Digest{} }, "sha256 is missing"},
		{"a negative size", func(a *Artifact) { a.Size = -1 }, "negative"},
		{"an unknown format", func(a *Artifact) { a.Format = "rar" }, `format "rar" is unknown`},
		{"an archive without member", func(a *Artifact) { a.Member = "" }, "member is missing"},
		{"an absolute member", func(a *Artifact) { a.Member = "/bin/shim" }, "not a relative path"},
		{"a member of no archive", func(a *Artifact) { a.Format = FormatGzip }, "for tar archives only"},
		{"no digest of what is unpacked", func(a *Artifact) { a.InstalledSHA256 = Digest{} }, "installedSHA256 is missing"},
		{"two digests of one file", func(a *Artifact) { a.Format, a.Member = FormatRaw, "" }, "installedSHA256 differs"},
		{"no path", func(a *Artifact) { a.Path = "" }, "path is missing"},
		{"a relative path", func(a *Artifact) { a.Path = "bin/shim" }, "absolute path"},
		{"a path that climbs", func(a *Artifact) { a.Path = "/usr/../etc/shadow" }, "absolute path"},
		{"a directory", func(a *Artifact) { a.Path = "/usr/local/bin/" }, "absolute path"},
		{"set-user-id", func(a *Artifact) { a.Mode = 0o4755 }, "permission bits"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			a := validArtifact()
			tt.change(&a)
			err := a.Validate()
			if (err == nil) != (tt.says == "") || err != nil && !strings.Contains(err.Error(), tt.says) {
				t.Errorf("got %v, want %q", err, tt.says)
			}
			if err != nil && strings.Contains(err.Error(), "hunter2") {
				t.Errorf("error %v tells a password", err)
			}
		})
	}
}

func TestTwoArtifactsForOnePathAreRefused(t *testing.T) {
	a, b := validArtifact(), validArtifact()
	b.Name = "other"
	_, err := newFetcher(t, func(o *Options) { o.Platform = "linux/arm64" }).Fetch(t.Context(), []Artifact{a, b})
	wantCode(t, err, CodeInvalid, "would both be installed as /usr/local/bin/containerd-shim-spin-v2")
}

func TestHosts(t *testing.T) {
	tests := []struct {
		host                string
		loopback, linkLocal bool
	}{
		{"localhost", true, false}, {"a.localhost", true, false}, {"127.0.0.53", true, false}, {"::1", true, false}, {"::ffff:127.0.0.1", true, false},
		{"169.254.169.254", false, true}, {"::ffff:169.254.169.254", false, true}, {"fe80::1", false, true}, {"fe80::1%eth0", false, true}, {"fd00:ec2::254", false, true},
		{"mirror.example", false, false}, {"10.0.0.1", false, false}, {"localhost.example", false, false}, {"fd00:ec2::253", false, false},
	}
	for _, tt := range tests {
		if l, k := isLoopback(tt.host), isLinkLocal(tt.host); l != tt.loopback || k != tt.linkLocal {
			t.Errorf("%s: loopback %v, link-local %v", tt.host, l, k)
		}
	}
}

func TestContentRange(t *testing.T) {
	tests := []struct {
		in           string
		first, total int64
		ok           bool
	}{
		{"bytes 0-9/10", 0, 10, true}, {"bytes 5-9/10", 5, 10, true}, {"bytes 5-9/*", 5, -1, true},
		{"bytes 5-10/10", 0, 0, false}, {"bytes 9-5/10", 0, 0, false}, {"bytes */10", 0, 0, false}, {"5-9/10", 0, 0, false},
		{"bytes -5-9/10", 0, 0, false}, {"bytes +5-9/10", 0, 0, false}, {"bytes 0-9223372036854775808/9223372036854775809", 0, 0, false}, {"", 0, 0, false},
	}
	for _, tt := range tests {
		if first, total, ok := parseContentRange(tt.in); first != tt.first && ok || total != tt.total && ok || ok != tt.ok {
			t.Errorf("%q: %d, %d, %v", tt.in, first, total, ok)
		}
	}
}
