package election

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"strings"

	"github.com/aws/aws-sdk-go-v2/aws"
	awshttp "github.com/aws/aws-sdk-go-v2/aws/transport/http"
	"github.com/aws/aws-sdk-go-v2/service/s3"
	"github.com/aws/aws-sdk-go-v2/service/s3/types"
	"github.com/aws/smithy-go"

	"github.com/hearth-sh/hearth/internal/bootstrap/fault"
)

// s3Store keeps values as objects. PutObject with If-None-Match: * is its
// create-only write; S3 reads are consistent with it.
type s3Store struct {
	client *s3.Client
	bucket string
	prefix string // without slashes at its ends
	kms    string
}

func newS3(bucket, prefix string, o OpenOptions) *s3Store {
	client := s3.NewFromConfig(o.AWS, func(c *s3.Options) {
		c.Retryer = aws.NopRetryer{} // the election retries, and knows what a lost answer means
		c.UsePathStyle = o.PathStyle
		// Checksums beyond what a request needs are not known to every S3.
		c.RequestChecksumCalculation = aws.RequestChecksumCalculationWhenRequired
		c.ResponseChecksumValidation = aws.ResponseChecksumValidationWhenRequired
	})
	return &s3Store{client: client, bucket: bucket, prefix: prefix, kms: o.KMSKeyID}
}

func (s *s3Store) Location() string { return "s3://" + s.bucket + "/" + s.prefix }

func (s *s3Store) object(key string) *string { return aws.String(s.prefix + "/" + key) }

func (s *s3Store) Get(ctx context.Context, key string) ([]byte, error) {
	if err := checkKey(key); err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, requestTimeout)
	defer cancel()
	out, err := s.client.GetObject(ctx, &s3.GetObjectInput{Bucket: &s.bucket, Key: s.object(key)})
	if err != nil {
		return nil, s.classify(err, "s3:GetObject", key)
	}
	defer func() { _ = out.Body.Close() }()
	b, err := io.ReadAll(io.LimitReader(out.Body, MaxValueBytes+1))
	if err != nil {
		return nil, fmt.Errorf("read %s of %s: %w", key, s.Location(), err)
	}
	if len(b) > MaxValueBytes {
		return nil, fmt.Errorf("%s of %s has more than %d bytes", key, s.Location(), MaxValueBytes)
	}
	return b, nil
}

func (s *s3Store) Create(ctx context.Context, key string, value []byte) error {
	return s.put(ctx, key, value, aws.String("*"))
}

func (s *s3Store) Put(ctx context.Context, key string, value []byte) error {
	return s.put(ctx, key, value, nil)
}

func (s *s3Store) put(ctx context.Context, key string, value []byte, ifNoneMatch *string) error {
	if err := checkWrite(key, value); err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, requestTimeout)
	defer cancel()
	in := &s3.PutObjectInput{
		Bucket: &s.bucket, Key: s.object(key), Body: bytes.NewReader(value),
		ContentType: aws.String("application/json"), IfNoneMatch: ifNoneMatch,
	}
	if Secret(key) && s.kms != "" {
		in.ServerSideEncryption, in.SSEKMSKeyId = types.ServerSideEncryptionAwsKms, &s.kms
	}
	if _, err := s.client.PutObject(ctx, in); err != nil {
		return s.classify(err, "s3:PutObject", key)
	}
	return nil
}

func (s *s3Store) List(ctx context.Context, prefix string) ([]string, error) {
	if err := checkPrefix(prefix); err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, requestTimeout)
	defer cancel()
	pages := s3.NewListObjectsV2Paginator(s.client, &s3.ListObjectsV2Input{Bucket: &s.bucket, Prefix: s.object(prefix), Delimiter: aws.String("/")})
	var keys []string
	for pages.HasMorePages() {
		page, err := pages.NextPage(ctx)
		if err != nil {
			return nil, s.classify(err, "s3:ListBucket", prefix)
		}
		for _, o := range page.Contents {
			key := strings.TrimPrefix(aws.ToString(o.Key), s.prefix+"/")
			// Consoles make an empty object for the "folder" itself.
			if key != prefix && checkKey(key) == nil {
				keys = append(keys, key)
			}
		}
		if len(keys) > maxKeys {
			return nil, fmt.Errorf("more than %d keys below %s", maxKeys, prefix)
		}
	}
	return keys, nil
}

func (s *s3Store) classify(err error, action, key string) error {
	var api smithy.APIError
	var response *awshttp.ResponseError
	status := 0
	if errors.As(err, &response) {
		status = response.HTTPStatusCode()
	}
	code := ""
	if errors.As(err, &api) {
		code = api.ErrorCode()
	}
	switch {
	case code == "NoSuchBucket":
		return fault.New(CodeMissing, err, "create the bucket, or correct the cluster's store", "the bucket %s does not exist", s.bucket)
	case code == "NoSuchKey" || status == 404:
		return ErrNotFound
	case code == "PreconditionFailed" || status == 412:
		return ErrExists
	case code == "NotImplemented" || status == 501:
		return fault.New(CodeUnsupported, err, "use a store that honours If-None-Match: * on PutObject, such as Amazon S3", "%s cannot write conditionally", s.Location())
	case code == "PermanentRedirect" || code == "AuthorizationHeaderMalformed":
		return fault.New(CodeMissing, err, "use a bucket in this machine's region, or set the region", "the bucket %s is in another region", s.bucket)
	case isDenied(code) || status == 403 && code == "":
		resource := "arn:aws:s3:::" + s.bucket + "/" + s.prefix + "/" + key
		remedy := fmt.Sprintf("allow the instance's role %s on %s", action, resource)
		switch action {
		case "s3:ListBucket":
			remedy = fmt.Sprintf("allow the instance's role s3:ListBucket on arn:aws:s3:::%s for the prefix %s/", s.bucket, s.prefix)
		case "s3:GetObject":
			remedy += fmt.Sprintf(" and s3:ListBucket on arn:aws:s3:::%s, without which S3 denies what does not exist", s.bucket)
		}
		return denied(err, remedy, s.Location(), action)
	}
	return fmt.Errorf("%s %s of %s: %w", action, key, s.Location(), err)
}

// isDenied says whether an error code of AWS means that waiting will not help:
// the role may not, or there is none. A clock that is off looks the same to
// AWS and is named by denied.
func isDenied(code string) bool {
	switch code {
	case "AccessDenied", "AccessDeniedException", "AllAccessDisabled", "UnauthorizedOperation", "Forbidden",
		"InvalidAccessKeyId", "SignatureDoesNotMatch", "UnrecognizedClientException", "KMS.DisabledException",
		"RequestTimeTooSkewed", "InvalidSignatureException":
		return true
	}
	return false
}

// isWithoutCredentials says whether a request was not even sent, for want of
// credentials to sign it with. The SDK has no type for that.
func isWithoutCredentials(err error) bool {
	return strings.Contains(err.Error(), "get identity: get credentials: ")
}

func denied(err error, remedy, location, action string) error {
	var api smithy.APIError
	if errors.As(err, &api) {
		switch api.ErrorCode() {
		case "RequestTimeTooSkewed", "InvalidSignatureException", "SignatureDoesNotMatch":
			remedy = "set this machine's clock (chronyd uses 169.254.169.123 on EC2), then check the role's credentials"
		}
	}
	return fault.New(CodeDenied, err, remedy, "the cluster's store %s denies %s", location, action)
}
