package sigv4test

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	v4 "github.com/aws/aws-sdk-go-v2/aws/signer/v4"
)

// TestWhatTheSDKSignsIsGoodAndAnythingElseIsNot has one request signed and
// changes one thing of it at a time.
func TestWhatTheSDKSignsIsGoodAndAnythingElseIsNot(t *testing.T) {
	c := Credentials{AccessKeyID: "ASIAEXAMPLE", SecretAccessKey: "secret", SessionToken: "token"}
	for name, tc := range map[string]struct {
		service string
		change  func(r *http.Request, c *Credentials, body *[]byte)
		wrong   string // in the error; "" if there must be none
	}{
		"S3":                {service: "s3"},
		"a query API":       {service: "autoscaling"},
		"no signature":      {service: "s3", change: func(r *http.Request, _ *Credentials, _ *[]byte) { r.Header.Del("Authorization") }, wrong: "not signed"},
		"another key":       {service: "s3", change: func(_ *http.Request, c *Credentials, _ *[]byte) { c.AccessKeyID = "AKIA" }, wrong: "is of"},
		"another secret":    {service: "s3", change: func(_ *http.Request, c *Credentials, _ *[]byte) { c.SecretAccessKey += "x" }, wrong: "signature is wrong"},
		"another session":   {service: "s3", change: func(r *http.Request, _ *Credentials, _ *[]byte) { r.Header.Set("X-Amz-Security-Token", "x") }, wrong: "session token"},
		"another content":   {service: "s3", change: func(_ *http.Request, _ *Credentials, b *[]byte) { *b = []byte("x") }, wrong: "digest"},
		"other parameters":  {service: "autoscaling", change: func(_ *http.Request, _ *Credentials, b *[]byte) { *b = []byte("Action=x") }, wrong: "signature is wrong"},
		"another path":      {service: "s3", change: func(r *http.Request, _ *Credentials, _ *[]byte) { r.URL.Path = "/x" }, wrong: "signature is wrong"},
		"another host":      {service: "s3", change: func(r *http.Request, _ *Credentials, _ *[]byte) { r.Host = "x" }, wrong: "signature is wrong"},
		"another query":     {service: "s3", change: func(r *http.Request, _ *Credentials, _ *[]byte) { r.URL.RawQuery = "a=1" }, wrong: "signature is wrong"},
		"an old request":    {service: "s3", change: func(r *http.Request, _ *Credentials, _ *[]byte) { r.Header.Set("X-Amz-Date", "20200101T000000Z") }, wrong: "time"},
		"another method":    {service: "s3", change: func(r *http.Request, _ *Credentials, _ *[]byte) { r.Method = http.MethodDelete }, wrong: "signature is wrong"},
		"another service's": {service: "ssm", change: func(r *http.Request, _ *Credentials, _ *[]byte) { setService(r, "s3") }, wrong: "is of"},
	} {
		t.Run(name, func(t *testing.T) {
			body := []byte("Action=CompleteLifecycleAction&Version=1")
			r, err := http.NewRequestWithContext(t.Context(), http.MethodPost, "https://example.amazonaws.com/a%20b/c?z=1&y=a%2Fb&y=%2B", bytes.NewReader(body))
			if err != nil {
				t.Fatal(err)
			}
			sum := sha256.Sum256(body)
			digest := hex.EncodeToString(sum[:])
			if tc.service == "s3" {
				r.Header.Set("X-Amz-Content-Sha256", digest)
			}
			credentials := aws.Credentials{AccessKeyID: c.AccessKeyID, SecretAccessKey: c.SecretAccessKey, SessionToken: c.SessionToken}
			if err := v4.NewSigner().SignHTTP(t.Context(), credentials, r, digest, tc.service, "eu-central-1", time.Now(), func(o *v4.SignerOptions) {
				o.DisableURIPathEscaping = tc.service == "s3"
			}); err != nil {
				t.Fatal(err)
			}
			r.Host = r.URL.Host
			mine := c
			if tc.change != nil {
				tc.change(r, &mine, &body)
			}
			err = Verify(r, body, mine, "eu-central-1", tc.service)
			if (err == nil) != (tc.wrong == "") || err != nil && !strings.Contains(err.Error(), tc.wrong) {
				t.Errorf("%v does not say %q", err, tc.wrong)
			}
		})
	}
}

func setService(r *http.Request, service string) {
	r.Header.Set("Authorization", strings.Replace(r.Header.Get("Authorization"), "/ssm/", "/"+service+"/", 1))
}
