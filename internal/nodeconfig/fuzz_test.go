package nodeconfig

import (
	"bytes"
	"encoding/json"
	"errors"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/hearth-sh/hearth/internal/bootstrap/fault"
)

// checkOutcome holds what must be true of every input: a classified failure
// with a bounded list of problems, or a configuration that reads the same when
// it is dumped.
func checkOutcome(t *testing.T, r Resolved, err error) {
	t.Helper()
	if err != nil {
		var invalid *Invalid
		if fault.CodeOf(err) == "" || !errors.As(err, &invalid) || len(invalid.Problems) == 0 || len(invalid.Problems) > MaxProblems {
			t.Fatalf("not classified: %v", err)
		}
		for _, p := range invalid.Problems {
			if p.Message == "" || strings.ContainsAny(p.Origin.String(), "\n\r\x00\x1b") {
				t.Errorf("a problem that cannot be shown: %q", p)
			}
		}
		return
	}
	var dumped bytes.Buffer
	if err := Dump(&dumped, r, FormatYAML, true); err != nil {
		t.Fatal(err)
	}
	var ps problems
	documents := accept(parseYAML(dumped.Bytes(), Origin{Source: "dump"}, &ps), &ps, true)
	if len(documents) != 1 || len(ps.list) > 0 {
		t.Fatalf("its dump does not read: %v\n%s", ps.list, dumped.String())
	}
	want, err := json.Marshal(r.tree.plain())
	if err != nil {
		t.Fatal(err)
	}
	got, err := json.Marshal(documents[0].plain())
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(string(want), string(got)); diff != "" {
		t.Errorf("its dump reads otherwise:\n%s\n%s", diff, dumped.String())
	}
}

func FuzzUserData(f *testing.F) {
	for _, form := range userDataForms(f, least) {
		f.Add([]byte(form.text))
	}
	f.Add([]byte("#!/bin/sh\n"))
	f.Add([]byte(head + "spec: &a {node: {labels: {x: *a}}}"))
	f.Fuzz(func(t *testing.T, data []byte) {
		r, err := Resolve(t.Context(), Sources{UserData: data, Instance: &Instance{Region: "eu-central-1", Arch: "arm64"}})
		checkOutcome(t, r, err)
	})
}

// FuzzDocument lays a document over a valid one, so that the fuzzer need not
// find the way to a valid configuration by itself.
func FuzzDocument(f *testing.F) {
	for _, lines := range []string{
		"pool: build", "shims: []", "node: {labels: {a: b}, taints: [{key: a, effect: NoExecute}]}", "k3s: {config: {debug: true, v: 5, kubelet-arg: [a=b]}}",
		"addons: {hearth: {values: {a: [1, 2.5, null, x, {y: 0x10}]}}}", "network: {cni: cilium, clusterCIDR: '10.0.0.0/8'}",
		"cluster: {snapshots: {schedule: '*/5 * * * *'}, restore: {generation: 1, snapshot: /x}}", "host: {minDiskFree: 1Gi, sysctls: {a.b: '1'}}",
		"registries: {mirrors: {'*': {endpoints: ['https://x'], rewrite: {'^(.*)$': \"a\\n$1\"}}}}", "signal: {cloudFormation: {stack: a, resource: b}}",
		"artifacts: {files: [{name: k3s, urls: ['https://x/y'], sha256: " + digest + ", format: tar+gzip, member: a/b, installedSHA256: " + digest + "}]}",
	} {
		f.Add([]byte(lines))
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		text := least + "---\n" + head + "spec:\n  " + strings.ReplaceAll(string(data), "\n", "\n  ")
		var ps problems
		documents := accept(parseYAML([]byte(text), Origin{Source: "x"}, &ps), &ps, true)
		if err := ps.err(); err != nil {
			checkOutcome(t, Resolved{}, err)
			return
		}
		r, err := assemble(documents, Sources{}, &ps)
		checkOutcome(t, r, err)
	})
}

func FuzzTags(f *testing.F) {
	f.Add("hearth.sh:pool", "build")
	f.Add("hearth.sh/cluster-store", "ssm:///a")
	f.Add("hearth.sh:", "")
	f.Fuzz(func(t *testing.T, key, value string) {
		r, err := Resolve(t.Context(), Sources{UserData: []byte(least), Tags: map[string]string{key: value}})
		checkOutcome(t, r, err)
	})
}
