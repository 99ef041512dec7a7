// Package artifact brings files whose digest is known beforehand onto a
// machine: k3s, its images, Wasm shims, the ECR credential provider, CNI
// manifests and Hearth's own binaries.
//
// It owns downloading (mirrors, retries, resuming), verifying, unpacking and
// installing such files, recognising those that are there already, and the
// signed document that says which digests to trust. It does not decide which
// artifacts a node needs or where credentials come from, and it executes
// nothing.
//
// What holds at every instant, also after a power failure: a destination is
// either what it was or the verified new file; a file that was not verified
// has mode 0600 and a name of ours; and every unfinished file is found and
// continued or removed by the next run. What is on disk is believed only after
// it was hashed in this run.
package artifact
