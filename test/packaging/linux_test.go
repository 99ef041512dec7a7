package packaging_test

import (
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/hearth-sh/hearth/test/needs"
)

const scripts = root + "/packaging/linux"

func TestPackageVersions(t *testing.T) {
	for version, want := range map[string]string{
		"v1.2.3":                       "1.2.3",
		"1.2.3":                        "1.2.3",
		"v1.2.3-rc.1":                  "1.2.3~rc.1",
		"v1.2.3-4-gabc1234":            "1.2.3+4.gabc1234",
		"v1.2.3-4-gabc1234-dirty":      "1.2.3+4.gabc1234.dirty",
		"v1.2.3-rc.1-4-gabc1234-dirty": "1.2.3~rc.1+4.gabc1234.dirty",
		"v1.2.3-dirty":                 "1.2.3+dirty",
		"v1.2.3+build_5":               "1.2.3+build.5",
		"abc1234-dirty":                "0~git.abc1234.dirty",
		"1234567":                      "0~git.1234567",
		"0123456-dirty":                "0~git.0123456.dirty",
		"dev":                          "0~git.dev",
	} {
		if got := strings.TrimSpace(must(t, "", nil, "sh", scripts+"/version.sh", version)); got != want {
			t.Errorf("%s: got %s, want %s", version, got, want)
		}
	}
	for _, bad := range []string{"", "a b", "1;reboot", "$(id)", "a/b"} {
		if got, err := output(t, "", nil, "sh", scripts+"/version.sh", bad); err == nil || got != "" {
			t.Errorf("%q was taken: %q", bad, got)
		}
	}
}

// TestPackageVersionsAreInOrder asks dpkg, whose word counts when a package is upgraded.
func TestPackageVersionsAreInOrder(t *testing.T) {
	need(t)
	var before string
	for _, version := range []string{"fffffff", "v0.9.0", "v1.0.0-rc.1", "v1.0.0-rc.1-3-gabc1234", "v1.0.0-rc.2", "v1.0.0", "v1.0.0-1-gfff1234", "v1.0.0-10-gabc1234", "v1.0.1"} {
		next := strings.TrimSpace(must(t, "", nil, "sh", scripts+"/version.sh", version))
		if before != "" {
			if _, err := output(t, "", nil, "dpkg", "--compare-versions", before, "lt", next); err != nil {
				t.Errorf("%s does not sort before %s", before, next)
			}
		}
		before = next
	}
}

func TestScripts(t *testing.T) {
	need(t)
	files, err := filepath.Glob(scripts + "/*.sh")
	if err != nil || len(files) < 4 {
		t.Fatalf("%v %v", files, err)
	}
	for _, file := range append(files, "install-deps.sh", "../install-deps.sh", "../shims/install-deps.sh", "../debian.sh", "../fresh/fresh.sh") {
		must(t, "", nil, "bash", "-n", file)
		if out, err := output(t, "", nil, "shellcheck", "-x", file); err != nil {
			t.Errorf("%v\n%s", err, out)
		}
	}
}

// buildPackage makes one package of the binaries and the manual pages in a directory.
func buildPackage(t *testing.T, kind, arch, version, dir string) string {
	t.Helper()
	out := t.TempDir()
	must(t, root, []string{"SOURCE_DATE_EPOCH=1700000000", "VERSION=" + version, "GOARCH=" + arch, "BINARIES=" + dir, "MANPAGES=" + dir},
		tool(t, "nfpm"), "package", "-f", "packaging/linux/nfpm.yaml", "-p", kind, "-t", out+"/")
	files, err := filepath.Glob(filepath.Join(out, "*"))
	if err != nil || len(files) != 1 {
		t.Fatalf("nfpm made %v (%v)", files, err)
	}
	return files[0]
}

// content is what both kinds of package hold.
var content = map[string]string{
	"/usr/bin/bootstrap": "-rwxr-xr-x",
	"/usr/bin/nodeagent": "-rwxr-xr-x",
	"/usr/lib/systemd/system/hearth-bootstrap.service": "-rw-r--r--",
	"/usr/lib/systemd/system/hearth-nodeagent.service": "-rw-r--r--",
	"/usr/lib/systemd/system/hearth-engine.service":    "-rw-r--r--",
	"/usr/lib/sysusers.d/hearth.conf":                  "-rw-r--r--",
	"/usr/share/man/man8/bootstrap.8":                  "-rw-r--r--",
	"/usr/share/man/man8/nodeagent.8":                  "-rw-r--r--",
	"/usr/share/doc/hearth/copyright":                  "-rw-r--r--",
	"/etc/hearth/bootstrap.env":                        "-rw-r--r--",
	"/etc/hearth/nodeagent.env":                        "-rw-r--r--",
	"/etc/hearth/engine.env":                           "-rw-r--r--",
}

