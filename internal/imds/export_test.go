package imds

// NewAt is New with other addresses for those of IPv4 and IPv6.
func NewAt(o Options, urls ...string) (*Client, error) {
	o.Getenv = func(string) string { return "" }
	c, err := New(o)
	if err != nil {
		return nil, err
	}
	attempts := o.Attempts
	if attempts == 0 {
		attempts = DefaultAttempts
	}
	c.candidates = nil
	for _, u := range urls {
		c.candidates = append(c.candidates, c.newEndpoint(u, attempts))
	}
	return c, nil
}

// Endpoints is what New would try.
func Endpoints(o Options) ([]string, error) { return endpoints(o) }
