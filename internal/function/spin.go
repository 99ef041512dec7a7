package function

import (
	"fmt"
	"maps"
	"slices"
	"strings"
)

// SpinNameError says that a secret cannot become a variable of Spin.
type SpinNameError struct {
	// Name is the secret's; Problem completes the sentence "it cannot, because …".
	Name, Problem string
}

func (e *SpinNameError) Error() string {
	return fmt.Sprintf("the secret %s cannot become a variable of Spin: %s; rename it or use the runtime resident", e.Name, e.Problem)
}

// SpinVariables returns the names of Spin's variables for environment variables
// and secrets, by theirs. SpinKube hands variables to Spin as
// SPIN_VARIABLE_<NAME>, and Spin knows names in lower case (crates/expressions,
// Key). A secret reaches a guest of Spin as a variable only, so that each must
// have a name: the error is a *SpinNameError. An environment variable reaches it
// as one as well; one without a name that Spin takes, or whose name is another's
// already, is left out.
func SpinVariables(env, secrets []string) (map[string]string, error) {
	out := make(map[string]string, len(env)+len(secrets))
	taken := make(map[string]string, len(env)+len(secrets))
	for _, name := range slices.Sorted(slices.Values(secrets)) {
		variable := strings.ToLower(name)
		if problem := spinVariableProblem(variable); problem != "" {
			return nil, &SpinNameError{Name: name, Problem: problem}
		}
		if other, twice := taken[variable]; twice {
			return nil, &SpinNameError{Name: name, Problem: fmt.Sprintf("it differs from %s only by case", other)}
		}
		out[name], taken[variable] = variable, name
	}
	for _, name := range slices.Sorted(slices.Values(env)) {
		variable := strings.ToLower(name)
		if _, twice := taken[variable]; !twice && spinVariableProblem(variable) == "" {
			out[name], taken[variable] = variable, name
		}
	}
	return out, nil
}

// spinVariableProblem says why Spin refuses a variable's name in lower case.
func spinVariableProblem(name string) string {
	switch {
	case name == "":
		return "it has no name"
	case name[0] < 'a' || name[0] > 'z':
		return "Spin's names begin with a letter"
	case name[len(name)-1] == '_':
		return "Spin's names do not end with an underscore"
	case strings.Contains(name, "__"):
		return "Spin's names have no two underscores in a row"
	}
	for _, c := range []byte(name) {
		if (c < 'a' || c > 'z') && (c < '0' || c > '9') && c != '_' {
			return "Spin's names are made of letters, digits and underscores"
		}
	}
	return ""
}

// spinProblem checks what only pods of Spin ask of settings.
func (s Settings) spinProblem() error {
	if !s.Spin() {
		return nil
	}
	if _, err := SpinVariables(slices.Collect(maps.Keys(s.Env)), s.Secrets.Names()); err != nil {
		return &ValidationError{Field: "secrets", Reason: "must all be variables of Spin: " + err.Error()}
	}
	return nil
}
