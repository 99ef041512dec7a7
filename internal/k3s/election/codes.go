package election

import "github.com/hearth-sh/hearth/internal/bootstrap/fault"

// What can end an election.
const (
	// CodeLocation: the configured store is no location we know.
	CodeLocation fault.Code = "election-store-location"
	// CodeDenied: this machine's role may not do what the election needs.
	CodeDenied fault.Code = "election-store-denied"
	// CodeCredentials: this machine has no credentials for AWS.
	CodeCredentials fault.Code = "election-store-credentials"
	// CodeMissing: the bucket or directory does not exist.
	CodeMissing fault.Code = "election-store-missing"
	// CodeUnavailable: the store cannot be reached or answers with errors.
	CodeUnavailable fault.Code = "election-store-unavailable"
	// CodeUnsupported: the store cannot write conditionally, so cannot fence.
	CodeUnsupported fault.Code = "election-store-unsupported"
	// CodeCorrupt: a record in the store is not one of ours.
	CodeCorrupt fault.Code = "election-record-corrupt"
	// CodeTimeout: no generation was founded in time.
	CodeTimeout fault.Code = "election-timeout"
	// CodeFenced: this machine's attempt to found was given up by another.
	CodeFenced fault.Code = "election-fenced"
	// CodeSuperseded: this machine has data of an older generation.
	CodeSuperseded fault.Code = "election-superseded"
	// CodeDataLost: the founder lost its data and nobody else has it.
	CodeDataLost fault.Code = "election-data-lost"
	// CodeForeignData: this machine has data of no generation of this store.
	CodeForeignData fault.Code = "election-foreign-data"
	// CodeRestore: the generation to restore was never founded.
	CodeRestore fault.Code = "election-restore-unknown"
	// CodeExhausted: founding was tried far too often.
	CodeExhausted fault.Code = "election-exhausted"
	// CodeState: what this machine remembers of the election cannot be read
	// or written.
	CodeState fault.Code = "election-state"
)
