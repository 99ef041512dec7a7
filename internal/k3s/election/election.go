package election

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"time"

	"github.com/hearth-sh/hearth/internal/bootstrap/fault"
	"github.com/hearth-sh/hearth/internal/k3s/pki"
)

// What is used where Options say 0.
const (
	// DefaultLease is ten beats: a holder whose disk or network stalls for
	// seconds, as a first start of k3s makes it, keeps its generation.
	DefaultLease = 30 * time.Second
	// DefaultFoundWithin is more than any first start of k3s takes.
	DefaultFoundWithin = 10 * time.Minute
	// DefaultTimeout lets one holder die and the next one found.
	DefaultTimeout = 15 * time.Minute
	// DefaultPatience outlasts a restart of a NAT instance or the time that
	// new role policies take to spread.
	DefaultPatience = 2 * time.Minute

	beatsPerLease = 10
	// candidatePoll is how often servers look, agentPoll and maxAgentPoll how
	// often agents do, of which there may be hundreds.
	candidatePoll = time.Second
	agentPoll     = time.Second
	maxAgentPoll  = 5 * time.Second
	// maxGenerations bounds walking the generations. Each that failed took
	// minutes of somebody's time; nobody gets here by accident.
	maxGenerations = 1000
	nonceBytes     = 16
)

// Options say who takes part in an election, and how. Store, Instance and
// State are required; servers need Discard and DataPresent as well.
type Options struct {
	Store Store
	// Instance names this machine among all that ever use the store: a-z, 0-9
	// and "-", at most 64 bytes. An EC2 instance id does.
	Instance string
	// Server says that this machine is to be a server, and may found.
	Server bool
	State  State
	// Discard stops k3s and removes its data of a generation that was given up
	// while this machine tried to found it. It is called again until it
	// returns nil, if need be after a restart; until then the machine takes no
	// further part.
	Discard func(ctx context.Context, generation int) error
	// DataPresent says whether this machine has the data of an etcd member.
	DataPresent func() (bool, error)
	// Restore asks for a new generation from a snapshot, see Restore.
	Restore *Restore
	// Lease is how long a holder may be silent before others give up its
	// generation. All machines of a cluster should agree on it; if they do
	// not, only the time to take over suffers. 0 means DefaultLease.
	Lease time.Duration
	// FoundWithin bounds how long a generation is held undecided: after that
	// the heartbeats end, whatever the holder does. 0 means DefaultFoundWithin.
	FoundWithin time.Duration
	// RestoreWithin is added to it where the generation is to be restored.
	RestoreWithin time.Duration
	// Timeout bounds Elect. 0 means DefaultTimeout.
	Timeout time.Duration
	// Patience is how long one request to the store is tried again. 0 means
	// DefaultPatience.
	Patience time.Duration
	// Logger gets events without secrets; nil discards.
	Logger *slog.Logger
}

// Elector takes part in the election of one cluster for one machine. Its
// methods may not be called concurrently.
type Elector struct {
	records  *records
	instance string
	server   bool
	state    State
	discard  func(context.Context, int) error
	data     func() (bool, error)
	restore  *Restore
	lease    time.Duration
	within   time.Duration
	// restoring is added to within for a restore.
	restoring time.Duration
	timeout   time.Duration
	log       *slog.Logger

	began  time.Time // when Elect was called
	memory Memory
	// newest is the newest generation known to exist.
	newest view
	// watched is the silence of its holder.
	watched silence
}

// view is a generation as last seen. Its holder never changes, nor does its
// outcome once it has one.
type view struct {
	number  int
	holder  *holderRecord
	outcome *outcomeRecord
}

