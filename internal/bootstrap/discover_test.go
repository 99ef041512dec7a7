package bootstrap

import (
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/hearth-sh/hearth/internal/bootstrap/fault"
	"github.com/hearth-sh/hearth/internal/imds"
	"github.com/hearth-sh/hearth/internal/imds/imdstest"
)

func metadataClient(t *testing.T, s *imdstest.Server) *imds.Client {
	t.Helper()
	client, err := imds.New(imds.Options{
		Endpoint: s.Start(t, "tcp4"), AttemptTimeout: 300 * time.Millisecond, Timeout: 2 * time.Second, Attempts: 2, Getenv: func(string) string { return "" },
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(client.Close)
	return client
}

func TestDiscoverReadsEverythingOnce(t *testing.T) {
	config := imdstest.Default()
	config.UserData = "#!/bin/sh\n"
	server := imdstest.New(config)
	s, err := discover(t.Context(), metadataClient(t, server))
	if err != nil {
		t.Fatal(err)
	}
	if s.Identity.InstanceID != config.InstanceID || string(s.UserData) != config.UserData {
		t.Errorf("%+v", s)
	}
	if diff := cmp.Diff(config.Tags, s.Tags); diff != "" {
		t.Error(diff)
	}
	if n := server.Count("GET", "user-data"); n != 1 {
		t.Errorf("user-data was read %d times", n)
	}
}

func TestWhatAnInstanceMayLack(t *testing.T) {
	config := imdstest.Default()
	config.Tags = nil
	s, err := discover(t.Context(), metadataClient(t, imdstest.New(config)))
	if err != nil {
		t.Fatal(err)
	}
	if s.Tags != nil || len(s.UserData) != 0 {
		t.Errorf("%+v", s)
	}
}

func TestFaultsOfMetadataHaveCodes(t *testing.T) {
	html := "<html>Please log in</html>"
	for _, tt := range []struct {
		name      string
		fault     imdstest.Fault
		code      fault.Code
		transient bool
	}{
		{"silence", imdstest.Fault{Path: "*", Silent: true}, CodeMetadataUnreachable, true},
		{"broken connections", imdstest.Fault{Path: "*", Reset: true}, CodeMetadataUnreachable, true},
		{"switched off", imdstest.Fault{Path: "api/token", Status: 403}, CodeMetadataDisabled, false},
		{"no tokens", imdstest.Fault{Path: "api/token", Status: 404}, CodeMetadataVersion1, false},
		{"errors", imdstest.Fault{Path: "meta-data/*", Status: 503}, CodeMetadataFailing, true},
		{"a portal", imdstest.Fault{Path: "dynamic/*", Body: &html}, CodeMetadataMalformed, true},
		{"an identity cut off", imdstest.Fault{Path: "dynamic/*", Truncate: true}, CodeMetadataUnreachable, true},
		{"no identity", imdstest.Fault{Path: "meta-data/instance-id", Status: 404}, CodeMetadataMissing, true},
		{"user-data cut off", imdstest.Fault{Path: "user-data", Truncate: true}, CodeMetadataUnreachable, true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			config := imdstest.Default()
			config.UserData = "spec: {}\n"
			config.Faults = []imdstest.Fault{tt.fault}
			_, err := discover(t.Context(), metadataClient(t, imdstest.New(config)))
			if fault.CodeOf(err) != tt.code || fault.IsTransient(err) != tt.transient {
				t.Errorf("code %q, transient %v: %v", fault.CodeOf(err), fault.IsTransient(err), err)
			}
			if err != nil && ExitCode(err, PhaseDiscover) != ExitMetadata {
				t.Errorf("exit code %d", ExitCode(err, PhaseDiscover))
			}
		})
	}
}
