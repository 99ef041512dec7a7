package artifact

import (
	"bytes"
	"context"
	"errors"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"strings"
	"testing"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/credentials"
	"github.com/aws/aws-sdk-go-v2/service/s3"
	"github.com/aws/aws-sdk-go-v2/service/s3/types"

	"github.com/hearth-sh/hearth/internal/bootstrap/fault"
	"github.com/hearth-sh/hearth/internal/ecr/mototest"
)

func s3Client(endpoint string, provider aws.CredentialsProvider, httpClient *http.Client) *s3.Client {
	return s3.New(s3.Options{
		BaseEndpoint: &endpoint, Region: "us-east-1", UsePathStyle: true, HTTPClient: httpClient, Credentials: provider,
	})
}

// TestFetchFromS3 uses an implementation of S3 that is not ours, behind a
// proxy that breaks connections.
func TestFetchFromS3(t *testing.T) {
	backend, err := url.Parse(mototest.Start(t))
	if err != nil {
		t.Fatal(err)
	}
	transport := &http.Transport{}
	t.Cleanup(transport.CloseIdleConnections)
	static := credentials.NewStaticCredentialsProvider("AKIDEXAMPLE", "secret", "")
	httpClient := &http.Client{Transport: transport}
	direct := s3Client(backend.String(), static, httpClient)
	content, newer := randomBytes(large, 60), randomBytes(large, 61)
	ctx := t.Context()
	bucket, key := "hearth-artifacts", "k3s/v1.36.2+k3s1/k3s arm64"
	if _, err := direct.CreateBucket(ctx, &s3.CreateBucketInput{Bucket: &bucket, CreateBucketConfiguration: &types.CreateBucketConfiguration{LocationConstraint: "eu-west-1"}}, func(o *s3.Options) { o.Region = "eu-west-1" }); err != nil {
		t.Fatal(err)
	}
	put := func(b []byte) {
		t.Helper()
		if _, err := direct.PutObject(ctx, &s3.PutObjectInput{Bucket: &bucket, Key: &key, Body: bytes.NewReader(b)}); err != nil {
			t.Fatal(err)
		}
	}
	put(content)
	address := "s3://hearth-artifacts/k3s/v1.36.2%2Bk3s1/k3s%20arm64?region=eu-west-1"

	// proxied returns a client whose first download breaks off after n bytes,
	// whereupon between happens, and the requests that it makes.
	proxied := func(t *testing.T, n int, between func()) (*s3.Client, *[]*http.Request) {
		var requests []*http.Request
		proxy := httputil.NewSingleHostReverseProxy(backend)
		proxy.Transport = transport
		server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			requests = append(requests, r.Clone(context.Background()))
			if len(requests) > 1 {
				proxy.ServeHTTP(w, r)
				return
			}
			defer between()
			proxy.ServeHTTP(&cutWriter{ResponseWriter: w, left: n}, r)
		}))
		t.Cleanup(server.Close)
		return s3Client(server.URL, static, httpClient), &requests
	}
	withS3 := func(c ObjectGetter) func(*Options) { return func(o *Options) { o.S3 = c } }

	t.Run("whole", func(t *testing.T) {
		a := artifactOf(t.TempDir(), content, address)
		r, err := fetchOne(t, newFetcher(t, withS3(direct)), a)
		if err != nil {
			t.Fatal(err)
		}
		wantInstalled(t, a, content)
		if r.Mirror != address {
			t.Errorf("it came from %s", r.Mirror)
		}
	})
	t.Run("resumed after a break", func(t *testing.T) {
		client, requests := proxied(t, 4<<20, func() {})
		a := artifactOf(t.TempDir(), content, address)
		r, err := fetchOne(t, newFetcher(t, withS3(client)), a)
		if err != nil {
			t.Fatal(err)
		}
		wantInstalled(t, a, content)
		if len(*requests) != 2 || r.Downloaded > large+4*bufferSize {
			t.Fatalf("%d requests for %d bytes", len(*requests), r.Downloaded)
		}
		h := (*requests)[1].Header
		if !strings.HasPrefix(h.Get("Range"), "bytes=") || h.Get("If-Match") == "" || !strings.Contains(h.Get("Authorization"), "/eu-west-1/s3/") {
			t.Errorf("resumed with %v", h)
		}
	})
	t.Run("an object that changes in between is read from its start", func(t *testing.T) {
		put(newer)
		defer put(content)
		client, requests := proxied(t, 4<<20, func() { put(content) })
		a := artifactOf(t.TempDir(), content, address)
		if _, err := fetchOne(t, newFetcher(t, withS3(client)), a); err != nil {
			t.Fatal(err)
		}
		wantInstalled(t, a, content)
		if len(*requests) != 3 || (*requests)[2].Header.Get("Range") != "" {
			t.Errorf("%d requests", len(*requests))
		}
	})
	t.Run("no such key", func(t *testing.T) {
		a := artifactOf(t.TempDir(), content, "s3://hearth-artifacts/nothing?region=eu-west-1")
		_, err := fetchOne(t, newFetcher(t, withS3(direct)), a)
		wantCode(t, err, CodeNotFound, "s3://hearth-artifacts/nothing?region=eu-west-1", "NoSuchKey")
	})
	t.Run("no such bucket, then a mirror", func(t *testing.T) {
		m := newMirror(t, content)
		a := artifactOf(t.TempDir(), content, "s3://no-such-bucket/k3s", m.URL)
		r, err := fetchOne(t, newFetcher(t, withS3(direct)), a)
		if err != nil || len(r.Attempts) != 1 {
			t.Errorf("got %v, %v", r.Attempts, err)
		}
	})
	t.Run("no credentials yet", func(t *testing.T) {
		late := aws.CredentialsProviderFunc(func(context.Context) (aws.Credentials, error) {
			return aws.Credentials{}, errors.New("no EC2 IMDS role found")
		})
		a := artifactOf(t.TempDir(), content, address)
		r, err := fetchOne(t, newFetcher(t, withS3(s3Client(backend.String(), late, httpClient))), a)
		wantCode(t, err, CodeUnreachable, "no credentials of a role")
		if !fault.IsTransient(err) || len(r.Attempts) != DefaultAttempts {
			t.Errorf("%d attempts: %v", len(r.Attempts), err)
		}
	})
	t.Run("no S3 client", func(t *testing.T) {
		a := artifactOf(t.TempDir(), content, address)
		_, err := fetchOne(t, newFetcher(t), a)
		wantCode(t, err, CodeUnreachable, "no S3 client is configured")
	})
}

// TestForbiddenByS3IsTriedAgain has a policy take a moment to be known.
func TestForbiddenByS3IsTriedAgain(t *testing.T) {
	content := randomBytes(1000, 62)
	m := newMirror(t, content, status(403), status(403), status(403))
	httpClient := &http.Client{Transport: &http.Transport{DisableKeepAlives: true}}
	c := s3Client(m.URL, credentials.NewStaticCredentialsProvider("AKIDEXAMPLE", "secret", ""), httpClient)
	a := artifactOf(t.TempDir(), content, "s3://bucket/key")
	r, err := fetchOne(t, newFetcher(t, func(o *Options) { o.S3 = c }), a)
	if err != nil {
		t.Fatal(err)
	}
	wantInstalled(t, a, content)
	if len(r.Attempts) != 3 || !strings.Contains(r.Attempts[0].Err.Error(), "may the instance's role read it?") {
		t.Errorf("attempts were %v", r.Attempts)
	}
}