// New returns an elector. It asks the store nothing.
func New(o Options) (*Elector, error) {
	switch {
	case o.Store == nil || o.State == nil:
		return nil, errors.New("an election needs a store and a state")
	case checkKey(o.Instance) != nil || strings.Contains(o.Instance, "/") || len(o.Instance) > 64:
		return nil, fmt.Errorf("instance %.80q is not 1 to 64 of a-z, 0-9 and -", o.Instance)
	case o.Server && (o.Discard == nil || o.DataPresent == nil):
		return nil, errors.New("a server's election needs Discard and DataPresent")
	case o.Restore != nil && (o.Restore.Generation < 1 || o.Restore.Snapshot == "" || len(o.Restore.Snapshot) > maxSnapshotBytes):
		return nil, fmt.Errorf("a restore needs a generation from 1 and a snapshot of 1 to %d bytes", maxSnapshotBytes)
	}
	e := &Elector{
		records:  &records{store: o.Store, patience: positive(o.Patience, DefaultPatience)},
		instance: o.Instance, server: o.Server, state: o.State, discard: o.Discard, data: o.DataPresent, restore: o.Restore,
		lease: positive(o.Lease, DefaultLease), within: positive(o.FoundWithin, DefaultFoundWithin), restoring: o.RestoreWithin, timeout: positive(o.Timeout, DefaultTimeout),
		log: o.Logger,
	}
	if e.log == nil {
		e.log = slog.New(slog.DiscardHandler)
	}
	if !o.Server {
		e.data = func() (bool, error) { return false, nil }
	}
	return e, nil
}

func positive(d, otherwise time.Duration) time.Duration {
	if d > 0 {
		return d
	}
	return otherwise
}

// Action is what a machine is to do.
type Action string

const (
	// ActionFound: place the authorities, start k3s with cluster-init (or
	// restore the snapshot), then call Hold.Found.
	ActionFound Action = "found"
	// ActionJoin: start k3s with one of the servers to join.
	ActionJoin Action = "join"
	// ActionContinue: this server's own data is of the generation; start k3s.
	ActionContinue Action = "continue"
)

// Server is a server of a generation.
type Server struct {
	Instance string
	// Address is an IP address or a DNS name, without a port.
	Address string
}

// Decision is what an election came to. Its credentials are of a generation
// that was founded or, with ActionFound, that this machine alone may found.
type Decision struct {
	Action      Action
	Generation  int
	Credentials Credentials
	// Servers are the other servers known, by instance; empty with ActionFound
	// and for a founder that was never joined.
	Servers []Server
	// Hold is set with ActionFound and must be ended with Found, Abandon or
	// Close.
	Hold *Hold
	// Restore is set with ActionFound where the generation is to be restored.
	Restore *Restore
}

// Elect returns what this machine is to do, as soon as that is certain: found,
// because it holds a generation, or join or continue, because one is founded.
// It waits for other holders, and gives up those that fall silent.
//
// Errors have a code of this package, or say that the context was cancelled. ErrFenced is none
// of them: whoever was fenced calls Elect again.
func (e *Elector) Elect(ctx context.Context) (*Decision, error) {
	parent := ctx
	began := time.Now()
	ctx, cancel := context.WithTimeout(ctx, e.timeout)
	defer cancel()
	d, err := e.elect(ctx)
	// A deadline of the caller's is as good as ours: what was waited for is
	// worth more to it than that its time is up.
	if err != nil && errors.Is(ctx.Err(), context.DeadlineExceeded) && !errors.Is(parent.Err(), context.Canceled) {
		return nil, e.timedOut(err, time.Since(began))
	}
	return d, err
}

func (e *Elector) elect(ctx context.Context) (*Decision, error) {
	e.began = time.Now()
	if err := e.recall(); err != nil {
		return nil, err
	}
	poll := agentPoll
	if e.server {
		poll = candidatePoll
	}
	for {
		if err := e.look(ctx); err != nil {
			return nil, err
		}
		v, d, err := e.step(ctx)
		if err != nil || v == decided {
			return d, err
		}
		if v == lookAgain {
			continue
		}
		timer := time.NewTimer(jittered(poll))
		select {
		case <-timer.C:
		case <-ctx.Done():
			timer.Stop()
			return nil, ctx.Err()
		}
		if !e.server {
			poll = min(poll*5/4, maxAgentPoll)
		}
	}
}

