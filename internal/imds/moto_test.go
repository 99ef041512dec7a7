package imds_test

import (
	"errors"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"testing"
	"time"

	sdk "github.com/aws/aws-sdk-go-v2/feature/ec2/imds"

	"github.com/hearth-sh/hearth/internal/ecr/mototest"
	"github.com/hearth-sh/hearth/internal/imds"
)

// TestMoto reads what another implementation offers. Its tokens lack the header
// that says how long they live, so the SDK cannot use it as it is; a proxy adds
// that, and nothing else. Its values are placeholders: the strict parsers must
// refuse them.
func TestMoto(t *testing.T) {
	backend := mototest.Start(t)
	target, err := url.Parse(backend)
	if err != nil {
		t.Fatal(err)
	}
	transport := &http.Transport{}
	t.Cleanup(transport.CloseIdleConnections)
	front := httptest.NewServer(&httputil.ReverseProxy{
		// For its paths outside of meta-data, moto goes by the host's name.
		Rewrite:   func(p *httputil.ProxyRequest) { p.SetURL(target); p.Out.Host = "169.254.169.254" },
		Transport: transport,
		ModifyResponse: func(r *http.Response) error {
			if r.Request.Method == http.MethodPut {
				r.Header.Set("X-Aws-Ec2-Metadata-Token-Ttl-Seconds", r.Request.Header.Get("X-Aws-Ec2-Metadata-Token-Ttl-Seconds"))
			}
			return nil
		},
	})
	t.Cleanup(front.Close)
	c := newClient(t, imds.Options{AttemptTimeout: 20 * time.Second, Timeout: time.Minute, Attempts: 1}, front.URL)
	direct := newClient(t, imds.Options{AttemptTimeout: 20 * time.Second, Timeout: time.Minute, Attempts: 1}, backend)

	out, err := c.GetMetadata(t.Context(), &sdk.GetMetadataInput{Path: "placement/region"})
	if err != nil {
		t.Fatal(err)
	}
	b := make([]byte, 64)
	n, _ := out.Content.Read(b)
	if string(b[:n]) != "us-east-1" {
		t.Errorf("region %q", b[:n])
	}
	if role, err := c.Role(t.Context()); err != nil || role != "default-role" {
		t.Errorf("role %q, %v", role, err)
	}
	// Its 500 for what it does not implement is a failure, not an absence.
	if _, err := c.ReadNotice(t.Context(), imds.SourceSpot); !errors.Is(err, imds.ErrUnavailable) {
		t.Errorf("notices: %v", err)
	}
	if _, err := direct.Role(t.Context()); !errors.Is(err, imds.ErrMalformed) {
		t.Errorf("a token without its life: %v", err)
	}
}
