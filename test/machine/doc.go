// Package machine makes machines like those of EC2 on this machine, for tests:
// a booted Debian with a real systemd and a real cloud-init, an eth0 on a
// bridge with the others, an instance metadata service at 169.254.169.254 that
// gives each its own identity, tags and user-data, and, if wanted, a disk that
// loses what was not yet written when the power goes.
//
//	network := machine.Start(t, machine.Options{})
//	m, err := network.Add(ctx, machine.Spec{Name: "server-1", UserData: "#!/bin/sh\n..."})
//	err = m.Boot(ctx)
//	err = m.WaitCloudInit(ctx)
//	out, err := m.Exec(ctx, "systemctl", "status", "k3s")
//
// A machine is a systemd-nspawn container: its own processes, mounts, host
// name, network and cgroups, but this machine's kernel and clock. It owns every
// process, namespace, cgroup, mount, loop device and file that it makes and
// removes them: at Close, and what a killed test left with the next New. It
// knows the metadata service of internal/imds/imdstest and nothing else of
// Hearth.
package machine