// recall loads the memory and refuses data that it does not explain: starting
// k3s on it would bring back whatever cluster it is of.
func (e *Elector) recall() error {
	memory, err := e.state.Load()
	if err != nil {
		return err
	}
	if memory.Store != e.records.store.Location() || memory.Instance != e.instance {
		memory = Memory{}
	}
	e.memory = memory
	if !e.server && memory.Generation > 0 && memory.Phase != PhaseMember {
		return fault.New(CodeForeignData, nil, "run bootstrap reset before giving a machine another role",
			"this machine was a server of generation %d in %s and is to be an agent now", memory.Generation, memory.Store)
	}
	if memory.Generation > 0 {
		return nil
	}
	present, err := e.dataPresent()
	if err != nil {
		return err
	}
	if present {
		return fault.New(CodeForeignData, nil, "keep a copy if it matters, then run bootstrap reset; never bake an image from a running node",
			"this machine has etcd data that no generation in %s explains", e.records.store.Location())
	}
	return nil
}

func (e *Elector) remember(m Memory) error {
	if m.Generation > 0 {
		m.Store, m.Instance = e.records.store.Location(), e.instance
	}
	if err := e.state.Save(m); err != nil {
		return err
	}
	e.memory = m
	return nil
}

// look brings newest up to date. Generations have no gaps, so the first that
// is missing ends the walk; one that cannot be seen yet is met in Create.
func (e *Elector) look(ctx context.Context) error {
	for e.newest.number < maxGenerations {
		next := e.newest.number + 1
		holder, err := read[holderRecord](ctx, e.records, holderKey(next))
		if err != nil {
			return err
		}
		if holder == nil {
			break
		}
		e.newest = view{number: next, holder: holder}
	}
	if e.newest.number == maxGenerations {
		return fault.New(CodeExhausted, nil, "find out why founding fails (bootstrap status on the servers), then use another prefix",
			"founding was tried %d times in %s", maxGenerations, e.records.store.Location())
	}
	if e.newest.number == 0 || e.newest.outcome != nil {
		return nil
	}
	var err error
	e.newest.outcome, err = e.outcome(ctx, e.newest.number)
	return err
}

func (e *Elector) outcome(ctx context.Context, n int) (*outcomeRecord, error) {
	return read[outcomeRecord](ctx, e.records, outcomeKey(n))
}

// verdict is what a step of the election came to, besides a decision.
type verdict int

const (
	proceed   verdict = iota // nothing; the next rule applies
	decided                  // a decision
	lookAgain                // something changed; look at once
	wait                     // look again after a while
)

// step decides on what look saw.
func (e *Elector) step(ctx context.Context) (verdict, *Decision, error) {
	if v, d, err := e.own(ctx); v != proceed || err != nil {
		return v, d, err
	}
	newest, wanted := e.newest, e.restore
	switch {
	case wanted != nil && wanted.Generation > newest.number:
		return wait, nil, e.nothingToRestore()
	case newest.number > 0 && newest.outcome != nil && newest.outcome.Outcome == founded:
		if e.server && wanted != nil && wanted.Generation == newest.number {
			return e.contend(ctx, newest.number+1, wanted)
		}
		d, err := e.join(ctx)
		return decided, d, err
	case !e.server:
		return wait, nil, nil
	case newest.number == 0:
		return e.contend(ctx, 1, nil)
	case newest.outcome == nil:
		return e.watch(ctx)
	case wanted != nil && wanted.Generation == newest.number:
		return wait, nil, e.nothingToRestore()
	}
	// A restore that was given up half way is still a restore: founding an
	// empty cluster in its place would look like success.
	return e.contend(ctx, newest.number+1, newest.holder.Restore)
}

func (e *Elector) nothingToRestore() error {
	return fault.New(CodeRestore, nil, "name a generation that was founded; bootstrap status on a server shows it",
		"generation %d in %s was never founded, so there is nothing to restore", e.restore.Generation, e.records.store.Location())
}

