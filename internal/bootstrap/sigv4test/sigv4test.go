// Package sigv4test checks requests for tests as AWS does: whether they are
// signed (Signature Version 4) with given credentials, for a service and region,
// and have the content that was signed. It is written after AWS's description
// and shares no code with the SDK, which signs. moto looks at no signature.
package sigv4test

import (
	"crypto/hmac"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"time"
)

// Credentials that requests must be signed with.
type Credentials struct{ AccessKeyID, SecretAccessKey, SessionToken string }

// maxSkew is how far a request's time may be from ours, as with AWS.
const maxSkew = 15 * time.Minute

// Verify says what is wrong with a request's signature. body is its content as
// sent; region and service are those that the signature must be for.
func Verify(r *http.Request, body []byte, c Credentials, region, service string) error {
	const algorithm = "AWS4-HMAC-SHA256"
	fields, ok := strings.CutPrefix(r.Header.Get("Authorization"), algorithm+" ")
	if !ok {
		return fmt.Errorf("the request is not signed: Authorization is %q", r.Header.Get("Authorization"))
	}
	given := map[string]string{}
	for field := range strings.SplitSeq(fields, ",") {
		name, value, _ := strings.Cut(strings.TrimSpace(field), "=")
		given[name] = value
	}
	at := r.Header.Get("X-Amz-Date")
	signed, err := time.Parse("20060102T150405Z", at)
	if err != nil || time.Since(signed).Abs() > maxSkew {
		return fmt.Errorf("the time of the signature is %q", at)
	}
	scope := strings.Join([]string{at[:8], region, service, "aws4_request"}, "/")
	if want := c.AccessKeyID + "/" + scope; given["Credential"] != want {
		return fmt.Errorf("the signature is of %s, not of %s", given["Credential"], want)
	}
	if token := r.Header.Get("X-Amz-Security-Token"); token != c.SessionToken {
		return fmt.Errorf("the session token is %q", token)
	}
	names := strings.Split(given["SignedHeaders"], ";")
	must := []string{"host", "x-amz-date"}
	if c.SessionToken != "" {
		must = append(must, "x-amz-security-token")
	}
	for _, name := range must {
		if !slices.Contains(names, name) {
			return fmt.Errorf("%s is not signed: %s", name, given["SignedHeaders"])
		}
	}
	sum := sha256.Sum256(body)
	payload := hex.EncodeToString(sum[:])
	if said := r.Header.Get("X-Amz-Content-Sha256"); service == "s3" && said != payload {
		if said != "UNSIGNED-PAYLOAD" && !strings.HasPrefix(said, "STREAMING-") {
			return fmt.Errorf("the content's digest is %s, and %q was signed", payload, said)
		}
		payload = said // which S3 takes for the content's digest
	}
	var headers strings.Builder
	for _, name := range names {
		value := strings.Join(r.Header.Values(name), ",")
		switch name {
		case "host":
			value = r.Host
		case "content-length":
			value = fmt.Sprint(r.ContentLength)
		}
		fmt.Fprintf(&headers, "%s:%s\n", name, strings.Join(strings.Fields(value), " "))
	}
	path := r.URL.EscapedPath()
	if service != "s3" {
		path = escape(path, true)
	}
	request := strings.Join([]string{r.Method, path, canonicalQuery(r.URL.Query()), headers.String(), given["SignedHeaders"], payload}, "\n")
	sum = sha256.Sum256([]byte(request))
	key := []byte("AWS4" + c.SecretAccessKey)
	for part := range strings.SplitSeq(scope, "/") {
		key = sign(key, part)
	}
	want := hex.EncodeToString(sign(key, strings.Join([]string{algorithm, at, scope, hex.EncodeToString(sum[:])}, "\n")))
	if !hmac.Equal([]byte(want), []byte(given["Signature"])) {
		return fmt.Errorf("the signature is wrong; what should have been signed is\n%s", request)
	}
	return nil
}

func sign(key []byte, text string) []byte {
	h := hmac.New(sha256.New, key)
	h.Write([]byte(text))
	return h.Sum(nil)
}

func canonicalQuery(query url.Values) string {
	var pairs []string
	for name, values := range query {
		for _, value := range values {
			pairs = append(pairs, escape(name, false)+"="+escape(value, false))
		}
	}
	slices.Sort(pairs)
	return strings.Join(pairs, "&")
}

// escape is AWS's UriEncode.
func escape(s string, slashes bool) string {
	var b strings.Builder
	for i := range len(s) {
		switch c := s[i]; {
		case c >= 'A' && c <= 'Z' || c >= 'a' && c <= 'z' || c >= '0' && c <= '9' || strings.IndexByte("-_.~", c) >= 0 || c == '/' && slashes:
			b.WriteByte(c)
		default:
			fmt.Fprintf(&b, "%%%02X", c)
		}
	}
	return b.String()
}
