package main

import (
	"cmp"
	"context"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/base64"
	"encoding/hex"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"net/url"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	awsconfig "github.com/aws/aws-sdk-go-v2/config"
	"github.com/aws/aws-sdk-go-v2/credentials"
	"github.com/aws/aws-sdk-go-v2/credentials/ec2rolecreds"
	"github.com/aws/aws-sdk-go-v2/feature/ec2/imds"
	"github.com/aws/aws-sdk-go-v2/service/s3"
	"github.com/aws/aws-sdk-go-v2/service/s3/types"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/tools/clientcmd"
)

// bucket is where snapshots go with --etcd-s3: pkg/etcd/s3 of k3s. Nothing of
// AWS's environment or configuration counts but the shared file of credentials.
type bucket struct {
	client       *s3.Client
	name, folder string
	timeout      time.Duration
	retention    int
}

// bucket opens the configured one. Like k3s it wants credentials and that the
// bucket exists before it does anything.
func (s *server) bucket(ctx context.Context) (*bucket, error) {
	o := s.o
	b := &bucket{name: o.get("etcd-s3-bucket"), folder: o.get("etcd-s3-folder"), retention: o.number("etcd-s3-retention")}
	var err error
	if b.timeout, err = time.ParseDuration(o.get("etcd-s3-timeout")); err != nil {
		return nil, fmt.Errorf("invalid etcd-s3-timeout: %w", err)
	}
	endpoint := o.get("etcd-s3-endpoint")
	transport, err := s3Transport(o)
	if err != nil {
		return nil, err
	}
	provider, err := s3Credentials(ctx, o)
	if err != nil {
		return nil, fmt.Errorf("failed to get credentials: %w", err)
	}
	scheme := "https://"
	if o.is("etcd-s3-insecure") {
		scheme = "http://"
	}
	// The names of buckets are part of the host's at AWS alone, unless that is
	// said otherwise.
	pathStyle := !strings.HasSuffix(strings.Split(endpoint, ":")[0], ".amazonaws.com")
	switch lookup := o.get("etcd-s3-bucket-lookup-type"); lookup {
	case "", "auto":
	case "dns", "path":
		pathStyle = lookup == "path"
	default:
		return nil, fmt.Errorf("etcd-s3-bucket-lookup-type is auto, dns or path, not %q", lookup)
	}
	b.client = s3.New(s3.Options{
		Region: o.get("etcd-s3-region"), BaseEndpoint: aws.String(scheme + endpoint), UsePathStyle: pathStyle, Credentials: provider,
		HTTPClient: &http.Client{Transport: transport}, RequestChecksumCalculation: aws.RequestChecksumCalculationWhenRequired,
		ResponseChecksumValidation: aws.ResponseChecksumValidationWhenRequired,
	})
	slog.Info("Checking if S3 bucket exists", "endpoint", scheme+endpoint, "bucket", b.name, "folder", b.folder)
	ctx, cancel := context.WithTimeout(ctx, b.timeout)
	defer cancel()
	if _, err := b.client.HeadBucket(ctx, &s3.HeadBucketInput{Bucket: &b.name}); err != nil {
		return nil, fmt.Errorf("failed to test for existence of bucket %s: %w", b.name, err)
	}
	return b, nil
}

func s3Transport(o *options) (*http.Transport, error) {
	transport := http.DefaultTransport.(*http.Transport).Clone()
	transport.DisableCompression, transport.DisableKeepAlives = true, true
	if authorities := o.get("etcd-s3-endpoint-ca"); o.is("etcd-s3-skip-ssl-verify") {
		transport.TLSClientConfig = &tls.Config{InsecureSkipVerify: true}
	} else if authorities != "" {
		pool := x509.NewCertPool()
		loaded := false
		for _, ca := range strings.Split(authorities, " ") {
			content, err := base64.StdEncoding.DecodeString(ca)
			if err != nil {
				content, err = os.ReadFile(ca)
			}
			if err != nil {
				return nil, err
			}
			loaded = pool.AppendCertsFromPEM(content) || loaded
		}
		if !loaded {
			return nil, errors.New("no certificates loaded from etcd-s3-endpoint-ca")
		}
		transport.TLSClientConfig = &tls.Config{RootCAs: pool}
	}
	switch proxy := o.get("etcd-s3-proxy"); proxy {
	case "":
	case "none":
		transport.Proxy = nil
	default:
		u, err := url.Parse(proxy)
		if err != nil || u.Scheme == "" || u.Host == "" {
			return nil, errors.New("proxy URL must include scheme and host")
		}
		transport.Proxy = http.ProxyURL(u)
	}
	return transport, nil
}