// own settles what this machine remembers: a generation it may have been
// founding when it was interrupted, or an older one it was part of.
func (e *Elector) own(ctx context.Context) (verdict, *Decision, error) {
	m := e.memory
	switch {
	case m.Generation == 0 || m.Generation == e.newest.number && m.Phase != PhaseHolding:
		return proceed, nil, nil
	case m.Phase == PhaseHolding && m.Generation > e.newest.number:
		// Its holder record was never written, or cannot be seen yet. If the
		// generation is up for contention, contend uses the same nonce again.
		return proceed, nil, nil
	case m.Phase == PhaseHolding:
		return e.resume(ctx)
	case m.Generation > e.newest.number:
		if time.Since(e.began) < e.records.patience {
			return wait, nil, nil // a read that lags
		}
		return wait, nil, fault.New(CodeSuperseded, nil, "bring back what was in the store, or run bootstrap reset to start over",
			"this machine is part of generation %d, which %s does not have", m.Generation, e.records.store.Location())
	}
	restoring := e.restore != nil && e.restore.Generation == m.Generation
	if restoring && (e.newest.outcome == nil || e.newest.outcome.Outcome == abandoned) {
		return proceed, nil, nil // it may still be the one that restores
	}
	present, err := e.dataPresent()
	if err != nil {
		return wait, nil, err
	}
	if present {
		return wait, nil, fault.New(CodeSuperseded, nil, "keep a copy if it matters, then run bootstrap reset and bootstrap run to join",
			"this machine has data of generation %d, which generation %d has replaced", m.Generation, e.newest.number)
	}
	return lookAgain, nil, e.remember(Memory{})
}

func (e *Elector) dataPresent() (bool, error) {
	present, err := e.data()
	if err != nil {
		return false, fault.New(CodeState, err, "check k3s's data directory", "cannot tell whether this machine has data of a cluster")
	}
	return present, nil
}

// resume settles a generation that this machine tried to hold and that exists.
func (e *Elector) resume(ctx context.Context) (verdict, *Decision, error) {
	m, holder := e.memory, e.newest.holder
	if m.Generation < e.newest.number {
		var err error
		if holder, err = read[holderRecord](ctx, e.records, holderKey(m.Generation)); err != nil || holder == nil {
			return wait, nil, err // nil: a read that lags
		}
	}
	if holder.Nonce != m.Nonce {
		// Another was first, so nothing was started for the generation.
		e.log.InfoContext(ctx, "another machine holds the generation", "generation", m.Generation, "holder", holder.Holder)
		return lookAgain, nil, e.remember(e.before(m))
	}
	out, err := e.outcome(ctx, m.Generation)
	switch {
	case err != nil:
		return wait, nil, err
	case out == nil && m.Generation < e.newest.number:
		return wait, nil, nil // it is decided, or there were no newer one; a read that lags
	case out == nil:
		e.log.InfoContext(ctx, "resuming the founding", "generation", m.Generation)
		d, err := e.hold(ctx, m.Generation, holder)
		return decided, d, err
	case out.Outcome == founded && out.Nonce == m.Nonce:
		m.Phase, m.DataOf = PhaseFounder, 0
		return lookAgain, nil, e.remember(m)
	}
	e.log.WarnContext(ctx, "the founding was given up; discarding its data", "generation", m.Generation, "by", out.By, "reason", out.Reason)
	if err := e.discard(ctx, m.Generation); err != nil {
		return wait, nil, fault.New(CodeFenced, err, "stop k3s and run bootstrap reset", "generation %d was given up while this machine was founding it, and its data cannot be removed", m.Generation)
	}
	return lookAgain, nil, e.remember(Memory{})
}

// before returns the memory that a failed attempt to hold goes back to.
func (e *Elector) before(m Memory) Memory {
	if m.DataOf == 0 {
		return Memory{}
	}
	return Memory{Generation: m.DataOf, Phase: PhaseMember}
}

