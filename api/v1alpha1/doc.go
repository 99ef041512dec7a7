// Package v1alpha1 holds the versioned types that people, scripts and other
// processes rely on: functions and their revisions as the submit API shows
// them, what a node should run, what it reports back, and a node's status.
//
// It owns shapes and names only. It imports nothing of Hearth, opens nothing
// and decides nothing. Fields are added, never renamed or given a new meaning,
// within one version.
package v1alpha1

// Group is the one prefix of every label, annotation, condition, taint and
// API group that Hearth owns.
const Group = "hearth.sh"

// APIVersion is the value of every document's apiVersion member.
const APIVersion = Group + "/v1alpha1"
