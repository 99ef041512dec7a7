package imds_test

import (
	"errors"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/hearth-sh/hearth/internal/imds"
)

func TestNoticesAreParsedStrictly(t *testing.T) {
	at := time.Date(2017, 9, 18, 8, 22, 0, 0, time.UTC)
	spot := func(s string) (any, error) { return imds.ParseSpotAction([]byte(s)) }
	rebalance := func(s string) (any, error) { return imds.ParseRebalance([]byte(s)) }
	maintenance := func(s string) (any, error) { return imds.ParseMaintenance([]byte(s)) }
	state := func(s string) (any, error) { return imds.ParseLifecycleState([]byte(s)) }
	event := `{"NotBefore":"21 Jan 2019 09:00:43 GMT","Code":"system-reboot","Description":"scheduled reboot","EventId":"instance-event-0d59937288b749b32","NotAfter":"21 Jan 2019 09:17:23 GMT","State":"active"}`
	for name, tc := range map[string]struct {
		parse func(string) (any, error)
		in    string
		want  any // nil: malformed
	}{
		"terminate":             {spot, `{"action": "terminate", "time": "2017-09-18T08:22:00Z"}`, &imds.SpotAction{Action: "terminate", Time: at}},
		"an action of tomorrow": {spot, `{"action": "teleport", "time": "2017-09-18T10:22:00+02:00", "to": 1}`, &imds.SpotAction{Action: "teleport", Time: at}},
		"no action":             {spot, `{"time": "2017-09-18T08:22:00Z"}`, nil},
		"no time":               {spot, `{"action": "stop"}`, nil},
		"year 1":                {spot, `{"action": "stop", "time": "0001-01-01T00:00:00Z"}`, nil},
		"a number":              {spot, `{"action": 1, "time": "2017-09-18T08:22:00Z"}`, nil},
		"null":                  {spot, `null`, nil},
		"nothing":               {spot, ``, nil},
		"two documents":         {spot, `{"action": "stop", "time": "2017-09-18T08:22:00Z"}{}`, nil},
		"an action of controls": {spot, `{"action": "stop\u0000", "time": "2017-09-18T08:22:00Z"}`, nil},
		"rebalance":             {rebalance, `{"noticeTime": "2017-09-18T08:22:00Z"}`, &imds.Rebalance{NoticeTime: at}},
		"rebalance of null":     {rebalance, `null`, nil},
		"rebalance, no time":    {rebalance, `{}`, nil},
		"no events":             {maintenance, `[]`, []imds.MaintenanceEvent(nil)},
		"no events at all":      {maintenance, ``, []imds.MaintenanceEvent(nil)},
		"an event": {maintenance, `[` + event + `]`, []imds.MaintenanceEvent{{ID: "instance-event-0d59937288b749b32", Code: "system-reboot", State: "active",
			NotBefore: time.Date(2019, 1, 21, 9, 0, 43, 0, time.UTC), NotAfter: time.Date(2019, 1, 21, 9, 17, 23, 0, time.UTC), Description: "scheduled reboot"}}},
		"an event twice":         {maintenance, `[` + event + `,` + event + `]`, nil},
		"an event without id":    {maintenance, strings.Replace(`[`+event+`]`, "EventId", "Id", 1), nil},
		"an event without start": {maintenance, strings.Replace(`[`+event+`]`, "NotBefore", "Before", 1), nil},
		"an event without code":  {maintenance, strings.Replace(`[`+event+`]`, "system-reboot", "", 1), nil},
		"an object":              {maintenance, event, nil},
		"65 events":              {maintenance, `[` + strings.Repeat(`{},`, 64) + `{}]`, nil},
		"in service":             {state, "InService", imds.LifecycleInService},
		"warmed":                 {state, "Warmed:Stopped", imds.LifecycleWarmedStopped},
		"a state of tomorrow":    {state, "Cooled:Down", imds.LifecycleState("Cooled:Down")},
		"two lines":              {state, "InService\nTerminated", nil},
		"a page":                 {state, "<html>", nil},
		"no state":               {state, "", nil},
	} {
		t.Run(name, func(t *testing.T) {
			got, err := tc.parse(tc.in)
			if tc.want == nil {
				if !errors.Is(err, imds.ErrMalformed) {
					t.Errorf("%v, %v", got, err)
				}
			} else if err != nil || !reflect.DeepEqual(got, tc.want) {
				t.Errorf("got %+v, %v\nwant %+v", got, err, tc.want)
			}
		})
	}
}

const document = `{"accountId":"123456789012","architecture":"arm64","availabilityZone":"eu-central-1a","imageId":"ami-0123456789abcdef0",` +
	`"instanceId":"i-0123456789abcdef0","instanceType":"t4g.xlarge","pendingTime":"2026-01-02T03:04:05Z","privateIp":"10.0.1.23","region":"eu-central-1"}`

