package engine

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/cenkalti/backoff/v5"

	"github.com/hearth-sh/hearth/api/v1alpha1"
	"github.com/hearth-sh/hearth/internal/engine/control"
	"github.com/hearth-sh/hearth/internal/engine/worker"
	"github.com/hearth-sh/hearth/internal/localsocket"
	"github.com/hearth-sh/hearth/internal/sandbox"
)

const (
	// watchInterval is how often a worker is asked for a sign of life and
	// looked at for its memory.
	watchInterval = 250 * time.Millisecond
	// silenceLimit is how long a worker may owe an answer. A guest holds a
	// processor for a scheduler slice (10 ms) at a time, and the answer takes
	// a few turns of the run queue, so what is asked of a busy worker grows
	// with its requests by silencePerRequest, up to silenceMost.
	silenceLimit      = 2 * time.Second
	silencePerRequest = 30 * time.Millisecond
	silenceMost       = 20 * time.Second
	// ownDelayMost is how late the engine may notice that a worker is silent
	// and still blame the worker.
	ownDelayMost = time.Second
	// startLimit bounds a worker's start, from exec to its first answer.
	startLimit = 15 * time.Second
	// loadLimit bounds one load: 50 MiB of Wasm decode in under a second on an
	// idle core, and two cores may have much else to do.
	loadLimit = time.Minute
	// loadRetry is the pause before a load that failed for no fault of the
	// object is tried again.
	loadRetry = 2 * time.Second
	// crashesPerLoad is how often a worker may die while it loads an object
	// before the object is given up on.
	crashesPerLoad = 3
	// loaders is how many loads are asked for at once, as many as a worker
	// works on.
	loaders = 2
	// stableAfter is how long a worker has to run for its next restart to be
	// immediate again.
	stableAfter = 30 * time.Second
	// firstBackoff and mostBackoff bound the pause between restarts.
	firstBackoff = 50 * time.Millisecond
	mostBackoff  = 10 * time.Second
	// stopGrace is how long a worker may take to end by itself.
	stopGrace = time.Second
	// lateLogs is how long lines of an unloaded function are still taken.
	lateLogs = 5 * time.Second
	// unloadLimit bounds a call to unload; requests were drained before.
	unloadLimit = 10 * time.Second
)

// process supervises the worker of one isolation domain over all its lives.
type process struct {
	engine *Engine
	id     string
	tenant string

	cancel context.CancelFunc
	done   chan struct{}

	mu        sync.Mutex
	revisions map[*revision]struct{}
	tenants   map[string]string // of functions whose logs are taken
	changed   chan struct{}     // closed and replaced when revisions or their wishes change
	state     string
	current   *incarnation
	restarts  int
	since     time.Time
	lastExit  string
	rss       uint64
}

// incarnation is one run of a worker.
type incarnation struct {
	pid       int
	command   *exec.Cmd
	client    *http.Transport
	ping      *http.Transport
	lifeline  *os.File
	dead      chan struct{} // closed after the process was reaped
	killedFor atomic.Pointer[string]
	inFlight  atomic.Int64
	cleanup   func()
}

func (c *incarnation) isDead() bool {
	select {
	case <-c.dead:
		return true
	default:
		return false
	}
}

// kill ends the process at once for the reason, which becomes a metric's label.
func (c *incarnation) kill(reason string) {
	c.killedFor.CompareAndSwap(nil, &reason)
	_ = c.command.Process.Kill() // fails when it ended already
}

func newProcess(e *Engine, id, tenant string) *process {
	p := &process{
		engine: e, id: id, tenant: tenant,
		done:      make(chan struct{}),
		revisions: make(map[*revision]struct{}),
		tenants:   make(map[string]string),
		changed:   make(chan struct{}),
		state:     control.WorkerStarting,
		since:     time.Now(),
	}
	ctx, cancel := context.WithCancel(context.Background())
	p.cancel = cancel
	go p.run(ctx)
	return p
}

func (p *process) wake() {
	p.mu.Lock()
	defer p.mu.Unlock()
	close(p.changed)
	p.changed = make(chan struct{})
}

func (p *process) add(r *revision) {
	p.mu.Lock()
	p.revisions[r] = struct{}{}
	p.tenants[r.spec.Name] = r.spec.Tenant
	p.mu.Unlock()
	p.wake()
}

func (p *process) setState(state string) {
	p.mu.Lock()
	p.state, p.since = state, time.Now()
	p.mu.Unlock()
	p.engine.bump()
}

