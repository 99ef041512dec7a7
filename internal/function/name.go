package function

import (
	"fmt"
	"strings"
)

// MaxNameBytes is the length of a DNS label (RFC 1035, section 2.3.4), which
// a function's name becomes in its URL.
const MaxNameBytes = 63

// ValidateName says whether s can name a function: a lower-case DNS label
// that starts with a letter, ends with a letter or digit and is not a
// punycode label ("xn--…", which would let a name look like another one).
// The error is a *ValidationError with field "name".
func ValidateName(s string) error {
	return validateLabel("name", s)
}

// ValidateTenant says whether s can name a tenant. The rules are those of
// ValidateName, so that a tenant can become a namespace. The error is a
// *ValidationError with field "tenant".
func ValidateTenant(s string) error {
	return validateLabel("tenant", s)
}

func validateLabel(field, s string) error {
	bad := func(reason string) error {
		return &ValidationError{Field: field, Reason: reason}
	}
	switch {
	case s == "":
		return bad("must not be empty")
	case len(s) > MaxNameBytes:
		return bad(fmt.Sprintf("must be at most %d characters, has %d", MaxNameBytes, len(s)))
	case s[0] < 'a' || s[0] > 'z':
		return bad("must start with a letter from a to z")
	case s[len(s)-1] == '-':
		return bad("must end with a letter or digit")
	case strings.HasPrefix(s, "xn--"):
		return bad(`must not start with "xn--"`)
	}
	for _, c := range []byte(s) {
		if (c < 'a' || c > 'z') && (c < '0' || c > '9') && c != '-' {
			return bad("must consist of a to z, 0 to 9 and hyphens")
		}
	}
	return nil
}
