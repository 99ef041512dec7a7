package main

import (
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
)

// config writes files below a directory and returns the path of config.yaml.
func config(t *testing.T, files map[string]string) string {
	t.Helper()
	dir := t.TempDir()
	for name, content := range files {
		path := filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return filepath.Join(dir, "config.yaml")
}

func TestSettingsMergeAsK3sDocumentsIt(t *testing.T) {
	base := "token: a\nserver: https://one:6443\n"
	for name, c := range map[string]struct {
		files   map[string]string
		args    []string
		environ []string
		flag    string
		want    []string
	}{
		"a file's value":                        {files: map[string]string{"config.yaml": base + "node-name: node-n\n"}, flag: "node-name", want: []string{"node-n"}},
		"drop-ins win in the order of names":    {files: map[string]string{"config.yaml": base + "node-name: node-n\n", "config.yaml.d/20.yaml": "node-name: node-z\n", "config.yaml.d/10.yml": "node-name: node-y\n"}, flag: "node-name", want: []string{"node-z"}},
		"other files in the directory are none": {files: map[string]string{"config.yaml": base + "node-name: node-n\n", "config.yaml.d/20.yaml.bak": "node-name: node-z\n"}, flag: "node-name", want: []string{"node-n"}},
		"a list is replaced as a whole":         {files: map[string]string{"config.yaml": base + "node-label: [a=1, b=2]\n", "config.yaml.d/a.yaml": "node-label: [c=3]\n"}, flag: "node-label", want: []string{"c=3"}},
		"a plus appends":                        {files: map[string]string{"config.yaml": base + "node-label: [a=1]\n", "config.yaml.d/a.yaml": "node-label+: [c=3]\n"}, flag: "node-label", want: []string{"a=1", "c=3"}},
		"a plus appends to a plain value":       {files: map[string]string{"config.yaml": base + "node-label: a=1\n", "config.yaml.d/a.yaml": "node-label+: c=3\n"}, flag: "node-label", want: []string{"a=1", "c=3"}},
		"arguments win over files":              {files: map[string]string{"config.yaml": base + "node-name: node-n\n"}, args: []string{"--node-name", "m"}, flag: "node-name", want: []string{"m"}},
		"files win over the environment":        {files: map[string]string{"config.yaml": base + "node-name: node-n\n"}, environ: []string{"K3S_NODE_NAME=e"}, flag: "node-name", want: []string{"node-n"}},
		"the environment is read":               {files: map[string]string{"config.yaml": base}, environ: []string{"K3S_NODE_NAME=e"}, flag: "node-name", want: []string{"e"}},
		"short flags":                           {files: map[string]string{"config.yaml": ""}, args: []string{"-t", "b", "-s=https://two:6443"}, flag: "server", want: []string{"https://two:6443"}},
		"drop-ins alone":                        {files: map[string]string{"config.yaml.d/a.yaml": base + "debug: true\n"}, flag: "debug", want: []string{"true"}},
		"numbers keep their digits":             {files: map[string]string{"config.yaml": base + "lb-server-port: 6444\n"}, flag: "lb-server-port", want: []string{"6444"}},
		"a token's file":                        {files: map[string]string{"config.yaml": "server: https://one:6443\ntoken-file: DIR/secret\n", "secret": "s\n"}, flag: "token", want: []string{"s"}},
	} {
		t.Run(name, func(t *testing.T) {
			path := config(t, c.files)
			if content, err := os.ReadFile(path); err == nil {
				if err := os.WriteFile(path, []byte(strings.ReplaceAll(string(content), "DIR", filepath.Dir(path))), 0o600); err != nil {
					t.Fatal(err)
				}
			}
			o, err := loadOptions(agentCommand, append([]string{"--config=" + path}, c.args...), c.environ)
			if err != nil {
				t.Fatal(err)
			}
			if got := o.all(c.flag); !reflect.DeepEqual(got, c.want) {
				t.Errorf("%s is %v, want %v", c.flag, got, c.want)
			}
		})
	}
}

func TestMistakesInSettingsAreErrors(t *testing.T) {
	for name, c := range map[string]struct {
		command command
		config  string
		args    []string
		environ []string
		word    string
	}{
		"an unknown key":                   {command: serverCommand, config: "node-lable: [a=b]", word: "node-lable"},
		"a server's key for an agent":      {command: agentCommand, config: "token: a\nserver: https://a:6443\ncluster-init: true", word: "server's setting"},
		"an unknown flag":                  {command: serverCommand, args: []string{"--nope"}, word: "not defined: -nope"},
		"an unknown variable":              {command: serverCommand, environ: []string{"K3S_TOKN=x"}, word: "K3S_TOKN"},
		"a server's variable for an agent": {command: agentCommand, environ: []string{"K3S_CLUSTER_INIT=true"}, word: "K3S_CLUSTER_INIT"},
		"a flag without its value":         {command: serverCommand, args: []string{"--token"}, word: "needs an argument"},
		"no boolean":                       {command: serverCommand, config: "cluster-init: perhaps", word: "boolean"},
		"no number":                        {command: serverCommand, config: "https-listen-port: many", word: "number"},
		"no scalar":                        {command: serverCommand, config: "token: {a: b}", word: "token"},
		"a key twice":                      {command: serverCommand, config: "token: a\ntoken: b", word: "token"},
		"a list in a file":                 {command: serverCommand, config: "- token", word: "mapping"},
		"what the stand-in does not do":    {command: serverCommand, config: "docker: true", word: "does not do"},
		"an unknown component":             {command: serverCommand, config: "disable: [treafik]", word: "treafik"},
		"founding and joining":             {command: serverCommand, config: "cluster-init: true\nserver: https://a:6443", word: "exclude"},
		"an agent without a server":        {command: agentCommand, config: "token: a", word: "--server is required"},
		"an agent without a token":         {command: agentCommand, config: "server: https://a:6443", word: "--token is required"},
		"no TLS":                           {command: agentCommand, config: "token: a\nserver: http://a:6443", word: "https"},
		"a token and a file":               {command: serverCommand, config: "token: a\ntoken-file: /nowhere", word: "exclude"},
		"a token file that is not there":   {command: serverCommand, config: "token-file: /nowhere/token", word: "/nowhere/token"},
		"a schedule that is none":          {command: serverCommand, config: "etcd-snapshot-schedule-cron: often", word: "schedule-cron"},
		"a schedule that never comes":      {command: serverCommand, config: "etcd-snapshot-schedule-cron: 0 0 31 2 *", word: "never"},
		"snapshots to no bucket":           {command: serverCommand, config: "etcd-s3: true", word: "bucket"},
		"an endpoint that is a URL":        {command: serverCommand, config: "etcd-s3: true\netcd-s3-bucket: b\netcd-s3-endpoint: https://a", word: "HOST"},
		"half of a key":                    {command: serverCommand, config: "etcd-s3-access-key: a", word: "missing"},
		"settings of S3 from a Secret":     {command: serverCommand, config: "etcd-s3-config-secret: a", word: "does not do"},
		"a snapshot without a reset":       {command: serverCommand, args: []string{"--cluster-reset-restore-path=/a"}, word: "--cluster-reset required"},
		"a word that is no flag":           {command: serverCommand, args: []string{"now"}, word: "now"},
	} {
		t.Run(name, func(t *testing.T) {
			path := config(t, map[string]string{"config.yaml": c.config})
			_, err := loadOptions(c.command, append([]string{"--config=" + path}, c.args...), c.environ)
			if err == nil || !strings.Contains(err.Error(), c.word) {
				t.Errorf("error %v, want one with %q", err, c.word)
			}
		})
	}
}

func TestTokensAreReadAsK3sDoes(t *testing.T) {
	hash := strings.Repeat("ab", 32)
	for token, want := range map[string]*access{
		"secret":                      {password: "secret"},
		"with:colon":                  {password: "with:colon"},
		"K10" + hash + "::server:s3":  {hash: hash, user: "server", password: "s3"},
		"K10" + hash + "::node:a:b":   {hash: hash, user: "node", password: "a:b"},
		"K10::node:s":                 {user: "node", password: "s"},
		"":                            nil,
		"K10abc::node:s":              nil,
		"K10" + hash + "::nopassword": nil,
		"K10" + hash + "::server:":    nil,
	} {
		got, err := parseToken(token)
		if (err == nil) != (want != nil) || want != nil && *got.only() != *want.only() {
			t.Errorf("%q is %+v, %v", token, got, err)
		}
	}
}

// only is what a token says.
func (a *access) only() *[3]string { return &[3]string{a.hash, a.user, a.password} }
