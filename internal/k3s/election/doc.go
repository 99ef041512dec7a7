// Package election decides which server founds a k3s cluster, so that machines
// which start together become one cluster, whatever dies, hangs or comes back.
//
// It owns the records in the cluster's store (S3, parameters of AWS Systems
// Manager, or a directory), what this machine remembers of them, and the
// credentials of each generation. It starts no k3s, touches no k3s data and
// talks to no node: it says what to do, and is told when it is done.
//
// # Protocol
//
// One primitive carries it: a key can be created once. It is what S3 (PutObject
// with If-None-Match: *) and Systems Manager (PutParameter without Overwrite)
// have in common; the latter cannot compare and swap. Reads decide nothing,
// since they may lag behind, and nothing is ever removed.
//
//		generation/<N>/holder       created by who may try to found generation N
//		generation/<N>/heartbeat    overwritten by the holder
//		server/<N>/credentials      created by the holder: CA keys, both tokens
//		agent/<N>/credentials       created by the holder: CA certificate, agent token
//		generation/<N>/outcome      created once: founded or abandoned
//		members/<N>/<instance>      overwritten by the server it is about
//
//	 1. A server that finds no generation, or the newest one abandoned, creates
//	    the next one's holder record. Whoever succeeds holds the generation.
//	 2. The holder beats, publishes authorities and tokens, and starts k3s with
//	    them. Nobody else uses them yet.
//	 3. When its API server is ready, the holder creates the outcome "founded".
//	    From then on, and not before, others join.
//	 4. Other servers watch the heartbeat. If it has not changed for the lease,
//	    they create the outcome "abandoned", and go to 1.
//
// # Why there is one cluster
//
// The next generation can be begun only once the last one is abandoned, and an
// outcome is created once: "founded" and "abandoned" exclude each other, so at
// most one generation is ever founded (but for restores, below). Nodes join
// founded generations only, so a holder that was given up while it was paused
// has a k3s that nobody joins; when it wakes, creating "founded" fails with
// ErrFenced. Its data goes before it takes part again: the machine remembers
// durably, before it writes the holder record, that it may hold the generation,
// and Elect calls Discard until that succeeds, also after a restart.
//
// Nothing in this depends on time. The lease only decides when others lose
// patience, and is measured by the watcher's own monotonic clock between two
// looks that are not too far apart; clocks of machines are never compared. A
// lease that is far too short costs attempts, not safety.
//
// An answer can be lost, and a request can take effect long after its sender
// gave up. Every record that is created carries something only its writer
// knows, so that reading the record tells who was first. A holder that crashes
// finds its own nonce and resumes. One that founded and crashed before it
// learned of that finds the outcome with its nonce.
//
// A store which ignores the condition would make all of this void, as some
// S3-compatible ones do; the winner of a holder record therefore checks that
// the record cannot be created again before it relies on it.
//
// # Restores
//
// A configured Restore names the generation to restore, N. A server that finds
// N to be the newest creates N+1, whose holder record says what is restored,
// with N's credentials, so that agents and people recognise the cluster. If
// that holder is given up, the next generation restores the same. Once a newer
// generation exists, the request is done and ignored. Machines with data of an
// older generation are refused with CodeSuperseded rather than cleaned: that
// data was somebody's cluster.
//
// # What it does not do
//
// A founded cluster whose only server is lost with its disk is not founded
// again: an empty cluster under the same name would hide the loss. The founder
// gets CodeDataLost, joiners find nobody to join, and people restore a snapshot
// or choose another prefix.
//
// # Access
//
// Servers read and create everything under the prefix, and overwrite
// heartbeats and their member records. Agents read generation/, members/ and
// agent/ only. On S3 both need s3:ListBucket for the prefix, without which S3
// denies what does not exist. Nobody needs to delete; a policy may forbid it.
package election
