package submit

import (
	"net"
	"strings"
	"testing"
	"time"
)

func TestAClientThatReadsNoAnswerLosesItsConnection(t *testing.T) {
	f := newFixture(t)
	f.server.answerWrite = 50 * time.Millisecond
	conn, err := net.Dial("tcp", strings.TrimPrefix(f.url, "http://"))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	if err := conn.(*net.TCPConn).SetReadBuffer(4 << 10); err != nil {
		t.Fatal(err)
	}
	// More than the buffers of both ends hold; nothing is ever read. Writing
	// fails once the server has hung up.
	request := []byte(strings.Repeat("GET /openapi.json HTTP/1.1\r\nHost: api\r\n\r\n", 100))
	if err := conn.SetWriteDeadline(time.Now().Add(2 * time.Minute)); err != nil {
		t.Fatal(err)
	}
	for {
		if _, err := conn.Write(request); err != nil {
			if e, ok := err.(net.Error); ok && e.Timeout() {
				t.Error("the server still waits for its client to read")
			}
			return
		}
	}
}