// contend tries to become the holder of generation n.
func (e *Elector) contend(ctx context.Context, n int, restore *Restore) (verdict, *Decision, error) {
	m := Memory{Generation: n, Phase: PhaseHolding, Nonce: randomHex()}
	switch {
	case e.memory.Phase == PhaseHolding && e.memory.Generation == n:
		m = e.memory // an attempt whose end is unknown; its nonce may yet win
	case e.memory.Phase == PhaseHolding:
		m.DataOf = e.memory.DataOf
	default:
		m.DataOf = e.memory.Generation
	}
	// Remembered before it is written: a machine that does not know its own
	// nonce cannot tell its generation from another's.
	if err := e.remember(m); err != nil {
		return wait, nil, err
	}
	b, err := json.Marshal(holderRecord{Holder: e.instance, Nonce: m.Nonce, Started: time.Now().UTC(), Restore: restore})
	if err != nil {
		return wait, nil, fmt.Errorf("encode the holder of generation %d: %w", n, err)
	}
	stored, _, err := e.records.create(ctx, holderKey(n), b)
	if err != nil {
		return wait, nil, err
	}
	holder, err := decode[holderRecord](e.records, holderKey(n), stored)
	if err != nil {
		return wait, nil, err
	}
	if holder.Nonce != m.Nonce {
		return lookAgain, nil, nil
	}
	if err := e.checkFence(ctx, n); err != nil {
		return wait, nil, err
	}
	e.newest = view{number: n, holder: holder}
	e.log.InfoContext(ctx, "founding a generation", "generation", n, "restore", restore != nil)
	d, err := e.hold(ctx, n, holder)
	return decided, d, err
}

// checkFence makes sure that the store refuses to create what exists. One that
// ignores the condition, as some S3 of other makers do, would let every
// machine found a cluster of its own. Where it works, nothing is written.
func (e *Elector) checkFence(ctx context.Context, n int) error {
	probe, err := json.Marshal(holderRecord{Holder: e.instance, Nonce: "probe-" + randomHex()})
	if err != nil {
		return fmt.Errorf("encode the probe of generation %d: %w", n, err)
	}
	_, mine, err := e.records.create(ctx, holderKey(n), probe)
	if err != nil {
		return err
	}
	if mine {
		return fault.New(CodeUnsupported, nil, "use a store that honours If-None-Match: * on PutObject, such as Amazon S3", "%s overwrites what it must only create", e.records.store.Location())
	}
	return nil
}

// silence is how long the heartbeat of a generation has not changed, by this
// machine's monotonic clock. Clocks of other machines play no part.
type silence struct {
	generation int
	beat       []byte
	since      time.Time // when it was first seen
	last       time.Time // when it was last seen
}

// watch looks at the heartbeat of the undecided newest generation and gives it
// up once it has been silent for the lease.
func (e *Elector) watch(ctx context.Context) (verdict, *Decision, error) {
	n := e.newest.number
	beat, err := retry(ctx, e.records, "read "+heartbeatKey(n), func() ([]byte, error) { return e.records.store.Get(ctx, heartbeatKey(n)) })
	if err != nil && !errors.Is(err, ErrNotFound) {
		return wait, nil, err
	}
	now := time.Now()
	w := &e.watched
	// A gap between two looks is this machine's or the store's, and may have
	// kept the holder from beating as well: it is no evidence.
	if w.generation != n || !bytes.Equal(w.beat, beat) || now.Sub(w.last) > e.lease/3 {
		*w = silence{generation: n, beat: beat, since: now, last: now}
		return wait, nil, nil
	}
	w.last = now
	if now.Sub(w.since) < e.lease {
		return wait, nil, nil
	}
	return lookAgain, nil, e.records.abandon(ctx, n, e.instance, fmt.Sprintf("%s was silent for %s", e.newest.holder.Holder, e.lease))
}

// abandon decides that a generation is given up, unless it is decided.
func (r *records) abandon(ctx context.Context, n int, by, reason string) error {
	b, err := json.Marshal(outcomeRecord{Outcome: abandoned, By: by, Nonce: randomHex(), Reason: reason[:min(len(reason), maxReasonBytes)], At: time.Now().UTC()})
	if err != nil {
		return fmt.Errorf("encode the outcome of generation %d: %w", n, err)
	}
	_, _, err = r.create(ctx, outcomeKey(n), b)
	return err
}

