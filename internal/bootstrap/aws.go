package bootstrap

import (
	"context"
	"fmt"
	"net/http"
	"os"
	"strings"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/config"
	"github.com/aws/aws-sdk-go-v2/credentials/ec2rolecreds"

	"github.com/hearth-sh/hearth/internal/host"
	"github.com/hearth-sh/hearth/internal/imds"
)

// credentialsMargin is how long before their end the role's credentials are
// replaced.
const credentialsMargin = 5 * time.Minute

// awsConfig speaks as the instance's role, whose credentials come from the
// same metadata client as everything else. Endpoints and certificates may be
// set in the environment (AWS_ENDPOINT_URL_*, AWS_CA_BUNDLE).
func awsConfig(ctx context.Context, metadata ec2rolecreds.GetMetadataAPIClient, region string) (aws.Config, error) {
	role := aws.NewCredentialsCache(ec2rolecreds.New(func(o *ec2rolecreds.Options) { o.Client = metadata }),
		func(o *aws.CredentialsCacheOptions) {
			o.ExpiryWindow, o.ExpiryWindowJitterFrac = credentialsMargin, 0.5
		})
	c, err := config.LoadDefaultConfig(ctx,
		config.WithCredentialsProvider(role), config.WithRegion(region),
		config.WithSharedConfigFiles([]string{}), config.WithSharedCredentialsFiles([]string{}))
	if err != nil {
		return aws.Config{}, fmt.Errorf("read the AWS settings of the environment: %w", err)
	}
	return c, nil
}

const (
	// clockWait bounds reading one other clock.
	clockWait = time.Second
)

// clockSources are servers whose Date header tells the time and that any
// instance may ask without credentials. With a wrong clock nothing that needs a
// signature or a certificate works, so this is found out before.
func clockSources(id imds.Identity) []string {
	for _, variable := range []string{"AWS_ENDPOINT_URL_STS", "AWS_ENDPOINT_URL"} {
		if endpoint := os.Getenv(variable); endpoint != "" {
			return []string{endpoint}
		}
	}
	// Plain HTTP on purpose: a clock that is wrong by years breaks TLS, and
	// nothing but the offset of a warning depends on the answer.
	return []string{"http://s3." + id.Region + "." + id.ServicesDomain + "/"}
}

// readClocks asks each source once. Sources that do not answer tell nothing.
func readClocks(ctx context.Context, sources []string) []host.ClockSample {
	client := &http.Client{
		Timeout:       clockWait,
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}
	defer client.CloseIdleConnections()
	var samples []host.ClockSample
	for _, source := range sources {
		request, err := http.NewRequestWithContext(ctx, http.MethodHead, source, nil)
		if err != nil {
			continue
		}
		sent := time.Now()
		response, err := client.Do(request)
		received := time.Now()
		if err != nil {
			continue
		}
		_ = response.Body.Close()
		name := strings.TrimPrefix(strings.TrimPrefix(source, "http://"), "https://")
		if sample, err := host.SampleDate(strings.TrimSuffix(name, "/"), response.Header, sent, received); err == nil {
			samples = append(samples, sample)
		}
	}
	return samples
}
