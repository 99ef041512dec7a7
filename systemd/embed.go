// Package units holds the systemd units that Hearth ships, for programs that
// install one themselves. The same files are in the deb and rpm packages.
package units

import _ "embed"

// BootstrapName is the name of the unit that runs bootstrap at every boot.
const BootstrapName = "hearth-bootstrap.service"

// Bootstrap is that unit.
//
//go:embed hearth-bootstrap.service
var Bootstrap []byte