// run keeps a worker alive until ctx ends.
func (p *process) run(ctx context.Context) {
	defer close(p.done)
	pause := backoff.NewExponentialBackOff()
	pause.InitialInterval, pause.MaxInterval = firstBackoff, mostBackoff
	logger := p.engine.logger.With("worker", p.id, "tenant", p.tenant)
	for ctx.Err() == nil {
		p.setState(control.WorkerStarting)
		began := time.Now()
		c, err := p.start(ctx)
		reason := "start"
		if err == nil {
			logger.Info("worker started", "pid", c.pid)
			p.mu.Lock()
			p.current = c
			p.mu.Unlock()
			p.setState(control.WorkerReady)
			p.serve(ctx, c)
			err = p.bury(c)
			reason = "exit"
			if r := c.killedFor.Load(); r != nil {
				reason = *r
			}
		}
		if ctx.Err() != nil {
			return
		}
		ran := time.Since(began)
		logger.Warn("worker ended", "reason", reason, "error", err, "ran", ran)
		p.engine.metrics.restarts.WithLabelValues(reason).Inc()
		p.mu.Lock()
		p.restarts++
		p.lastExit = fmt.Sprintf("%s: %v", reason, err)
		p.mu.Unlock()
		if ran > stableAfter {
			pause.Reset()
			continue
		}
		p.setState(control.WorkerBackoff)
		t := time.NewTimer(pause.NextBackOff())
		select {
		case <-t.C:
		case <-ctx.Done():
		}
		t.Stop()
	}
}

// start runs a worker and waits for its first answer.
func (p *process) start(ctx context.Context) (_ *incarnation, err error) {
	o := &p.engine.options
	socket := workerSocket(o.ControlSocket, p.id)
	listener, err := localsocket.Listen(socket)
	if err != nil {
		return nil, fmt.Errorf("listen for the worker: %w", err)
	}
	unix, ok := listener.(*localsocket.Listener)
	if !ok {
		return nil, errors.Join(fmt.Errorf("listen for the worker: %T cannot be handed down", listener), listener.Close())
	}
	var files []*os.File
	closeFiles := func() {
		for _, f := range files {
			_ = f.Close() // nothing was written through them
		}
	}
	defer closeFiles()
	defer func() {
		if err != nil {
			_ = listener.Close() // the first error says it
		}
	}()
	inherited, err := unix.File()
	if err != nil {
		return nil, fmt.Errorf("hand down the listener: %w", err)
	}
	files = append(files, inherited)
	childLife, parentLife, err := sandbox.NewLifeline()
	if err != nil {
		return nil, fmt.Errorf("make a lifeline: %w", err)
	}
	files = append(files, childLife)
	logRead, logWrite, err := os.Pipe()
	if err != nil {
		return nil, errors.Join(fmt.Errorf("make a log pipe: %w", err), parentLife.Close())
	}
	files = append(files, logWrite)

	config, err := json.Marshal(worker.Config{
		ID: p.id, MemoryBytes: o.WorkerMemoryBytes, StoreDir: o.StoreDir, RequireSandbox: o.RequireSandbox,
	})
	if err != nil {
		return nil, errors.Join(err, parentLife.Close(), logRead.Close())
	}
	cmd := exec.Command(o.WorkerCommand[0], o.WorkerCommand[1:]...) //nolint:noctx // it is asked to end before it is killed
	// An empty environment would be inherited; a guest never sees either.
	cmd.Env = append([]string{"HEARTH_WORKER=" + p.id}, o.WorkerEnv...)
	cmd.Stdin = bytes.NewReader(config)
	cmd.Stderr = o.WorkerStderr
	cmd.ExtraFiles = []*os.File{inherited, childLife, logWrite}
	// A group of its own: Ctrl-C in a terminal is for the parent, which ends
	// workers after their requests.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Credential: p.engine.credential}
	if err := cmd.Start(); err != nil {
		return nil, errors.Join(fmt.Errorf("start a worker: %w", err), parentLife.Close(), logRead.Close())
	}
	c := &incarnation{
		pid:      cmd.Process.Pid,
		command:  cmd,
		client:   workerTransport(socket, 512),
		ping:     workerTransport(socket, 1),
		lifeline: parentLife,
		dead:     make(chan struct{}),
	}
	logs := make(chan struct{})
	go func() {
		defer close(logs)
		p.engine.logs.collect(logRead, p.tenantOf)
		_ = logRead.Close() // read to its end
	}()
	c.cleanup = func() {
		c.client.CloseIdleConnections()
		c.ping.CloseIdleConnections()
		<-logs
		_ = parentLife.Close()
		_ = listener.Close() // removes the socket; its descriptor is closed already
	}
	// Only the worker may hold the listener: if it dies, connecting has to
	// fail instead of waiting in a queue that nobody accepts from.
	_ = unix.UnixListener.Close()
	closeFiles()
	files = nil
	go func() {
		_ = cmd.Wait() // what it says is in ProcessState
		close(c.dead)
	}()

	// The path cannot be re-bound while this incarnation lives, so its
	// failure to answer is final.
	startCtx, cancel := context.WithTimeout(ctx, startLimit)
	defer cancel()
	pong, err := c.askAlive(startCtx)
	if err != nil {
		c.kill("start")
		<-c.dead
		c.cleanup()
		return nil, fmt.Errorf("the worker did not come up (%s): %w", c.command.ProcessState, err)
	}
	if len(pong.Sandbox) > 0 {
		p.engine.noteSandbox(pong.Sandbox)
	}
	return c, nil
}

