package bootstrap

import (
	"fmt"
	"time"

	"k8s.io/apimachinery/pkg/api/resource"

	"github.com/hearth-sh/hearth/api/v1alpha1"
)

// duration reads a span that nodeconfig has checked and given a default.
func duration(d v1alpha1.Duration) time.Duration {
	parsed, err := time.ParseDuration(string(d))
	if err != nil {
		return 0
	}
	return parsed
}

// parseQuantity reads a number of bytes such as 4Gi.
func parseQuantity(s string) (uint64, error) {
	q, err := resource.ParseQuantity(s)
	if err != nil || q.Value() < 0 {
		return 0, fmt.Errorf("%q is no amount of bytes; write it like 8Gi", s)
	}
	return uint64(q.Value()), nil
}
