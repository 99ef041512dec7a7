package submit

import (
	"fmt"
	"os"
	"strings"
	"testing"
)

func TestDocumentationListsEveryProblem(t *testing.T) {
	text, err := os.ReadFile("../../docs/api.md")
	if err != nil {
		t.Fatal(err)
	}
	for _, k := range Problems() {
		retryable := "no"
		if k.Retryable {
			retryable = "yes"
		}
		row := fmt.Sprintf("| `%s` | %d | %s | %s |", k.Code, k.Status, retryable, k.Title)
		if !strings.Contains(string(text), row) {
			t.Errorf("docs/api.md has no line %s", row)
		}
	}
}
