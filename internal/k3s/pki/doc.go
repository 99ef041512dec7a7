// Package pki makes what a k3s cluster trusts before the cluster exists: the
// certificate authorities of one generation and the tokens that go with them.
//
// k3s makes its own authorities when it first starts, and only then is the hash
// known that lets a joining node verify it. Placing the authorities on disk
// before the first start turns that around: the token names the authority from
// the beginning, so no node ever has to trust what a server shows it.
//
// The package owns the formats (the files of k3s's server/tls directory as
// pkg/daemons/control/deps of k3s reads them, its tokens as pkg/clientaccess
// parses them) and the compact form in which authorities are published. It
// writes no files and knows no store. What it holds is secret: nothing here
// prints, logs or marshals a key or a token unless it is asked to by name.
package pki
