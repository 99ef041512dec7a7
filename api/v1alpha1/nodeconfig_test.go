package v1alpha1_test

import (
	"strings"
	"testing"
	"time"

	"github.com/hearth-sh/hearth/api/v1alpha1"
)

func TestDurationSpan(t *testing.T) {
	for text, want := range map[v1alpha1.Duration]time.Duration{"90s": 90 * time.Second, "5m": 5 * time.Minute, "1h30m": 90 * time.Minute} {
		if got, err := text.Span(); err != nil || got != want {
			t.Errorf("%s: got %s, %v", text, got, err)
		}
	}
	for _, text := range []v1alpha1.Duration{"", "5", "soon", v1alpha1.Duration(strings.Repeat("x", 1000))} {
		if _, err := text.Span(); err == nil || !strings.Contains(err.Error(), "like 90s or 5m") || len(err.Error()) > 100 {
			t.Errorf("%.20s: got %v", text, err)
		}
	}
}
