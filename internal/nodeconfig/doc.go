// Package nodeconfig finds out what a machine is to become: it reads
// NodeConfig documents from their sources, lays them over each other, fills in
// every default, and remembers where each value came from.
//
// It owns the rules of the configuration, not the types (api/v1alpha1). It
// reads files it is told to and nothing else: instance metadata is handed in,
// and it changes nothing. All bytes it reads come from outside and are
// bounded in size, depth and number of nodes before they are looked at.
package nodeconfig

import "github.com/hearth-sh/hearth/internal/bootstrap/fault"

// Codes of the failures that Resolve returns.
const (
	// CodeInvalid: a source says something that a NodeConfig may not say.
	CodeInvalid fault.Code = "config-invalid"
	// CodeMissing: no source has a NodeConfig.
	CodeMissing fault.Code = "config-missing"
	// CodeUnreadable: a file of the configuration cannot be read.
	CodeUnreadable fault.Code = "config-unreadable"
	// CodeUserData: user-data is too large or its encoding is damaged, so that
	// nobody can tell what it says.
	CodeUserData fault.Code = "user-data-malformed"
	// CodeSpotServer: a server was about to run on a Spot instance.
	CodeSpotServer fault.Code = "spot-server-refused"
)

// Limits of what is read.
const (
	// MaxUserDataBytes is EC2's limit of user-data, before base64.
	MaxUserDataBytes = 16 << 10
	// MaxDocumentBytes bounds one file, and user-data after decompression.
	MaxDocumentBytes = 256 << 10
	// MaxFiles bounds the files of a directory, and those given by name.
	MaxFiles = 64
	// MaxDocuments bounds the documents of one file or user-data.
	MaxDocuments = 64
	// MaxDepth bounds how deep values nest.
	MaxDepth = 32
	// MaxNodes bounds the values of one source after its aliases are followed.
	MaxNodes = 20000
	// MaxProblems bounds what one error lists.
	MaxProblems = 100
)
