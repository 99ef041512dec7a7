package systemd

import "github.com/hearth-sh/hearth/internal/bootstrap/fault"

// Codes of the failures of this package.
const (
	// CodeNoBus: there is no D-Bus to ask systemd over, or systemd is not on it.
	CodeNoBus fault.Code = "systemd-unreachable"
	// CodePermission: D-Bus or systemd refuses us.
	CodePermission fault.Code = "systemd-permission-denied"
	// CodeNoAnswer: systemd did not answer within the deadline of a call.
	CodeNoAnswer fault.Code = "systemd-no-answer"
	// CodeRefused: systemd refused a request.
	CodeRefused fault.Code = "systemd-request-refused"
	// CodeUnitMissing: there is no such unit.
	CodeUnitMissing fault.Code = "unit-missing"
	// CodeUnitInvalid: systemd cannot load the unit, or it is masked.
	CodeUnitInvalid fault.Code = "unit-invalid"
	// CodeUnitFailed: the unit failed, and systemd does not try again.
	CodeUnitFailed fault.Code = "unit-failed"
	// CodeUnitLoops: the unit's process ends and is started over and over.
	CodeUnitLoops fault.Code = "unit-restarts-in-a-loop"
	// CodeUnitEnded: the unit's process ended without failing.
	CodeUnitEnded fault.Code = "unit-ended"
	// CodeUnitTimeout: the unit is still starting at the deadline.
	CodeUnitTimeout fault.Code = "unit-start-timeout"
	// CodeStopTimeout: the unit is still stopping at the deadline.
	CodeStopTimeout fault.Code = "unit-stop-timeout"
)

// Explanations lists every code of this package, for `bootstrap explain`.
func Explanations() []fault.Explanation {
	return []fault.Explanation{
		fault.Explain(CodeNoBus, "systemd cannot be asked over D-Bus", remedyBus),
		fault.Explain(CodePermission, "systemd refuses this user", "run it as root"),
		fault.Explain(CodeNoAnswer, "systemd did not answer in time", remedyNoAnswer),
		fault.Explain(CodeRefused, "systemd refused a request", "see its reason in the message"),
		fault.Explain(CodeUnitMissing, "a unit is not there", "see whether its file is in /etc/systemd/system, and run bootstrap again"),
		fault.Explain(CodeUnitInvalid, "systemd cannot load a unit, or it is masked", "systemd-analyze verify UNIT says what is wrong; systemctl unmask UNIT takes a mask off"),
		fault.Explain(CodeUnitFailed, "a unit failed", remedyJournal),
		fault.Explain(CodeUnitLoops, "a unit's process ends again and again", remedyJournal),
		fault.Explain(CodeUnitEnded, "a unit's process ended although it should stay", remedyJournal),
		fault.Explain(CodeUnitTimeout, "a unit did not become ready in time", remedyJournal),
		fault.Explain(CodeStopTimeout, "a unit did not stop in time", "systemctl kill -s KILL UNIT ends it the hard way"),
	}
}

const (
	remedyBus      = "install dbus (or dbus-broker) in the image, and see that systemd is process 1"
	remedyNoAnswer = "see whether process 1 is stuck (systemctl list-jobs, dmesg), and reboot the machine if it is"
	remedyJournal  = "journalctl -u UNIT has all it said; the last lines are in the message"
)