func TestDocumentsAreParsedStrictly(t *testing.T) {
	for name, tc := range map[string]struct {
		old, new string
		ok       bool
	}{
		"as it is":                      {"", "", true},
		"an old, short instance id":     {"i-0123456789abcdef0", "i-1234abcd", true},
		"no IPv4":                       {`"10.0.1.23"`, "null", true},
		"GovCloud":                      {"eu-central-1", "us-gov-west-1", true},
		"an isolated region":            {"eu-central-1", "us-isob-east-1", true},
		"the sovereign cloud":           {"eu-central-1", "eusc-de-east-1", true},
		"a Local Zone":                  {`"eu-central-1a"`, `"eu-central-1-ham-1a"`, true},
		"a Wavelength Zone":             {`"eu-central-1a"`, `"eu-central-1-wl1-ber-wlz-1"`, true},
		"a metal type":                  {"t4g.xlarge", "u-12tb1.112xlarge", true},
		"a zone of another region":      {`"eu-central-1a"`, `"eu-west-1a"`, false},
		"a zone without a letter":       {`"eu-central-1a"`, `"eu-central-1"`, false},
		"a shell's idea of an id":       {"i-0123456789abcdef0", "i-$(reboot)", false},
		"an id of two lines":            {"i-0123456789abcdef0", `i-0123456789abcdef0\n`, false},
		"a path for a region":           {`"region":"eu-central-1"`, `"region":"../../x"`, false},
		"an account of letters":         {"123456789012", "12345678901x", false},
		"an account that is a number":   {`"123456789012"`, "123456789012", false},
		"no image":                      {`"imageId":"ami-0123456789abcdef0",`, "", false},
		"an IPv6 address in place of 4": {"10.0.1.23", "::1", false},
		"a host in place of an address": {"10.0.1.23", "evil.example", false},
		"no time":                       {"2026-01-02T03:04:05Z", "yesterday", false},
		"cut off":                       {`"region":"eu-central-1"}`, "", false},
	} {
		t.Run(name, func(t *testing.T) {
			in := strings.ReplaceAll(document, tc.old, tc.new)
			if tc.old == "" {
				in = document
			} else if in == document {
				t.Fatal("nothing was changed")
			}
			id, err := imds.ParseDocument([]byte(in))
			if tc.ok != (err == nil) || err != nil && !errors.Is(err, imds.ErrMalformed) {
				t.Errorf("%+v, %v", id, err)
			}
		})
	}
}

func TestTagKeysAreParsedStrictly(t *testing.T) {
	for in, ok := range map[string]bool{
		"": true, "\n": true, "Name": true, "Name\nhearth.sh:pool\n": true, "a@b+c=d,e-f_g": true, "größe": true,
		"..": false, ".": false, "a/b": false, "../../latest": false, "a b": false, "a\n\nb": false, "a\na": false, "a?b": false, "a%2fb": false,
		strings.Repeat("k", 129): false, "a\r\nb": false, "\x00": false,
	} {
		if keys, err := imds.ParseTagKeys([]byte(in)); ok != (err == nil) {
			t.Errorf("%q: %q, %v", in, keys, err)
		}
	}
	var many []string
	for i := range 51 {
		many = append(many, "k"+strings.Repeat("x", i))
	}
	if _, err := imds.ParseTagKeys([]byte(strings.Join(many, "\n"))); err == nil {
		t.Error("51 tags were accepted")
	}
}

// bounded fails when an error is not of the right kind or repeats its input.
func bounded(t *testing.T, err error) {
	t.Helper()
	if err != nil && (!errors.Is(err, imds.ErrMalformed) || len(err.Error()) > 1024) {
		t.Errorf("%d bytes: %.1024v", len(err.Error()), err)
	}
}

func FuzzSpotAction(f *testing.F) {
	f.Add([]byte(`{"action": "terminate", "time": "2017-09-18T08:22:00Z"}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		n, err := imds.ParseSpotAction(b)
		if bounded(t, err); err == nil && (n.Action == "" || n.Time.IsZero()) {
			t.Errorf("%+v", n)
		}
	})
}

func FuzzRebalance(f *testing.F) {
	f.Add([]byte(`{"noticeTime": "2020-10-27T08:22:00Z"}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		n, err := imds.ParseRebalance(b)
		if bounded(t, err); err == nil && n.NoticeTime.IsZero() {
			t.Errorf("%+v", n)
		}
	})
}

func FuzzMaintenance(f *testing.F) {
	f.Add([]byte(`[{"NotBefore":"21 Jan 2019 09:00:43 GMT","Code":"system-reboot","EventId":"instance-event-1","NotAfter":"21 Jan 2019 09:17:23 GMT","State":"active"}]`))
	f.Add([]byte(`[]`))
	f.Fuzz(func(t *testing.T, b []byte) {
		events, err := imds.ParseMaintenance(b)
		bounded(t, err)
		for i, e := range events {
			if e.ID == "" || e.NotBefore.IsZero() || i > 0 && events[i-1].ID >= e.ID {
				t.Errorf("%+v", events)
			}
		}
	})
}

func FuzzLifecycleState(f *testing.F) {
	f.Add([]byte("Warmed:Terminated"))
	f.Fuzz(func(t *testing.T, b []byte) {
		s, err := imds.ParseLifecycleState(b)
		if bounded(t, err); err == nil && string(s) != string(b) {
			t.Errorf("%q", s)
		}
	})
}

func FuzzDocument(f *testing.F) {
	f.Add([]byte(document))
	f.Fuzz(func(t *testing.T, b []byte) {
		id, err := imds.ParseDocument(b)
		bounded(t, err)
		if err == nil && (!strings.HasPrefix(id.Zone, id.Region) || strings.ContainsAny(id.ProviderID()[len("aws:///"):], " \n\"'$`\\")) {
			t.Errorf("%+v", id)
		}
	})
}

func FuzzTagKeys(f *testing.F) {
	f.Add([]byte("Name\nhearth.sh:pool"))
	f.Fuzz(func(t *testing.T, b []byte) {
		keys, err := imds.ParseTagKeys(b)
		bounded(t, err)
		for _, k := range keys {
			if k == "" || k == ".." || strings.ContainsAny(k, "/\n?%#") {
				t.Errorf("%q", k)
			}
		}
	})
}
