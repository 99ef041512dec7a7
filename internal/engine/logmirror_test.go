package engine

import (
	"bufio"
	"encoding/json"
	"io"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/hearth-sh/hearth/api/v1alpha1"
	"github.com/hearth-sh/hearth/internal/engine/control"
)

func TestTheLogMirrorWritesRecordsThatSayWhoseTheyAre(t *testing.T) {
	r, w := io.Pipe()
	mirror := newLogMirror(w, newMetrics())
	line := v1alpha1.LogLine{
		Time: time.Date(2026, 1, 2, 3, 4, 5, 6, time.UTC), Function: "hello", Revision: 3, Request: "id", Stream: "stderr", Line: "a \"line\"",
	}
	mirror.write("ann", line)
	text, err := bufio.NewReader(r).ReadString('\n')
	if err != nil {
		t.Fatal(err)
	}
	if !strings.HasPrefix(text, control.LogRecordPrefix) {
		t.Errorf("%q does not begin with %q", text, control.LogRecordPrefix)
	}
	var got control.LogRecord
	if err := json.Unmarshal([]byte(text), &got); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(control.LogRecord{Log: control.LogRecordKind, Tenant: "ann", LogLine: line}, got); diff != "" {
		t.Error(diff)
	}
	_ = r.Close()
	mirror.close()
}

func TestALogMirrorThatNobodyReadsLosesLinesAndHoldsNobodyUp(t *testing.T) {
	r, w := io.Pipe()
	mirror := newLogMirror(w, newMetrics())
	for range mirrorLines + 10 {
		mirror.write("ann", v1alpha1.LogLine{Function: "hello", Line: "x"})
	}
	_ = r.Close()
	mirror.close()
}
