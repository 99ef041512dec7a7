package election

import (
	"context"
	"errors"
	"fmt"
	"strings"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/service/ssm"
	"github.com/aws/aws-sdk-go-v2/service/ssm/types"
	"github.com/aws/smithy-go"

	"github.com/hearth-sh/hearth/internal/bootstrap/fault"
)

// ssmStore keeps values as parameters of AWS Systems Manager. PutParameter
// without Overwrite is its create-only write. Reads may lag behind writes;
// the election does not rely on them.
type ssmStore struct {
	client *ssm.Client
	root   string // with a leading slash, without one at its end
	kms    string
}

func newSSM(root string, o OpenOptions) *ssmStore {
	client := ssm.NewFromConfig(o.AWS, func(c *ssm.Options) { c.Retryer = aws.NopRetryer{} })
	return &ssmStore{client: client, root: root, kms: o.KMSKeyID}
}

func (s *ssmStore) Location() string { return "ssm://" + s.root }

func (s *ssmStore) Get(ctx context.Context, key string) ([]byte, error) {
	if err := checkKey(key); err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, requestTimeout)
	defer cancel()
	out, err := s.client.GetParameter(ctx, &ssm.GetParameterInput{Name: aws.String(s.root + "/" + key), WithDecryption: aws.Bool(Secret(key))})
	if err != nil {
		return nil, s.classify(err, "ssm:GetParameter", key)
	}
	if out.Parameter == nil || len(aws.ToString(out.Parameter.Value)) > MaxValueBytes {
		return nil, fmt.Errorf("%s of %s is empty or has more than %d bytes", key, s.Location(), MaxValueBytes)
	}
	return []byte(aws.ToString(out.Parameter.Value)), nil
}

func (s *ssmStore) Create(ctx context.Context, key string, value []byte) error {
	return s.put(ctx, key, value, false)
}

func (s *ssmStore) Put(ctx context.Context, key string, value []byte) error {
	return s.put(ctx, key, value, true)
}

func (s *ssmStore) put(ctx context.Context, key string, value []byte, overwrite bool) error {
	if err := checkWrite(key, value); err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, requestTimeout)
	defer cancel()
	in := &ssm.PutParameterInput{
		Name: aws.String(s.root + "/" + key), Value: aws.String(string(value)), Overwrite: aws.Bool(overwrite),
		Type: types.ParameterTypeString, Tier: types.ParameterTierStandard,
	}
	if Secret(key) {
		in.Type = types.ParameterTypeSecureString
		if s.kms != "" {
			in.KeyId = &s.kms
		}
	}
	if _, err := s.client.PutParameter(ctx, in); err != nil {
		return s.classify(err, "ssm:PutParameter", key)
	}
	return nil
}

func (s *ssmStore) List(ctx context.Context, prefix string) ([]string, error) {
	if err := checkPrefix(prefix); err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, requestTimeout)
	defer cancel()
	pages := ssm.NewGetParametersByPathPaginator(s.client, &ssm.GetParametersByPathInput{Path: aws.String(s.root + "/" + strings.TrimSuffix(prefix, "/"))})
	var keys []string
	for pages.HasMorePages() {
		page, err := pages.NextPage(ctx)
		if err != nil {
			return nil, s.classify(err, "ssm:GetParametersByPath", strings.TrimSuffix(prefix, "/"))
		}
		for _, p := range page.Parameters {
			if key := strings.TrimPrefix(aws.ToString(p.Name), s.root+"/"); checkKey(key) == nil {
				keys = append(keys, key)
			}
		}
		if len(keys) > maxKeys {
			return nil, fmt.Errorf("more than %d keys below %s", maxKeys, prefix)
		}
	}
	return keys, nil
}

func (s *ssmStore) classify(err error, action, key string) error {
	var api smithy.APIError
	if !errors.As(err, &api) {
		return fmt.Errorf("%s %s of %s: %w", action, key, s.Location(), err)
	}
	switch code := api.ErrorCode(); {
	case code == "ParameterNotFound":
		return ErrNotFound
	case code == "ParameterAlreadyExists":
		return ErrExists
	case code == "ParameterLimitExceeded" || code == "HierarchyLevelLimitExceededException":
		return fault.New(CodeMissing, err, "remove parameters that nobody needs, or keep the cluster's store in S3", "the cluster's store %s can hold no more", s.Location())
	case code == "InvalidKeyId" || strings.HasPrefix(code, "KMS"):
		return denied(err, "name an enabled KMS key, and allow the instance's role kms:Encrypt and kms:Decrypt with it", s.Location(), action)
	case isDenied(code):
		remedy := fmt.Sprintf("allow the instance's role %s on arn:aws:ssm:*:*:parameter%s/%s", action, s.root, key)
		if Secret(key) && s.kms != "" {
			remedy += " and kms:Encrypt and kms:Decrypt with " + s.kms
		}
		return denied(err, remedy, s.Location(), action)
	}
	return fmt.Errorf("%s %s of %s: %w", action, key, s.Location(), err)
}