// s3Credentials are the given keys, else those of the shared file, else the
// instance's role by its metadata.
func s3Credentials(ctx context.Context, o *options) (aws.CredentialsProvider, error) {
	key, secret := o.get("etcd-s3-access-key"), o.get("etcd-s3-secret-key")
	if key != "" {
		return credentials.NewStaticCredentialsProvider(key, secret, o.get("etcd-s3-session-token")), nil
	}
	file := os.Getenv("AWS_SHARED_CREDENTIALS_FILE")
	if home := os.Getenv("HOME"); file == "" && home != "" {
		file = filepath.Join(home, ".aws/credentials")
	}
	if file != "" && exists(file) {
		shared, err := awsconfig.LoadSharedConfigProfile(ctx, cmp.Or(os.Getenv("AWS_PROFILE"), "default"), func(o *awsconfig.LoadSharedConfigOptions) {
			o.CredentialsFiles, o.ConfigFiles = []string{file}, []string{}
		})
		if err == nil && shared.Credentials.HasKeys() {
			return credentials.StaticCredentialsProvider{Value: shared.Credentials}, nil
		}
	}
	role := aws.NewCredentialsCache(ec2rolecreds.New(func(o *ec2rolecreds.Options) {
		// Without a fallback to the first version, which machines here do not have.
		o.Client = imds.New(imds.Options{EnableFallback: aws.FalseTernary, HTTPClient: &http.Client{Transport: &http.Transport{DisableKeepAlives: true}}})
	}))
	_, err := role.Retrieve(ctx)
	return role, err
}

// upload puts a snapshot into the bucket under its name, with whose it is.
func (s *server) upload(ctx context.Context, b *bucket, file string) error {
	metadata := map[string]string{"k3s-node-name": s.n.name, "k3s-token-hash": s.tokenHash()}
	id, err := s.clusterID(ctx)
	if err != nil {
		return fmt.Errorf("failed to set S3 snapshot cluster ID: %w", err)
	}
	metadata["k3s-cluster-id"] = id
	content, err := os.Open(file)
	if err != nil {
		return err
	}
	defer content.Close()
	kind := "application/octet-stream"
	if strings.HasSuffix(file, compressedExtension) {
		kind = "application/zip"
	}
	ctx, cancel := context.WithTimeout(ctx, b.timeout)
	defer cancel()
	key := path.Join(b.folder, filepath.Base(file))
	slog.Info("Uploading snapshot to s3://" + b.name + "/" + key)
	_, err = b.client.PutObject(ctx, &s3.PutObjectInput{Bucket: &b.name, Key: &key, Body: content, ContentType: &kind, Metadata: metadata})
	return err
}

// download fetches a snapshot into a directory.
func (b *bucket) download(ctx context.Context, name, dir string) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, b.timeout)
	defer cancel()
	out, err := b.client.GetObject(ctx, &s3.GetObjectInput{Bucket: &b.name, Key: aws.String(path.Join(b.folder, name))})
	if err != nil {
		return "", err
	}
	defer out.Body.Close()
	file := filepath.Join(dir, name)
	if err := writeFrom(file, out.Body); err != nil {
		return "", err
	}
	return file, nil
}

// list is what the bucket has whose name begins so, below the folder: newest
// first.
func (b *bucket) list(ctx context.Context, prefix string) ([]types.Object, error) {
	ctx, cancel := context.WithTimeout(ctx, b.timeout)
	defer cancel()
	var all []types.Object
	// As k3s joins it: without a name, what begins like the folder.
	pages := s3.NewListObjectsV2Paginator(b.client, &s3.ListObjectsV2Input{Bucket: &b.name, Prefix: aws.String(path.Join(b.folder, prefix))})
	for pages.HasMorePages() {
		page, err := pages.NextPage(ctx)
		if err != nil {
			return nil, err
		}
		for _, object := range page.Contents {
			if path.Base(path.Dir(*object.Key)) != ".metadata" {
				all = append(all, object)
			}
		}
	}
	slices.SortStableFunc(all, func(x, y types.Object) int { return y.LastModified.Compare(*x.LastModified) })
	return all, nil
}

// prune keeps the newest of all servers' snapshots together.
func (b *bucket) prune(ctx context.Context, prefix string) error {
	if b.retention < 1 {
		return nil
	}
	all, err := b.list(ctx, prefix)
	if err != nil {
		return err
	}
	for _, object := range all[min(len(all), b.retention):] {
		if err := b.remove(ctx, path.Base(*object.Key)); err != nil {
			return err
		}
	}
	return nil
}

func (b *bucket) remove(ctx context.Context, name string) error {
	ctx, cancel := context.WithTimeout(ctx, b.timeout)
	defer cancel()
	key := path.Join(b.folder, name)
	slog.Info("Removing S3 snapshot s3://" + b.name + "/" + key)
	_, err := b.client.DeleteObject(ctx, &s3.DeleteObjectInput{Bucket: &b.name, Key: &key})
	return err
}

// clusterID is that of the namespace kube-system, as soon as the API says it.
func (s *server) clusterID(ctx context.Context) (string, error) {
	config, err := clientcmd.BuildConfigFromFlags("", s.o.dataDir("server/cred/supervisor.kubeconfig"))
	if err != nil {
		return "", err
	}
	client, err := kubernetes.NewForConfig(config)
	if err != nil {
		return "", err
	}
	var id string
	err = poll(ctx, time.Second, func() (bool, error) {
		ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
		defer cancel()
		namespace, err := client.CoreV1().Namespaces().Get(ctx, metav1.NamespaceSystem, metav1.GetOptions{})
		if err != nil {
			return false, nil
		}
		id = string(namespace.UID)
		return true, nil
	})
	return id, err
}

// tokenHash names the token that a restore needs.
func (s *server) tokenHash() string {
	sum := sha256.Sum256([]byte(s.secret))
	return hex.EncodeToString(sum[:])[:12]
}
