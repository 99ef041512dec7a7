package sandbox

import "golang.org/x/sys/unix"

const (
	auditArchitecture = unix.AUDIT_ARCH_AARCH64
	foreignNumbers    = 0
)

// allowedLegacy has what x/sys names differently here.
var allowedLegacy = []uint32{unix.SYS_FSTATAT}

var forbiddenLegacy []uint32