func workerTransport(socket string, idle int) *http.Transport {
	return &http.Transport{
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return localsocket.Dial(ctx, socket)
		},
		MaxIdleConnsPerHost:    idle,
		DisableCompression:     true,
		MaxResponseHeaderBytes: 256 << 10,
		WriteBufferSize:        16 << 10,
		ReadBufferSize:         16 << 10,
	}
}

func (p *process) tenantOf(name string) (string, bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	tenant, ok := p.tenants[name]
	return tenant, ok
}

func (p *process) forgetTenant(name string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for r := range p.revisions {
		if r.spec.Name == name {
			return
		}
	}
	delete(p.tenants, name)
}

// ask runs an operation on the worker. A Fault comes back as an error.
func (c *incarnation) ask(ctx context.Context, t *http.Transport, op string, header map[string]string, body []byte, answer any) error {
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, "http://worker/", bytes.NewReader(body))
	if err != nil {
		return err
	}
	req.Header.Set(worker.HeaderControl, op)
	for name, value := range header {
		req.Header.Set(name, value)
	}
	resp, err := t.RoundTrip(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	limited := io.LimitReader(resp.Body, 1<<20)
	if resp.Header.Get(worker.HeaderFault) != "" {
		fault := &worker.Fault{}
		if err := json.NewDecoder(limited).Decode(fault); err != nil {
			return fmt.Errorf("read the worker's answer: %w", err)
		}
		return fault
	}
	if answer == nil {
		return nil
	}
	if err := json.NewDecoder(limited).Decode(answer); err != nil {
		return fmt.Errorf("read the worker's answer: %w", err)
	}
	_, _ = io.Copy(io.Discard, limited) // lets the connection be used again
	return nil
}

// askAlive asks for a sign of life, giving up when the process ends.
func (c *incarnation) askAlive(ctx context.Context) (worker.Pong, error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	go func() {
		select {
		case <-c.dead:
			cancel()
		case <-ctx.Done():
		}
	}()
	var pong worker.Pong
	err := c.ask(ctx, c.ping, worker.OpPing, nil, nil, &pong)
	return pong, err
}

// serve loads what the worker should have and watches it, until it dies or
// ctx ends.
func (p *process) serve(ctx context.Context, c *incarnation) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	var group sync.WaitGroup
	for range loaders {
		group.Go(func() { p.loadAll(ctx, c) })
	}
	group.Go(func() { p.watchMemory(ctx, c) })
	group.Go(func() { p.watchSilence(ctx, c) })
	select {
	case <-c.dead:
	case <-ctx.Done():
	}
	cancel()
	group.Wait()
}

// bury ends what is left of an incarnation and says how it ended.
func (p *process) bury(c *incarnation) error {
	_ = c.lifeline.Close() // a worker that still runs takes this for its end
	t := time.NewTimer(stopGrace)
	select {
	case <-c.dead:
	case <-t.C:
		c.kill("stop")
		<-c.dead
	}
	t.Stop()
	c.cleanup()
	p.mu.Lock()
	p.current, p.rss = nil, 0
	revisions := make([]*revision, 0, len(p.revisions))
	for r := range p.revisions {
		revisions = append(revisions, r)
	}
	p.mu.Unlock()
	for _, r := range revisions {
		r.lost(c)
	}
	p.engine.bump()
	return errors.New(c.command.ProcessState.String())
}