// join takes part in the newest generation, which is founded.
func (e *Elector) join(ctx context.Context) (*Decision, error) {
	n := e.newest.number
	var credentials Credentials
	var err error
	if e.server {
		credentials, err = e.records.server(ctx, n)
	} else {
		credentials, err = e.records.agent(ctx, n)
	}
	if err != nil {
		return nil, err
	}
	servers, err := e.Servers(ctx, n)
	if err != nil {
		return nil, err
	}
	d := &Decision{Action: ActionJoin, Generation: n, Credentials: credentials, Servers: servers}
	if e.memory.Generation == n {
		present, err := e.dataPresent()
		switch {
		case err != nil:
			return nil, err
		case present:
			d.Action = ActionContinue
		case e.memory.Phase == PhaseFounder && len(servers) == 0:
			// cluster-init here would make a second, empty cluster under the
			// first one's name.
			return nil, fault.New(CodeDataLost, nil, fmt.Sprintf("restore a snapshot of generation %d, or use another prefix for a new cluster", n),
				"this machine founded generation %d and lost its data, and no other server is known", n)
		}
		return d, nil
	}
	// Remembered before k3s writes data of the generation.
	if err := e.remember(Memory{Generation: n, Phase: PhaseMember}); err != nil {
		return nil, err
	}
	return d, nil
}

// Servers returns the other servers of a founded generation that announced
// themselves and did not leave, and its founder until it did either; ordered by
// instance.
func (e *Elector) Servers(ctx context.Context, generation int) ([]Server, error) {
	keys, err := retry(ctx, e.records, "list members", func() ([]string, error) {
		return e.records.store.List(ctx, membersKey(generation))
	})
	if err != nil {
		return nil, err
	}
	out, err := e.outcome(ctx, generation)
	if err != nil {
		return nil, err
	}
	addresses := make(map[string]string)
	if out != nil && out.Outcome == founded {
		addresses[out.By] = out.Address
	}
	for _, key := range keys {
		m, err := read[memberRecord](ctx, e.records, key)
		if err != nil {
			return nil, err
		}
		if m == nil {
			continue
		}
		addresses[strings.TrimPrefix(key, membersKey(generation))] = m.Address
		if m.Left {
			delete(addresses, strings.TrimPrefix(key, membersKey(generation)))
		}
	}
	delete(addresses, e.instance)
	var servers []Server
	for instance, address := range addresses {
		servers = append(servers, Server{Instance: instance, Address: address})
	}
	slices.SortFunc(servers, func(a, b Server) int { return strings.Compare(a.Instance, b.Instance) })
	return servers, nil
}

// Announce tells others that this server can be joined under an address, an IP
// address or a DNS name without a port. It is for servers whose API is ready.
func (e *Elector) Announce(ctx context.Context, generation int, address string) error {
	return e.records.announce(ctx, generation, e.instance, memberRecord{Address: address, At: time.Now().UTC()})
}

// Leave takes this server's announcement back.
func (e *Elector) Leave(ctx context.Context, generation int, address string) error {
	return e.records.announce(ctx, generation, e.instance, memberRecord{Address: address, Left: true, At: time.Now().UTC()})
}

func (r *records) announce(ctx context.Context, generation int, instance string, m memberRecord) error {
	if err := m.check(); err != nil {
		return err
	}
	b, err := json.Marshal(m)
	if err != nil {
		return fmt.Errorf("encode the member record: %w", err)
	}
	return r.put(ctx, membersKey(generation)+instance, b)
}

// server returns a server's credentials of a generation.
func (r *records) server(ctx context.Context, n int) (Credentials, error) {
	return published(ctx, r, serverKey(n), func(b []byte) (Credentials, error) {
		var record serverRecord
		if err := unmarshal(b, &record); err != nil {
			return Credentials{}, err
		}
		return record.credentials()
	})
}

// agent returns an agent's credentials of a generation.
func (r *records) agent(ctx context.Context, n int) (Credentials, error) {
	return published(ctx, r, agentKey(n), func(b []byte) (Credentials, error) {
		var record agentRecord
		if err := unmarshal(b, &record); err != nil {
			return Credentials{}, err
		}
		return record.credentials()
	})
}

// published reads credentials of a founded generation. They were there before
// it was founded, so that they are missing is a read that lags.
func published(ctx context.Context, r *records, key string, parse func([]byte) (Credentials, error)) (Credentials, error) {
	b, err := retry(ctx, r, "read "+key, func() ([]byte, error) {
		b, err := r.store.Get(ctx, key)
		if errors.Is(err, ErrNotFound) {
			err = fmt.Errorf("%s is missing", key)
		}
		return b, err
	})
	if err != nil {
		return Credentials{}, err
	}
	c, err := parse(b)
	if err != nil {
		return Credentials{}, r.corrupt(key, err)
	}
	return c, nil
}

