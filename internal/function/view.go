package function

import (
	"encoding/json"
	"fmt"
	"hash/fnv"
	"slices"

	"github.com/hearth-sh/hearth/api/v1alpha1"
)

// This file holds what every Store derives alike from its records.

// NewDesired is what a node should do for f, whose revisions are revs in
// ascending order. A wanted revision that failed for good steps back for the
// one that answered before, so that a node works on getting that one back even
// if it has lost it; the way out is a new revision or a rollback.
func NewDesired(f Function, revs []Revision) v1alpha1.DesiredFunction {
	d := v1alpha1.DesiredFunction{Name: f.Name, Tenant: f.Tenant}
	candidates := make([]v1alpha1.DesiredRevision, 2)
	var have []v1alpha1.Artifact
	for i := range revs {
		r := &revs[i]
		switch r.Number {
		case f.Wanted:
			candidates[0] = desiredRevision(r)
			if r.State == v1alpha1.StateFailed && f.LastActive != 0 && f.LastActive != f.Wanted {
				candidates[0].Revision = 0
			}
		case f.LastActive:
			candidates[1] = desiredRevision(r)
		}
	}
	for _, c := range candidates {
		if c.Revision != 0 {
			d.Candidates = append(d.Candidates, c)
			have = append(have, c.Artifact)
		}
	}
	for i := len(revs) - 1; i >= 0 && len(d.Keep) < KeepArtifacts; i-- {
		r := &revs[i]
		if r.State != v1alpha1.StateFailed && !slices.Contains(have, r.Artifact) {
			d.Keep = append(d.Keep, r.Artifact)
			have = append(have, r.Artifact)
		}
	}
	return d
}

func desiredRevision(r *Revision) v1alpha1.DesiredRevision {
	return v1alpha1.DesiredRevision{
		Revision: r.Number, Artifact: r.Artifact,
		MemoryMiB: r.Settings.MemoryMiB, TimeoutMS: r.Settings.TimeoutMS, Concurrency: r.Settings.Concurrency,
		Env: r.Settings.Env, Secrets: r.Settings.Secrets,
	}
}

// NewETag returns the strong entity tag of f: config, which identifies what is
// wanted and changes with nothing else, and a hash of what nodes say. Writers
// are held to config only (Precondition.IfMatch).
func NewETag(config string, f Function) string {
	h := fnv.New64a()
	r := f.Revision
	_ = json.NewEncoder(h).Encode([]any{f.Active, f.LastActive, f.Warm, r.State, r.Error, r.Retrying, r.Phases, r.NodePhases})
	return fmt.Sprintf("%q", fmt.Sprintf("%s.%016x", config, h.Sum64()))
}

// configPart is what NewETag was given as config, within an entity tag, empty for a weak or
// foreign one.
func configPart(tag string) string {
	if len(tag) < 2 || tag[0] != '"' || tag[len(tag)-1] != '"' {
		return ""
	}
	tag = tag[1 : len(tag)-1]
	if i := len(tag) - 17; i > 0 && tag[i] == '.' {
		return tag[:i]
	}
	return ""
}