// watchMemory kills a worker that is too big. It waits for nothing else: a
// worker that takes seconds to answer can grow by gigabytes meanwhile.
func (p *process) watchMemory(ctx context.Context, c *incarnation) {
	tick := time.NewTicker(watchInterval)
	defer tick.Stop()
	for {
		select {
		case <-tick.C:
		case <-ctx.Done():
			return
		}
		rss, err := residentBytes(c.pid)
		if err != nil {
			continue // it has ended
		}
		p.mu.Lock()
		p.rss = rss
		p.mu.Unlock()
		if rss > p.engine.rssLimit {
			p.engine.logger.Warn("worker uses too much memory", "worker", p.id, "tenant", p.tenant, "rss", rss, "limit", p.engine.rssLimit)
			c.kill("memory")
			return
		}
	}
}

// watchSilence kills a worker that does not answer. One that is starved by other
// programs gets twice the time at each turn, up to silenceMost.
func (p *process) watchSilence(ctx context.Context, c *incarnation) {
	tick := time.NewTicker(watchInterval)
	defer tick.Stop()
	starved := 0 // times in a row
	for {
		select {
		case <-tick.C:
		case <-ctx.Done():
			return
		}
		limit := min(silenceLimit<<starved+time.Duration(c.inFlight.Load())*silencePerRequest, silenceMost)
		asked := time.Now()
		// Not before an answer is late: it means reading files.
		queued := make(chan time.Duration, 1)
		slow := time.AfterFunc(limit/4, func() { queued <- runQueueTime(c.pid) })
		askCtx, cancel := context.WithTimeout(ctx, limit)
		_, err := c.askAlive(askCtx)
		silent := errors.Is(askCtx.Err(), context.DeadlineExceeded)
		cancel()
		if slow.Stop() {
			queued <- 0
		}
		if err == nil || !silent || ctx.Err() != nil {
			starved = 0
			continue
		}
		if late := time.Since(asked) - limit; late > ownDelayMost {
			// It was this process that stood still, frozen or starved, and
			// the answer may have been there all the time.
			p.engine.logger.Warn("engine stood still, its worker is asked again", "worker", p.id, "tenant", p.tenant, "for", late)
			continue
		}
		if waited := runQueueTime(c.pid) - <-queued; waited > limit/2 && limit < silenceMost {
			// It had something to say and no processor to say it on.
			starved++
			p.engine.logger.Warn("worker waits for a processor, it is asked again", "worker", p.id, "tenant", p.tenant, "for", limit, "waited", waited)
			continue
		}
		p.engine.logger.Warn("worker is silent", "worker", p.id, "tenant", p.tenant, "for", limit)
		c.kill("silent")
		return
	}
}

// runQueueTime is how long the threads of a process together have waited for a
// processor (sched-stats, /proc/PID/task/TID/schedstat); 0 where the kernel does
// not say. Threads that ended are not counted.
func runQueueTime(pid int) (waited time.Duration) {
	threads, err := filepath.Glob("/proc/" + strconv.Itoa(pid) + "/task/*/schedstat")
	if err != nil {
		return 0
	}
	for _, path := range threads {
		b, err := os.ReadFile(path)
		if err != nil {
			continue // it ended
		}
		if fields := strings.Fields(string(b)); len(fields) > 1 {
			if ns, err := strconv.ParseInt(fields[1], 10, 64); err == nil {
				waited += time.Duration(ns)
			}
		}
	}
	return waited
}

// residentBytes reads a process's resident memory (proc(5), statm).
func residentBytes(pid int) (uint64, error) {
	b, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/statm")
	if err != nil {
		return 0, err
	}
	fields := strings.Fields(string(b))
	if len(fields) < 2 {
		return 0, fmt.Errorf("read statm: %q", b)
	}
	pages, err := strconv.ParseUint(fields[1], 10, 64)
	return pages * uint64(os.Getpagesize()), err
}

// loadAll loads revisions one after the other as they are wanted.
func (p *process) loadAll(ctx context.Context, c *incarnation) {
	for {
		p.mu.Lock()
		changed := p.changed
		p.mu.Unlock()
		r, pause := p.nextLoad(c)
		if r != nil {
			p.load(ctx, c, r)
			continue
		}
		var retry <-chan time.Time
		if pause > 0 {
			retry = time.After(pause)
		}
		select {
		case <-changed:
		case <-retry:
		case <-ctx.Done():
			return
		}
	}
}

// nextLoad picks a revision to load, ones that serve first, or says when to
// look again.
func (p *process) nextLoad(c *incarnation) (next *revision, pause time.Duration) {
	p.mu.Lock()
	defer p.mu.Unlock()
	now := time.Now()
	if c.isDead() {
		return nil, 0
	}
	for r := range p.revisions {
		r.mu.Lock()
		due := r.conn == nil && !r.loading && !r.retired && r.failure == nil
		wait := r.notUntil.Sub(now)
		r.mu.Unlock()
		switch serving := r.function.serving.Load() == r; {
		case !due:
		case wait > 0:
			if pause == 0 || wait < pause {
				pause = wait
			}
		case next == nil || serving:
			next = r
		}
	}
	if next != nil {
		next.mu.Lock()
		next.loading = true
		next.mu.Unlock()
	}
	return next, pause
}

