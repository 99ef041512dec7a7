package function

import (
	"errors"
	"maps"
	"strings"
	"testing"

	"github.com/hearth-sh/hearth/api/v1alpha1"
)

func TestSpinVariablesAreNamedInLowerCase(t *testing.T) {
	for _, test := range []struct {
		name         string
		env, secrets []string
		want         map[string]string
		bad, problem string // the secret that has no name, and why
	}{
		{name: "none"},
		{name: "both kinds", env: []string{"GREETING", "a1_B2"}, secrets: []string{"Token"}, want: map[string]string{"GREETING": "greeting", "a1_B2": "a1_b2", "Token": "token"}},
		{name: "environment variables without a name", env: []string{"_A", "A_", "A__B", "OK"}, want: map[string]string{"OK": "ok"}},
		{name: "environment variables of one name", env: []string{"level", "Level"}, want: map[string]string{"Level": "level"}},
		{name: "an environment variable with a secret's name", env: []string{"TOKEN"}, secrets: []string{"token"}, want: map[string]string{"token": "token"}},
		{name: "a secret that begins with an underscore", secrets: []string{"_TOKEN"}, bad: "_TOKEN", problem: "begin with a letter"},
		{name: "a secret that ends with an underscore", secrets: []string{"TOKEN_"}, bad: "TOKEN_", problem: "end with an underscore"},
		{name: "a secret with two underscores", secrets: []string{"A__B"}, bad: "A__B", problem: "two underscores"},
		{name: "secrets of one name", secrets: []string{"TOKEN", "Token"}, bad: "Token", problem: "only by case"},
	} {
		t.Run(test.name, func(t *testing.T) {
			got, err := SpinVariables(test.env, test.secrets)
			var bad *SpinNameError
			switch {
			case test.bad == "":
				if err != nil || !maps.Equal(got, test.want) {
					t.Errorf("%v, %v, want %v", got, err, test.want)
				}
			case !errors.As(err, &bad) || bad.Name != test.bad || !strings.Contains(err.Error(), test.problem):
				t.Errorf("%v, want a refusal of %s: %s", err, test.bad, test.problem)
			}
			if test.bad == "" {
				return
			}
			s := DefaultSettings()
			s.Secrets = Secrets{}
			for _, name := range test.secrets {
				s.Secrets[name] = "value"
			}
			if err := s.Validate(); err != nil {
				t.Errorf("resident: %v", err)
			}
			s.Runtime = v1alpha1.RuntimeSpin
			var invalid *ValidationError
			if err := s.Validate(); !errors.As(err, &invalid) || invalid.Field != "secrets" {
				t.Errorf("spin: %v", err)
			}
		})
	}
}
