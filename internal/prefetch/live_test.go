package prefetch_test

import (
	"fmt"
	"testing"

	"github.com/hearth-sh/hearth/internal/prefetch"
)

func TestNothingIsEvictableBeforeEveryPartHasSpoken(t *testing.T) {
	var got [][]string
	u := prefetch.NewLiveUnion(2, func(d []string) { got = append(got, d) })
	u.Set(0, []string{"b", "a"})
	u.Set(1, []string{"c", "a"})
	u.Set(0, nil)
	if fmt.Sprint(got) != "[[a b c] [a c]]" {
		t.Error(got)
	}
}