func (p *process) load(ctx context.Context, c *incarnation, r *revision) {
	body, err := json.Marshal(worker.Spec{
		Key: r.key, Name: r.spec.Name, Revision: r.spec.Revision, ObjectDir: r.spec.ObjectDir,
		MemoryMiB: r.spec.MemoryMiB, Env: r.spec.Env, Secrets: r.spec.Secrets,
	})
	var loaded worker.Loaded
	if err == nil {
		loadCtx, cancel := context.WithTimeout(ctx, loadLimit)
		err = c.ask(loadCtx, c.client, worker.OpLoad, nil, body, &loaded)
		cancel()
	}
	var fault *worker.Fault
	result := "ok"
	r.mu.Lock()
	r.loading = false
	switch {
	case err == nil:
		r.conn, r.progress, r.phases, r.crashes = c, v1alpha1.ProgressReady, loaded.Phases, 0
	case errors.As(err, &fault) && fault.Retryable:
		result = "failed"
		r.notUntil = time.Now().Add(loadRetry)
	case errors.As(err, &fault):
		result = "unusable"
		r.progress = v1alpha1.ProgressFailed
		r.failure = &v1alpha1.FunctionError{Code: fault.Code, Detail: fault.Detail}
	case ctx.Err() != nil && !c.isDead():
		r.broadcast() // stopped by us
		r.mu.Unlock()
		return
	default:
		result = "crashed"
		if r.crashes++; r.crashes >= crashesPerLoad {
			r.progress = v1alpha1.ProgressFailed
			r.failure = &v1alpha1.FunctionError{
				Code:   control.ErrorWorkerFailed,
				Detail: fmt.Sprintf("the worker ended %d times while it loaded the function", r.crashes),
			}
		}
	}
	r.broadcast()
	r.mu.Unlock()
	p.engine.metrics.loads.WithLabelValues(result).Inc()
	for _, phase := range loaded.Phases {
		if phase.Name == "load" || phase.Name == "instantiate" { // bounds the label
			p.engine.metrics.loadPhases.WithLabelValues(phase.Name).Observe(phase.Milliseconds / 1000)
		}
	}
	if err != nil {
		p.engine.logger.Warn("function not loaded", "function", r.spec.Name, "revision", r.spec.Revision, "error", err)
		if result == "crashed" && !c.isDead() {
			// It answers nothing any more, or took a minute: let the
			// supervisor decide, and do not ask again meanwhile.
			select {
			case <-c.dead:
			case <-time.After(watchInterval):
			case <-ctx.Done():
			}
		}
	}
	p.engine.loaded(r)
}

// forget unloads a retired revision once its requests are over.
func (p *process) forget(r *revision) {
	<-r.drained
	r.mu.Lock()
	for r.loading {
		changed := r.changed
		r.mu.Unlock()
		<-changed
		r.mu.Lock()
	}
	c := r.conn
	r.mu.Unlock()
	if c != nil && !c.isDead() {
		ctx, cancel := context.WithTimeout(context.Background(), unloadLimit)
		// A worker that cannot unload is about to end, with all it has loaded.
		_ = c.ask(ctx, c.client, worker.OpUnload, map[string]string{worker.HeaderKey: r.key}, nil, nil)
		cancel()
	}
	p.mu.Lock()
	delete(p.revisions, r)
	p.mu.Unlock()
	// What the function said last may still be in the log pipe.
	time.AfterFunc(lateLogs, func() { p.forgetTenant(r.spec.Name) })
	p.engine.retireProcess(p)
}

// stop ends the worker for good.
func (p *process) stop() {
	p.setState(control.WorkerStopping)
	p.cancel()
	<-p.done
}

func (p *process) status() control.WorkerStatus {
	p.mu.Lock()
	defer p.mu.Unlock()
	s := control.WorkerStatus{
		ID: p.id, Tenant: p.tenant, RSSBytes: p.rss, Restarts: p.restarts,
		Since: p.since, State: p.state, LastExit: p.lastExit,
	}
	if p.current != nil {
		s.PID = p.current.pid
	}
	for r := range p.revisions {
		r.mu.Lock()
		if r.conn != nil {
			s.Functions++
		}
		r.mu.Unlock()
	}
	return s
}