var conffiles = []string{"/etc/hearth/bootstrap.env", "/etc/hearth/engine.env", "/etc/hearth/nodeagent.env"}

func TestDebs(t *testing.T) {
	need(t)
	for _, arch := range []string{"arm64", "amd64"} {
		t.Run(arch, func(t *testing.T) {
			dir := standIns(t)["linux/"+arch]
			for _, name := range []string{"bootstrap", "nodeagent"} {
				write(t, filepath.Join(dir, name+".8"), ".TH "+name+" 8\n", 0o640)
			}
			deb := buildPackage(t, "deb", arch, "1.2.3~rc.1", dir)
			if want := "hearth_1.2.3~rc.1_" + arch + ".deb"; filepath.Base(deb) != want {
				t.Errorf("it is called %s, not %s", filepath.Base(deb), want)
			}
			for field, want := range map[string]string{"Package": "hearth", "Version": "1.2.3~rc.1", "Architecture": arch, "Depends": "", "Priority": "optional"} {
				if got := strings.TrimSpace(must(t, "", nil, "dpkg-deb", "--field", deb, field)); got != want {
					t.Errorf("%s: %q, want %q", field, got, want)
				}
			}
			got := map[string]string{}
			for line := range strings.Lines(must(t, "", []string{"TZ=UTC"}, "dpkg-deb", "--contents", deb)) {
				fields := strings.Fields(line)
				if len(fields) != 6 || fields[1] != "root/root" {
					t.Errorf("unexpected: %s", line)
					continue
				}
				if !strings.HasPrefix(fields[0], "d") {
					got[strings.TrimPrefix(fields[5], ".")] = fields[0]
				} else if fields[0] != "drwxr-xr-x" {
					t.Errorf("a directory's mode: %s", line)
				}
			}
			if diff := cmp.Diff(content, got); diff != "" {
				t.Errorf("contents: %s", diff)
			}
			control := t.TempDir()
			must(t, "", nil, "dpkg-deb", "--control", deb, control)
			list, err := os.ReadFile(filepath.Join(control, "conffiles"))
			if err != nil {
				t.Fatal(err)
			}
			files := strings.Fields(string(list))
			slices.Sort(files)
			if diff := cmp.Diff(conffiles, files); diff != "" {
				t.Errorf("conffiles: %s", diff)
			}
			for _, script := range []string{"postinst", "prerm", "postrm"} {
				must(t, "", nil, "sh", "-n", filepath.Join(control, script))
				if info, err := os.Stat(filepath.Join(control, script)); err != nil || info.Mode().Perm() != 0o755 {
					t.Errorf("%s: %v %v", script, info, err)
				}
			}
			sameAgain(t, deb, buildPackage(t, "deb", arch, "1.2.3~rc.1", dir))
		})
	}
}

func sameAgain(t *testing.T, first, second string) {
	t.Helper()
	a, err := os.ReadFile(first)
	if err != nil {
		t.Fatal(err)
	}
	b, err := os.ReadFile(second)
	if err != nil {
		t.Fatal(err)
	}
	if string(a) != string(b) {
		t.Errorf("%s built twice differs", filepath.Base(first))
	}
}

func TestRPMs(t *testing.T) {
	need(t)
	for arch, machine := range map[string]string{"arm64": "aarch64", "amd64": "x86_64"} {
		t.Run(arch, func(t *testing.T) {
			dir := standIns(t)["linux/"+arch]
			for _, name := range []string{"bootstrap", "nodeagent"} {
				write(t, filepath.Join(dir, name+".8"), ".TH "+name+" 8\n", 0o640)
			}
			file := buildPackage(t, "rpm", arch, "1.2.3~rc.1", dir)
			query := func(args ...string) string {
				t.Helper()
				// --dbpath: whether this machine has a database of rpm's does not matter.
				return strings.TrimSpace(must(t, "", nil, "rpm", append([]string{"--dbpath", t.TempDir(), "-q", "-p", file}, args...)...))
			}
			if got, want := query("--qf", "%{NAME} %{VERSION} %{ARCH} %{LICENSE}"), "hearth 1.2.3~rc.1 "+machine+" Apache-2.0"; got != want {
				t.Errorf("it is %q, want %q", got, want)
			}
			got := map[string]string{}
			for line := range strings.Lines(query("--qf", `[%{FILEMODES:perms} %{FILEUSERNAME} %{FILENAMES}\n]`)) {
				fields := strings.Fields(line)
				if len(fields) != 3 || fields[1] != "root" {
					t.Errorf("unexpected: %s", line)
					continue
				}
				if !strings.HasPrefix(fields[0], "d") {
					got[fields[2]] = fields[0]
				}
			}
			if diff := cmp.Diff(content, got); diff != "" {
				t.Errorf("contents: %s", diff)
			}
			files := strings.Fields(query("--configfiles"))
			slices.Sort(files)
			if diff := cmp.Diff(conffiles, files); diff != "" {
				t.Errorf("configuration files: %s", diff)
			}
			for _, script := range []string{"postinstall", "preuninstall", "postuninstall"} {
				if !strings.Contains(query("--scripts"), script+" scriptlet") {
					t.Errorf("there is no %s script", script)
				}
			}
			sameAgain(t, file, buildPackage(t, "rpm", arch, "1.2.3~rc.1", dir))
		})
	}
}