// publish makes the credentials of a generation, or takes those it restores,
// and stores them for servers and agents. Only its holder calls it; what an
// interrupted attempt of the same holder stored is kept.
func (r *records) publish(ctx context.Context, n int, holder *holderRecord) (Credentials, error) {
	credentials, err := r.fresh(ctx, holder)
	if err != nil {
		return Credentials{}, err
	}
	authorities, err := credentials.Authorities.Encode()
	if err != nil {
		return Credentials{}, fmt.Errorf("encode the authorities of generation %d: %w", n, err)
	}
	b, err := json.Marshal(serverRecord{
		Nonce: holder.Nonce, Authorities: authorities,
		ServerToken: credentials.ServerToken.Reveal(), AgentToken: credentials.AgentToken.Reveal(),
	})
	if err != nil {
		return Credentials{}, errors.New("encode the credentials of servers")
	}
	stored, mine, err := r.create(ctx, serverKey(n), b)
	if err != nil {
		return Credentials{}, err
	}
	if !mine {
		var record serverRecord
		if err := unmarshal(stored, &record); err != nil {
			return Credentials{}, r.corrupt(serverKey(n), err)
		}
		if record.Nonce != holder.Nonce {
			return Credentials{}, r.corrupt(serverKey(n), errors.New("it is not its holder's"))
		}
		if credentials, err = record.credentials(); err != nil {
			return Credentials{}, r.corrupt(serverKey(n), err)
		}
	}
	agent := agentRecord{ServerCA: string(credentials.ServerCA), AgentToken: credentials.AgentToken.Reveal()}
	if b, err = json.Marshal(agent); err != nil {
		return Credentials{}, errors.New("encode the credentials of agents")
	}
	stored, mine, err = r.create(ctx, agentKey(n), b)
	if err != nil {
		return Credentials{}, err
	}
	var record agentRecord
	if !mine && (unmarshal(stored, &record) != nil || record != agent) {
		return Credentials{}, r.corrupt(agentKey(n), errors.New("it does not fit what servers have"))
	}
	return credentials, nil
}

// fresh returns new credentials, or those of the generation that is restored:
// nodes that know the old ones must recognise the cluster.
func (r *records) fresh(ctx context.Context, holder *holderRecord) (Credentials, error) {
	if holder.Restore != nil {
		return r.server(ctx, holder.Restore.Generation)
	}
	authorities, err := pki.Generate(time.Now())
	if err != nil {
		return Credentials{}, err
	}
	c := Credentials{ServerCA: authorities.ServerCA(), Authorities: authorities}
	if c.ServerToken, err = pki.NewToken(pki.UserServer, c.ServerCA); err != nil {
		return Credentials{}, err
	}
	if c.AgentToken, err = pki.NewToken(pki.UserNode, c.ServerCA); err != nil {
		return Credentials{}, err
	}
	return c, nil
}

// timedOut says what the election was waiting for.
func (e *Elector) timedOut(cause error, after time.Duration) error {
	waiting := "no server has begun to found it"
	remedy := "start at least one machine with the role server and the same store"
	if v := e.newest; v.number > 0 {
		switch {
		case v.outcome == nil:
			waiting = fmt.Sprintf("generation %d is still being founded by %s", v.number, v.holder.Holder)
			remedy = "see why on " + v.holder.Holder + ": bootstrap status, journalctl -u k3s"
		case v.outcome.Outcome == abandoned:
			waiting = fmt.Sprintf("generation %d was given up (%.200s)", v.number, v.outcome.Reason)
		default:
			waiting = fmt.Sprintf("generation %d is founded, but joining it was not prepared in time", v.number)
			remedy = "check the route to the store"
		}
	}
	return fault.Passing(CodeTimeout, cause, remedy, "the cluster in %s was not founded within %s: %s", e.records.store.Location(), after.Round(time.Second), waiting)
}

func randomHex() string {
	b := make([]byte, nonceBytes)
	_, _ = rand.Read(b) // never fails since Go 1.24
	return hex.EncodeToString(b)
}
