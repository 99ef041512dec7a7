package election

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"strconv"
	"strings"
	"time"

	"github.com/cenkalti/backoff/v5"

	"github.com/hearth-sh/hearth/internal/bootstrap/fault"
	"github.com/hearth-sh/hearth/internal/k3s/pki"
)

// The layout of a store. Access policies are written against these prefixes:
// servers write everything and read everything; agents read generation/,
// members/ and agent/ only.
const (
	prefixGeneration = "generation/"
	prefixServer     = "server/"
	prefixAgent      = "agent/"
	prefixMembers    = "members/"
)

func holderKey(n int) string    { return prefixGeneration + strconv.Itoa(n) + "/holder" }
func heartbeatKey(n int) string { return prefixGeneration + strconv.Itoa(n) + "/heartbeat" }
func outcomeKey(n int) string   { return prefixGeneration + strconv.Itoa(n) + "/outcome" }
func serverKey(n int) string    { return prefixServer + strconv.Itoa(n) + "/credentials" }
func agentKey(n int) string     { return prefixAgent + strconv.Itoa(n) + "/credentials" }
func membersKey(n int) string   { return prefixMembers + strconv.Itoa(n) + "/" }

// holderRecord is created once for a generation; who creates it holds it.
type holderRecord struct {
	Holder string `json:"holder"`
	// Nonce is known to the holder alone before it wrote the record; a machine
	// that finds its own nonce is the holder, whatever it forgot otherwise.
	Nonce   string    `json:"nonce"`
	Started time.Time `json:"started"` // for people; nothing compares it
	Restore *Restore  `json:"restore,omitempty"`
}

// heartbeatRecord is overwritten by the holder. Only whether it changes counts.
type heartbeatRecord struct {
	Nonce string `json:"nonce"`
	// Session differs between runs of one holder, so that beats of one cannot
	// be taken for those of the other.
	Session string `json:"session"`
	Beat    uint64 `json:"beat"`
}

type outcome string

const (
	founded   outcome = "founded"
	abandoned outcome = "abandoned"
)

// outcomeRecord is created once for a generation and decides it.
type outcomeRecord struct {
	Outcome outcome `json:"outcome"`
	By      string  `json:"by"`
	// Nonce is the holder's where it founded, random where it was abandoned.
	Nonce   string    `json:"nonce"`
	Address string    `json:"address,omitempty"`
	Reason  string    `json:"reason,omitempty"`
	At      time.Time `json:"at"` // for people
}

// serverRecord is created once by the holder; it is everything a server needs.
type serverRecord struct {
	Nonce       string          `json:"nonce"`
	Authorities json.RawMessage `json:"authorities"`
	ServerToken string          `json:"serverToken"`
	AgentToken  string          `json:"agentToken"`
}

// agentRecord is created once by the holder; it is all an agent may have.
type agentRecord struct {
	ServerCA   string `json:"serverCA"`
	AgentToken string `json:"agentToken"`
}

// memberRecord is overwritten by the server it is about.
type memberRecord struct {
	Address string    `json:"address"`
	Left    bool      `json:"left,omitempty"`
	At      time.Time `json:"at"` // for people
}

// Restore asks for a new generation from a snapshot of an older one.
type Restore struct {
	// Generation is the founded generation that is restored, from 1. Once a
	// newer one exists, the request is done and ignored.
	Generation int `json:"from"`
	// Snapshot names the etcd snapshot; its meaning is the caller's. It goes
	// into a record and has at most 1024 bytes.
	Snapshot string `json:"snapshot"`
}

const (
	maxReasonBytes   = 500
	maxSnapshotBytes = 1024
	maxAddressBytes  = 253
)

// checkAddress accepts an IP address or a DNS name, without a port.
func checkAddress(address string) error {
	if _, err := netip.ParseAddr(address); err == nil && !strings.Contains(address, "%") {
		return nil
	}
	if address == "" || len(address) > maxAddressBytes || strings.HasPrefix(address, ".") || strings.HasPrefix(address, "-") ||
		strings.Trim(strings.ToLower(address), "abcdefghijklmnopqrstuvwxyz0123456789-.") != "" {
		return fmt.Errorf("%.100q is neither an IP address nor a DNS name", address)
	}
	return nil
}

func (r *holderRecord) check() error {
	if r.Holder == "" || r.Nonce == "" {
		return errors.New("no holder or no nonce")
	}
	if r.Restore != nil && (r.Restore.Generation < 1 || len(r.Restore.Snapshot) > maxSnapshotBytes) {
		return errors.New("an impossible restore")
	}
	return nil
}

func (r *outcomeRecord) check() error {
	switch r.Outcome {
	case founded:
		return checkAddress(r.Address)
	case abandoned:
		return nil
	}
	return errors.New("neither founded nor abandoned")
}

func (r *memberRecord) check() error { return checkAddress(r.Address) }

// Credentials are what a node needs to be part of a generation. Printing or
// logging them shows no secret.
type Credentials struct {
	// ServerCA is what servers are verified with, PEM.
	ServerCA []byte
	// AgentToken lets agents join.
	AgentToken pki.Token
	// ServerToken lets servers join; zero for agents.
	ServerToken pki.Token
	// Authorities go to the founder's disk before k3s first starts; nil for
	// agents. k3s hands them to the servers that join.
	Authorities *pki.Authorities
}

func (r *serverRecord) credentials() (Credentials, error) {
	authorities, err := pki.Decode(r.Authorities)
	if err != nil {
		return Credentials{}, err
	}
	c := Credentials{ServerCA: authorities.ServerCA(), Authorities: authorities}
	if c.ServerToken, err = parseToken(r.ServerToken, pki.UserServer, c.ServerCA); err != nil {
		return Credentials{}, fmt.Errorf("the server token: %w", err)
	}
	if c.AgentToken, err = parseToken(r.AgentToken, pki.UserNode, c.ServerCA); err != nil {
		return Credentials{}, fmt.Errorf("the agent token: %w", err)
	}
	return c, nil
}