// TestTheBootstrapUnitsSettingsExist: each variable of ours in its environment
// file is an option of the command.
func TestTheBootstrapUnitsSettingsExist(t *testing.T) {
	binary, err := bootstrapper()
	if err != nil {
		needs.Missing(t, "%v", err)
	}
	help := must(t, "", nil, binary, "run", "--help")
	env, err := os.ReadFile(filepath.Join(scripts, "bootstrap.env"))
	if err != nil {
		t.Fatal(err)
	}
	found := 0
	for line := range strings.Lines(string(env)) {
		if name, _, ok := strings.Cut(strings.TrimPrefix(line, "#"), "="); ok && strings.HasPrefix(name, "HEARTH_") {
			found++
			if !strings.Contains(help, "$"+name) {
				t.Errorf("`bootstrap run` knows no %s", name)
			}
		}
	}
	if found < 2 {
		t.Errorf("only %d variables found", found)
	}
}

// TestTheUnitsOptionsExist: each option and variable that units and
// environment files name is one of the command's.
func TestTheUnitsOptionsExist(t *testing.T) {
	binary, err := nodeagent()
	if err != nil {
		needs.Missing(t, "%v", err)
	}
	for command, unit := range map[string]string{"run": "hearth-nodeagent.service", "engine": "hearth-engine.service"} {
		help := must(t, "", nil, binary, command, "--help")
		data, err := os.ReadFile(filepath.Join(root, "systemd", unit))
		if err != nil {
			t.Fatal(err)
		}
		env, err := os.ReadFile(filepath.Join(scripts, map[string]string{"run": "nodeagent.env", "engine": "engine.env"}[command]))
		if err != nil {
			t.Fatal(err)
		}
		named := map[string]bool{}
		_, start, _ := strings.Cut(string(data), "ExecStart=")
		start, _, _ = strings.Cut(start, "\n\n")
		for word := range strings.FieldsSeq(start) {
			if strings.HasPrefix(word, "--") {
				named[word] = true
			}
		}
		for line := range strings.Lines(string(env)) {
			if name, _, ok := strings.Cut(strings.TrimPrefix(line, "#"), "="); ok && strings.HasPrefix(name, "HEARTH_") {
				named["$"+name] = true
			}
		}
		if len(named) < 4 {
			t.Errorf("%s: only %v found", unit, slices.Sorted(maps.Keys(named)))
		}
		for name := range named {
			if !strings.Contains(help, name) {
				t.Errorf("%s: `nodeagent %s` has no %s", unit, command, name)
			}
		}
	}
}

// TestTheChartsOptionsExist is the same for the arguments of both DaemonSets.
func TestTheChartsOptionsExist(t *testing.T) {
	binary, err := nodeagent()
	if err != nil {
		needs.Missing(t, "%v", err)
	}
	all := rendered(t, "--set", "agent.containerdSocket=/run/x.sock", "--set", "agent.drainOnRebalance=true")
	for command, name := range map[string]string{"run": "hearth-nodeagent", "engine": "hearth-engine"} {
		help := must(t, "", nil, binary, command, "--help")
		args := fmt.Sprint(all["DaemonSet/"+name])
		found := 0
		for word := range strings.FieldsSeq(args) {
			if option, ok := strings.CutPrefix(strings.Trim(word, "[]"), "--"); ok {
				option, _, _ = strings.Cut(option, "=")
				found++
				if !strings.Contains(help, "--"+option) {
					t.Errorf("`nodeagent %s` has no --%s", command, option)
				}
			}
		}
		if found < 7 {
			t.Errorf("%s: only %d options found", name, found)
		}
	}
}
