package api

import (
	"encoding/json"
	"strings"
	"testing"

	"github.com/hearth-sh/hearth/api/v1alpha1"
	"github.com/hearth-sh/hearth/internal/engine/control"
)

func logRecord(tb testing.TB, tenant, function, line string) []byte {
	tb.Helper()
	b, err := json.Marshal(control.LogRecord{Log: control.LogRecordKind, Tenant: tenant, LogLine: v1alpha1.LogLine{Function: function, Line: line}})
	if err != nil {
		tb.Fatal(err)
	}
	return b
}

func TestOnlyAFunctionsOwnLinesAreTakenOutOfAnEnginesLog(t *testing.T) {
	for name, test := range map[string]struct {
		record []byte
		want   bool
	}{
		"its own":                       {logRecord(t, "ann", "hello", "x"), true},
		"another function's":            {logRecord(t, "ann", "other", "x"), false},
		"another tenant's of that name": {logRecord(t, "bob", "hello", "x"), false},
		"one that quotes its name":      {logRecord(t, "bob", "other", `"hello"`), false},
		"one that looks like a record":  {logRecord(t, "bob", "other", string(logRecord(t, "ann", "hello", "x"))), false},
		"the engine's own":              {[]byte(`{"level":"INFO","function":"hello","tenant":"ann"}`), false},
		"half a record":                 {logRecord(t, "ann", "hello", "x")[:40], false},
		"a record after something else": {append([]byte(" "), logRecord(t, "ann", "hello", "x")...), false},
		"nothing":                       {nil, false},
	} {
		line, _, ok := ownLine(test.record, "ann", "hello")
		if ok != test.want || ok && strings.Contains(string(line), "ann") {
			t.Errorf("%s: %t %s", name, ok, line)
		}
	}
}

func FuzzOwnLine(f *testing.F) {
	f.Add(logRecord(f, "ann", "hello", "x"))
	f.Add([]byte(control.LogRecordPrefix))
	f.Fuzz(func(t *testing.T, record []byte) {
		line, _, ok := ownLine(record, "ann", "hello")
		if !ok {
			return
		}
		var l v1alpha1.LogLine
		if err := json.Unmarshal(line, &l); err != nil || l.Function != "hello" || strings.Count(string(line), "\n") != 1 {
			t.Errorf("%q: %v", line, err)
		}
	})
}
