package bootstrap

import (
	"net/http"
	"strings"
	"testing"
)

const describeHead = `<?xml version="1.0" encoding="UTF-8"?><DescribeInstancesResponse xmlns="http://ec2.amazonaws.com/doc/2016-11-15/"><requestId>r</requestId><reservationSet>`

func described(states ...string) string {
	var b strings.Builder
	b.WriteString(describeHead)
	for _, s := range states {
		b.WriteString(`<item><reservationId>r-1</reservationId><instancesSet><item><instanceId>i-1</instanceId><instanceState><code>0</code><name>` + s + `</name></instanceState></item></instancesSet></item>`)
	}
	return b.String() + `</reservationSet></DescribeInstancesResponse>`
}

func refused(code string) string {
	return `<Response><Errors><Error><Code>` + code + `</Code><Message>because</Message></Error></Errors><RequestID>r</RequestID></Response>`
}

// TestAServerIsGoneOnlyIfEC2SaysSo: everything that is not plainly the end of an
// instance must keep its member of etcd.
func TestAServerIsGoneOnlyIfEC2SaysSo(t *testing.T) {
	for _, tt := range []struct {
		name   string
		status int
		body   string
		want   instanceState // "" for an error
	}{
		{"running", http.StatusOK, described("running"), instanceAlive},
		{"pending", http.StatusOK, described("pending"), instanceAlive},
		{"stopped", http.StatusOK, described("stopped"), instanceAlive},
		{"stopping", http.StatusOK, described("stopping"), instanceAlive},
		{"shutting down", http.StatusOK, described("shutting-down"), instanceAlive},
		{"a state of tomorrow", http.StatusOK, described("hibernating"), instanceAlive},
		{"terminated", http.StatusOK, described("terminated"), instanceGone},
		{"forgotten", http.StatusBadRequest, refused("InvalidInstanceID.NotFound"), instanceGone},
		{"malformed id", http.StatusBadRequest, refused("InvalidInstanceID.Malformed"), ""},
		{"denied", http.StatusForbidden, refused("UnauthorizedOperation"), ""},
		{"throttled", http.StatusServiceUnavailable, refused("RequestLimitExceeded"), ""},
		{"an empty list", http.StatusOK, described(), instanceGone},
		{"two instances", http.StatusOK, described("terminated", "terminated"), ""},
		{"cut off", http.StatusOK, described("terminated")[:120], ""},
		{"cut off at its start", http.StatusOK, "", ""},
		{"a portal", http.StatusOK, "<html><body>Please log in</body></html>", ""},
		{"JSON", http.StatusOK, `{"reservationSet":[]}`, ""},
		{"errors without a document", http.StatusBadGateway, "Bad Gateway", ""},
	} {
		t.Run(tt.name, func(t *testing.T) {
			got, err := parseInstanceState(tt.status, []byte(tt.body))
			if got != tt.want || (err == nil) != (tt.want != "") {
				t.Errorf("%q %v, want %q", got, err, tt.want)
			}
		})
	}
}

func FuzzInstanceState(f *testing.F) {
	f.Add(200, []byte(described("running")))
	f.Add(200, []byte(described("terminated", "running")))
	f.Add(400, []byte(refused("InvalidInstanceID.NotFound")))
	f.Add(200, []byte("<html>"))
	f.Fuzz(func(t *testing.T, status int, body []byte) {
		state, err := parseInstanceState(status, body)
		if (state == "") != (err != nil) {
			t.Fatalf("%q with %v", state, err)
		}
		if state == instanceGone && status != http.StatusOK && !strings.Contains(string(body), "InvalidInstanceID.NotFound") &&
			!strings.Contains(string(body), "&") && !strings.Contains(string(body), "<!--") && !strings.Contains(string(body), "<?") && !strings.Contains(string(body), "<![") {
			t.Fatalf("status %d means that the instance is gone", status)
		}
	})
}
