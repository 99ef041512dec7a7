package engine

import (
	"os"
	"strings"
	"testing"
)

// ownCodes are problems that only the agent can see, on the control socket,
// and what is counted but never answered.
var ownCodes = map[string]bool{
	"state-invalid": true, "log-parameters-invalid": true, "status-parameter-invalid": true, "client-gone": true,
}

func TestDocumentationListsEveryProblem(t *testing.T) {
	text, err := os.ReadFile("../../docs/functions.md")
	if err != nil {
		t.Fatal(err)
	}
	for code := range titles {
		if !ownCodes[code] && !strings.Contains(string(text), "| `"+code+"` |") {
			t.Errorf("docs/functions.md does not list %s", code)
		}
	}
}