func (r *agentRecord) credentials() (Credentials, error) {
	c := Credentials{ServerCA: []byte(r.ServerCA)}
	var err error
	if c.AgentToken, err = parseToken(r.AgentToken, pki.UserNode, c.ServerCA); err != nil {
		return Credentials{}, fmt.Errorf("the agent token: %w", err)
	}
	return c, nil
}

func parseToken(s string, user pki.User, serverCA []byte) (pki.Token, error) {
	token, err := pki.ParseToken(s)
	if err != nil {
		return pki.Token{}, err
	}
	if token.User() != user {
		return pki.Token{}, fmt.Errorf("it is for user %s, not %s", token.User(), user)
	}
	return token, token.VerifyCA(serverCA)
}

// records reads and writes a store's records, trying again what may pass.
type records struct {
	store    Store
	patience time.Duration // how long one operation is tried again
}

const (
	firstPause = 100 * time.Millisecond
	maxPause   = 3 * time.Second
	// deniedPatience is how long a denial is tried again: a role or policy made
	// together with the machine takes seconds to be known everywhere in AWS.
	deniedPatience = 15 * time.Second
)

func retry[T any](ctx context.Context, r *records, action string, op func() (T, error)) (T, error) {
	pauses := &backoff.ExponentialBackOff{InitialInterval: firstPause, RandomizationFactor: 0.5, Multiplier: 2, MaxInterval: maxPause}
	began := time.Now()
	v, err := backoff.Retry(ctx, func() (T, error) {
		v, err := op()
		if fault.CodeOf(err) == CodeDenied && time.Since(began) < deniedPatience {
			return v, err
		}
		if errors.Is(err, ErrNotFound) || errors.Is(err, ErrExists) || fault.CodeOf(err) != "" {
			return v, backoff.Permanent(err)
		}
		return v, err
	}, backoff.WithBackOff(pauses), backoff.WithMaxElapsedTime(r.patience))
	switch {
	case err == nil:
		return v, nil
	case ctx.Err() != nil:
		return v, fmt.Errorf("%s: %w", action, context.Cause(ctx))
	case errors.Is(err, ErrNotFound) || errors.Is(err, ErrExists) || fault.CodeOf(err) != "":
		return v, err
	case isWithoutCredentials(err):
		return v, fault.Passing(CodeCredentials, err, "give the instance a profile with a role that may use the store, and let it reach the metadata service", "this machine has no AWS credentials for the cluster's store %s", r.store.Location())
	}
	return v, fault.Passing(CodeUnavailable, err, "check the route to the store (VPC endpoint, NAT, DNS, proxy) and its service health", "cannot %s in the cluster's store %s", action, r.store.Location())
}

// record is what is read from the store, checked.
type record[T any] interface {
	*T
	check() error
}

// read returns a record, or nil where there is none as far as can be seen.
func read[T any, P record[T]](ctx context.Context, r *records, key string) (P, error) {
	b, err := retry(ctx, r, "read "+key, func() ([]byte, error) { return r.store.Get(ctx, key) })
	if errors.Is(err, ErrNotFound) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	return decode[T, P](r, key, b)
}

func decode[T any, P record[T]](r *records, key string, b []byte) (P, error) {
	v := P(new(T))
	if err := unmarshal(b, v); err != nil {
		return nil, r.corrupt(key, err)
	}
	if err := v.check(); err != nil {
		return nil, r.corrupt(key, err)
	}
	return v, nil
}

// unmarshal ignores unknown fields: newer versions may add some. Errors say
// nothing of the value, which may be secret.
func unmarshal(b []byte, v any) error {
	if len(b) > MaxValueBytes {
		return fmt.Errorf("%d bytes, more than %d", len(b), MaxValueBytes)
	}
	if err := json.Unmarshal(b, v); err != nil {
		return errors.New("not the JSON of such a record")
	}
	return nil
}

func (r *records) corrupt(key string, err error) error {
	return fault.New(CodeCorrupt, err, "use a prefix of the cluster's own; if this one is, somebody changed the record: found a new cluster under another prefix", "%s in the cluster's store %s is not a record of Hearth", key, r.store.Location())
}

// create stores a value under a key that has none, and returns what is stored
// there now: this value or, with mine false, another's. After an error it is
// unknown which. The value must be unlike any other machine's, since that is
// how an attempt whose answer was lost is told from somebody else's.
func (r *records) create(ctx context.Context, key string, value []byte) (stored []byte, mine bool, err error) {
	_, err = retry(ctx, r, "create "+key, func() (struct{}, error) { return struct{}{}, r.store.Create(ctx, key, value) })
	if err == nil {
		return value, true, nil
	}
	if !errors.Is(err, ErrExists) {
		return nil, false, err
	}
	stored, err = retry(ctx, r, "read "+key, func() ([]byte, error) {
		b, err := r.store.Get(ctx, key)
		if errors.Is(err, ErrNotFound) { // it exists; the read lags behind
			err = fmt.Errorf("%s exists but cannot be seen yet", key)
		}
		return b, err
	})
	return stored, err == nil && bytes.Equal(stored, value), err
}

func (r *records) put(ctx context.Context, key string, value []byte) error {
	_, err := retry(ctx, r, "write "+key, func() (struct{}, error) { return struct{}{}, r.store.Put(ctx, key, value) })
	return err
}

// jittered returns a random duration around d, from half of it to one and a
// half times it, so that machines that started together do not ask together.
func jittered(d time.Duration) time.Duration { return d/2 + rand.N(d) }
