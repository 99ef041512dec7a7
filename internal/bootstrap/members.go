package bootstrap

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/xml"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	v4 "github.com/aws/aws-sdk-go-v2/aws/signer/v4"
)

// instanceState is what EC2 says of an instance.
type instanceState string

const (
	instanceAlive instanceState = "alive"
	// instanceGone: terminated, or so long ago that EC2 has forgotten it.
	instanceGone instanceState = "gone"
)

const (
	// ec2APIVersion is that of the query API below.
	ec2APIVersion = "2016-11-15"
	ec2Timeout    = 10 * time.Second
	maxEC2Answer  = 1 << 20
)

// instanceStateOf asks EC2 whether an instance still exists. One signed request
// of the query API: EC2's client of the SDK would be a third of this program.
func instanceStateOf(ctx context.Context, config aws.Config, domain, id string) (instanceState, error) {
	ctx, cancel := context.WithTimeout(ctx, ec2Timeout)
	defer cancel()
	endpoint := "https://ec2." + config.Region + "." + domain + "/"
	for _, variable := range []string{"AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_EC2"} {
		if e := os.Getenv(variable); e != "" {
			endpoint = e
		}
	}
	form := url.Values{"Action": {"DescribeInstances"}, "Version": {ec2APIVersion}, "InstanceId.1": {id}}.Encode()
	// The address is AWS's, or whoever runs this machine set it in its environment.
	request, err := http.NewRequestWithContext(ctx, http.MethodPost, endpoint, strings.NewReader(form)) //nolint:gosec // see above
	if err != nil {
		return "", err
	}
	request.Header.Set("Content-Type", "application/x-www-form-urlencoded; charset=utf-8")
	credentials, err := config.Credentials.Retrieve(ctx)
	if err != nil {
		return "", fmt.Errorf("get the role's credentials: %w", err)
	}
	sum := sha256.Sum256([]byte(form))
	if err := v4.NewSigner().SignHTTP(ctx, credentials, request, hex.EncodeToString(sum[:]), "ec2", config.Region, time.Now()); err != nil {
		return "", err
	}
	client := &http.Client{Timeout: ec2Timeout}
	defer client.CloseIdleConnections()
	response, err := client.Do(request) //nolint:gosec // see above
	if err != nil {
		return "", err
	}
	defer response.Body.Close()
	body, err := io.ReadAll(io.LimitReader(response.Body, maxEC2Answer))
	if err != nil {
		return "", err
	}
	return parseInstanceState(response.StatusCode, body)
}

// parseInstanceState reads an answer to DescribeInstances for one instance.
func parseInstanceState(status int, body []byte) (instanceState, error) {
	if status != http.StatusOK {
		var failure struct {
			Codes    []string `xml:"Errors>Error>Code"`
			Messages []string `xml:"Errors>Error>Message"`
		}
		if err := xml.Unmarshal(body, &failure); err != nil {
			return "", fmt.Errorf("EC2 answers with status %d", status)
		}
		if slices.Contains(failure.Codes, "InvalidInstanceID.NotFound") {
			return instanceGone, nil
		}
		return "", fmt.Errorf("EC2 answers %s: %.200s", strings.Join(failure.Codes, ", "), strings.Join(failure.Messages, "; "))
	}
	var answer struct {
		// The name keeps a portal's page from being an answer without instances.
		XMLName xml.Name `xml:"DescribeInstancesResponse"`
		States  []string `xml:"reservationSet>item>instancesSet>item>instanceState>name"`
	}
	if err := xml.Unmarshal(body, &answer); err != nil {
		return "", fmt.Errorf("EC2's answer is not in its format: %w", err)
	}
	switch {
	case len(answer.States) == 0:
		return instanceGone, nil
	case len(answer.States) > 1:
		return "", fmt.Errorf("EC2 describes %d instances instead of one", len(answer.States))
	case answer.States[0] == "terminated":
		return instanceGone, nil
	default:
		// A stopped server may come back with its data; shutting down may be either.
		return instanceAlive, nil
	}
}
