package bootstrap

import "time"

// PhaseDescription says what a phase does and how long it may take.
type PhaseDescription struct {
	Name PhaseName
	// Does is a sentence without its full stop.
	Does string
	// Within bounds the phase with all its attempts; 0 where Field does.
	Within time.Duration
	// Field is the one of spec.timeouts that bounds it, such as "fetch".
	Field string
}

// PhaseDescriptions lists the phases in order, for docs/bootstrap.md.
func PhaseDescriptions() []PhaseDescription {
	return []PhaseDescription{
		{PhaseDiscover, "reads identity, tags and user-data from instance metadata (IMDSv2 only), once", discoverWithin, ""},
		{PhaseConfigure, "lays profile, /etc/hearth/*.yaml, user-data and tags over each other and checks the result", configureWithin, ""},
		{PhasePreflight, "looks whether this machine can become a node: processor, kernel, control groups, memory, disk, clock", preflightWithin, ""},
		{PhaseFetch, "brings the files that are not there with the right digest, all at once", 0, "fetch"},
		{PhasePrepare, "loads kernel modules and sets sysctls, now and for every boot", prepareWithin, ""},
		{PhaseElect, "founds a cluster, or finds a server that lets this machine in", 0, "join"},
		{PhaseInstall, "writes k3s's configuration, registries, credential provider, addons and unit; restores a snapshot if that is asked for, within 10m more", installWithin, ""},
		{PhaseStart, "has systemd start k3s, or restart one that was started from something else", 0, "ready"},
		{PhaseReady, "makes a founder's cluster the one that others join, and waits until the node is Ready", 0, "ready"},
		{PhaseProve, "runs a WebAssembly module through every configured runtime", 0, "prove"},
		{PhaseSignal, "tells the Auto Scaling group and CloudFormation, where configured", signalWithin, ""},
	}
}
