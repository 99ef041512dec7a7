package clusternode

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/hearth-sh/hearth/internal/ecr"
	"github.com/hearth-sh/hearth/internal/shim"
)

// tokenJitter is the time over which the nodes of a fleet that start together
// ask ECR for their first token: its quota is per account and region.
const tokenJitter = 2 * time.Second

// registryTokens gives ECR's tokens to the images loop. It remembers what it
// gave, because ECR's source wants to know which token was refused.
type registryTokens struct {
	source *ecr.Source

	mu   sync.Mutex
	last map[string]ecr.Credentials
}

func (t *registryTokens) Credentials(ctx context.Context, host string) (user, password string, expires time.Time, err error) {
	c, err := t.source.Credentials(ctx, host)
	if errors.Is(err, ecr.ErrNotECR) {
		return "", "", time.Time{}, nil
	}
	if err != nil {
		return "", "", time.Time{}, err
	}
	t.mu.Lock()
	t.last[host] = c
	t.mu.Unlock()
	return c.Username, c.Password, c.Expires, nil
}

func (t *registryTokens) Invalidate(host string) {
	t.mu.Lock()
	c, ok := t.last[host]
	t.mu.Unlock()
	if ok {
		t.source.Invalidate(host, c)
	}
}

// shimWarmer has proven runtimes fill their compile caches.
type shimWarmer struct {
	warmer *shim.Warmer
	state  func(handler string) (shim.State, bool)
}

// key is the compile key that the last proof saw; false when the runtime keeps
// no cache.
func (w *shimWarmer) key(handler string) (shim.Runtime, shim.CompileKey, bool, error) {
	s, ok := w.state(handler)
	if !ok {
		return shim.Runtime{}, shim.CompileKey{}, false, fmt.Errorf("runtime handler %s is not proven on this node", handler)
	}
	if s.Answer == nil || len(s.Answer.CompileKeys) == 0 {
		return s.Runtime, shim.CompileKey{}, false, nil
	}
	return s.Runtime, s.Answer.CompileKeys[0], true, nil
}

func (w *shimWarmer) Warm(ctx context.Context, imageRef, handler string) error {
	runtime, key, keeps, err := w.key(handler)
	if err != nil || !keeps {
		return err
	}
	_, err = w.warmer.Warm(ctx, runtime, key, imageRef)
	if errors.Is(err, shim.ErrNotCompilable) {
		return nil
	}
	return err
}

func (w *shimWarmer) Cached(ctx context.Context, imageRef, handler string) (bool, error) {
	_, key, keeps, err := w.key(handler)
	if err != nil {
		return false, err
	}
	if !keeps {
		return true, nil
	}
	cached, err := w.warmer.Cached(ctx, key, imageRef)
	if errors.Is(err, shim.ErrNotCompilable) {
		return true, nil
	}
	return cached, err
}

func (w *shimWarmer) Identity(handler string) string {
	s, ok := w.state(handler)
	if !ok {
		return ""
	}
	return s.Runtime.Identity()
}
