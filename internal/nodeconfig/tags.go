package nodeconfig

import (
	"sort"
	"strings"
	"unicode/utf8"

	"github.com/hearth-sh/hearth/api/v1alpha1"
)

// Limits of EC2's tags, and what can be said with them: one short value each.
const (
	// MaxTagValue is the limit in characters.
	MaxTagValue = 256
	// TagPrefix begins the tags that configure a machine. EC2 refuses "/" in
	// the keys of an instance whose tags are in instance metadata, hence the
	// colon.
	TagPrefix = v1alpha1.Group + ":"
	// tagAutoScalingGroup is set by EC2 Auto Scaling.
	tagAutoScalingGroup = "aws:autoscaling:groupName"
)

// Tag is an instance tag that sets a field.
type Tag struct {
	// Key is the tag's key.
	Key string
	// Path is the field it sets.
	Path string
}

// Tags lists the tags that are read.
func Tags() []Tag {
	return []Tag{
		{TagPrefix + "pool", "spec.pool"},
		{TagPrefix + "role", "spec.role"},
		{TagPrefix + "cluster", "spec.cluster.name"},
		{TagPrefix + "cluster-store", "spec.cluster.store"},
		{TagPrefix + "cluster-server", "spec.cluster.server"},
		{TagPrefix + "k3s-version", "spec.k3s.version"},
		{TagPrefix + "artifacts-manifest", "spec.artifacts.manifest"},
		{TagPrefix + "lifecycle-hook", "spec.signal.lifecycleHook"},
	}
}

// tagDocument makes a document of the tags, nil when none is for us. The same
// keys with "/" mean the same: they come from tools that read tags otherwise
// than through instance metadata.
func tagDocument(tags map[string]string, ps *problems) *node {
	var keys []string
	for key := range tags {
		if strings.HasPrefix(key, TagPrefix) || strings.HasPrefix(key, v1alpha1.Group+"/") {
			keys = append(keys, key)
		}
	}
	sort.Strings(keys)
	known := map[string]string{}
	for _, t := range Tags() {
		known[strings.TrimPrefix(t.Key, TagPrefix)] = t.Path
	}
	var document *node
	for _, key := range keys {
		o := Origin{Source: "tag " + shorten(key)}
		name := key[len(TagPrefix):]
		value := tags[key]
		path, ok := known[name]
		switch {
		case !ok:
			ps.addf(o, "", "this tag is not known%s", suggest(name, keysOf(known), false))
			continue
		case value == "" || utf8.RuneCountInString(value) > MaxTagValue || !utf8.ValidString(value):
			ps.addf(o, path, "the tag's value must have 1 to %d characters", MaxTagValue)
			continue
		}
		at := strings.Split(path, ".")
		if other := document.at(at...); other != nil {
			ps.addf(o, path, "%s says the same field; remove one of them", other.origin)
			continue
		}
		document = document.with(&node{origin: o, value: value}, at...)
	}
	if document == nil {
		return nil
	}
	checker{ps}.secrets(document, "")
	return document
}
