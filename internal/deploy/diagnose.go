package deploy

import (
	"cmp"
	"fmt"
	"regexp"
	"slices"
	"strings"
	"unicode"
	"unicode/utf8"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"

	"github.com/hearth-sh/hearth/api/v1alpha1"
)

// maxExcerpt bounds what is quoted of a registry, a shim or a scheduler, in
// bytes.
const maxExcerpt = 500

// maxWords bounds what is read of them at all. Kubernetes keeps less.
const maxWords = 8 << 10

func clip(s string) string { return s[:min(len(s), maxWords)] }

// crashesToGiveUp is how often a container may end before its revision has
// failed. Not the first time: two shims that compile at the same moment on one
// node disturb each other, and a restart heals that.
const crashesToGiveUp = 3

// shimGaveUp is the exit code of shims made with runwasi whose module cannot be
// loaded or traps. Their words go to containerd's log and nowhere else: no
// termination message, no container log. (The kernel's kill for memory has the
// same code and, unlike this, the reason OOMKilled.)
const shimGaveUp = 137

// failure is why pods of a revision do not come up.
type failure struct {
	v1alpha1.FunctionError
	// terminal: waiting will not help.
	terminal bool
}

func failed(terminal bool, code, format string, args ...any) *failure {
	return &failure{FunctionError: v1alpha1.FunctionError{Code: code, Detail: fmt.Sprintf(format, args...)}, terminal: terminal}
}

// evidence is what the cluster says of a rollout.
type evidence struct {
	deployment *appsv1.Deployment
	// pods are those of the revision that is rolled out.
	pods []corev1.Pod
	// events of a pod, oldest first; logs are the last words of its container,
	// and false where they cannot be had at this moment.
	events func(pod *corev1.Pod) []corev1.Event
	logs   func(pod *corev1.Pod) (string, bool)
}

// diagnose returns the best explanation there is, nil for none. What nothing
// can heal comes before what may pass, and pods before the Deployment.
func diagnose(e evidence) *failure {
	var found []*failure
	for i := range e.pods {
		if f := e.pod(&e.pods[i]); f != nil {
			found = append(found, f)
		}
	}
	if d := e.deployment; d != nil {
		for _, c := range d.Status.Conditions {
			if c.Type == appsv1.DeploymentReplicaFailure && c.Status == corev1.ConditionTrue {
				found = append(found, refusedPods(c.Message))
			}
		}
	}
	if len(found) == 0 {
		return nil
	}
	return slices.MinFunc(found, func(a, b *failure) int {
		if a.terminal != b.terminal {
			if a.terminal {
				return -1
			}
			return 1
		}
		return cmp.Compare(vagueness(a.Code), vagueness(b.Code))
	})
}

// vagueness orders codes: a pod that merely is not ready explains less than
// one whose image cannot be had.
func vagueness(code string) int {
	switch code {
	case CodeNotReady:
		return 2
	case CodeUnschedulable:
		return 1
	}
	return 0
}

// refusedPods reads why no pod could be created (a ReplicaSet's message).
func refusedPods(message string) *failure {
	switch {
	case strings.Contains(message, "RuntimeClass") && strings.Contains(message, "not found"):
		return failed(true, CodeRuntimeMissing, "the cluster does not have the RuntimeClass that the executor names; install the chart with runtimeClasses, or name another one: %s", excerpt(message))
	case strings.Contains(message, "exceeded quota") || strings.Contains(message, "failed quota"):
		return failed(false, CodeQuota, "the namespace's ResourceQuota does not allow another pod; raise it or lower the function's memory: %s", excerpt(message))
	}
	return failed(false, CodePodRefused, "the cluster refuses the function's pods: %s", excerpt(message))
}

func (e evidence) pod(p *corev1.Pod) *failure {
	if p.DeletionTimestamp != nil || ready(p) {
		return nil
	}
	if p.Spec.NodeName == "" {
		for _, c := range p.Status.Conditions {
			if c.Type == corev1.PodScheduled && c.Status == corev1.ConditionFalse {
				return failed(false, CodeUnschedulable, "no node takes the pod: %s; pods of Wasm go only to nodes that have proven the runtime", excerpt(c.Message))
			}
		}
		return nil
	}
	if p.Status.Phase == corev1.PodFailed {
		if p.Status.Reason == "" {
			return nil
		}
		return failed(false, CodePodRefused, "node %s ended the pod (%s): %s", p.Spec.NodeName, p.Status.Reason, excerpt(p.Status.Message))
	}
	for _, s := range p.Status.ContainerStatuses {
		if f := e.container(p, s); f != nil {
			return f
		}
	}
	// What happens before there is a container is told by events alone.
	events := e.events(p)
	for i := len(events) - 1; i >= 0; i-- {
		switch ev := events[i]; ev.Reason {
		case "FailedCreatePodSandBox":
			return sandboxFailure(p.Spec.NodeName, ev.Message)
		case "FailedMount", "FailedAttachVolume":
			return failed(false, CodeContainerRefused, "node %s cannot mount what the pod needs: %s", p.Spec.NodeName, excerpt(ev.Message))
		case "Failed", "FailedCreate":
			return containerFailure(p.Spec.NodeName, ev.Message, false)
		case "Unhealthy":
			return failed(false, CodeNotReady, "the function runs on node %s and does not answer its health check: %s", p.Spec.NodeName, excerpt(ev.Message))
		}
	}
	return nil
}

// goneLogs begin the kubelet's answers, sent as if they were the log, where the
// container or its log file was removed since its state was told.
var goneLogs = []string{
	"unable to retrieve container logs for ",
	"failed to try resolving symlinks in path ", // cri-client, pkg/logs
	"failed to open log file ",
}

func logsGone(words string) bool {
	return slices.ContainsFunc(goneLogs, func(prefix string) bool { return strings.HasPrefix(words, prefix) })
}

// noHandler is containerd's answer where a node has no such runtime handler.
var noHandler = regexp.MustCompile(`no runtime for "?([^"\s]+)"? is configured`)

func sandboxFailure(node, message string) *failure {
	message = clip(message)
	if m := noHandler.FindStringSubmatch(message); m != nil {
		return failed(true, CodeRuntimeMissing, "node %s cannot run Wasm: containerd has no runtime %q there; install containerd-shim-%s on it, or use a RuntimeClass that keeps pods away from it (%s does)", node, m[1], m[1], DefaultRuntimeClass)
	}
	if strings.Contains(message, "runtime") && (strings.Contains(message, "executable file not found") || strings.Contains(message, "no such file or directory") && strings.Contains(message, "containerd-shim")) {
		return failed(true, CodeRuntimeMissing, "node %s has the runtime configured and its shim missing: %s", node, excerpt(message))
	}
	return failed(false, CodeContainerRefused, "node %s cannot start the pod: %s", node, excerpt(message))
}

func (e evidence) container(p *corev1.Pod, s corev1.ContainerStatus) *failure {
	node := p.Spec.NodeName
	if w := s.State.Waiting; w != nil {
		switch w.Reason {
		case "ErrImagePull", "ImagePullBackOff", "ErrImageNeverPull", "RegistryUnavailable", "SignatureValidationFailed":
			return pullFailure(node, e.pullMessage(p, w))
		case "InvalidImageName":
			return failed(true, CodeImagePull, "node %s cannot read the image's name: %s", node, excerpt(w.Message))
		case "CreateContainerConfigError":
			return failed(false, CodeContainerRefused, "node %s cannot make the container: %s", node, excerpt(w.Message))
		case "CreateContainerError", "RunContainerError", "StartError":
			return containerFailure(node, w.Message, s.RestartCount >= crashesToGiveUp)
		}
	}
	end := s.State.Terminated
	if end == nil {
		end = s.LastTerminationState.Terminated
	}
	if end == nil || end.ExitCode == 0 && s.State.Running != nil {
		return nil
	}
	again := s.RestartCount >= crashesToGiveUp
	if end.Reason == "OOMKilled" {
		return failed(again, CodeOutOfMemory, "the pod took more memory than its limit on node %s and was killed; raise the function's memory or lower its concurrency", node)
	}
	words := strings.TrimSpace(end.Message)
	if words == "" {
		said, known := e.logs(p)
		words = strings.TrimSpace(said)
		// What is given up keeps its reason for good: rather look again.
		again = again && known
	}
	if words == "" && end.ExitCode == shimGaveUp {
		return failed(again, CodeCrashed, "the shim on node %s ended the function with exit code %d and said nothing, which is how it ends when it cannot load or start the module: often an import that it does not have, because containerd-shim-spin is older than what built the module; upgrade the shim, or read its words in the node's containerd log", node, end.ExitCode)
	}
	if words == "" {
		return failed(again, CodeCrashed, "the function's process ended on node %s with exit code %d and said nothing; see the node's containerd log, where the shim writes", node, end.ExitCode)
	}
	f := containerFailure(node, words, again)
	if f.Code == CodeContainerRefused && end.Reason != "StartError" {
		return failed(again, CodeCrashed, "the function's process ended on node %s with exit code %d: %s", node, end.ExitCode, excerpt(words))
	}
	return f
}

// pullMessage is the registry's answer. While the node backs off, it is in the
// message only where the kubelet is recent, and in an event always.
func (e evidence) pullMessage(p *corev1.Pod, w *corev1.ContainerStateWaiting) string {
	if w.Reason != "ImagePullBackOff" || strings.Contains(w.Message, ": ErrImagePull: ") {
		return w.Message
	}
	events := e.events(p)
	for i := len(events) - 1; i >= 0; i-- {
		if events[i].Reason == "Failed" && strings.Contains(events[i].Message, "Failed to pull") {
			return events[i].Message
		}
	}
	return w.Message
}

func pullFailure(node, message string) *failure {
	message = clip(message)
	lower := strings.ToLower(message)
	words := pullWords(message)
	switch {
	case strings.Contains(lower, "no match for platform"):
		return failed(true, CodeWrongArchitecture, "the image has nothing for node %s's processor; publish Wasm, which has architecture wasm: %s", node, words)
	case strings.Contains(lower, "not found") || strings.Contains(lower, "manifest unknown") || strings.Contains(lower, "name unknown"):
		return failed(true, CodeImagePull, "node %s cannot pull the image, because the registry does not have it: %s", node, words)
	case strings.Contains(lower, "401") || strings.Contains(lower, "403") || strings.Contains(lower, "unauthorized") || strings.Contains(lower, "denied") || strings.Contains(lower, "no basic auth"):
		return failed(false, CodeImagePull, "node %s may not pull the image; give its role or the executor's pull secret access to the repository: %s", node, words)
	}
	return failed(false, CodeImagePull, "node %s cannot pull the image: %s", node, words)
}

// pullNoise is what kubelet and containerd put before the registry's answer.
var pullNoise = regexp.MustCompile(`^(?:Back-off pulling image "[^"]*": |ErrImagePull: |Failed to pull image "[^"]*": |rpc error: code = \w+ desc = |failed to pull and unpack image "[^"]*": |failed to resolve (?:reference|image)(?: "[^"]*")?: )`)

func pullWords(message string) string {
	for {
		short := pullNoise.ReplaceAllString(message, "")
		if short == message {
			return excerpt(message)
		}
		message = short
	}
}

// Words of the kernel (exec of a foreign binary), of Wasmtime's linker, and of
// spin-componentize and spin's trigger about modules they cannot serve.
var (
	foreign = regexp.MustCompile(`(?i)exec format error|no match for platform|cannot execute binary file|wrong architecture`)
	imports = regexp.MustCompile(`(?i)unknown import|matching implementation was not found in the linker|component imports (?:instance|resource|function|type)|import .* (?:not found|has the wrong type|was not defined)|incompatible import type|unresolved import|failed to find .*import`)
	oldShim = regexp.MustCompile(`(?i)expected AOT compiled component|unsupported spin_lock_version|unknown host requirement|host requirement.*not supported|unsupported component format|unknown wit-bindgen|invalid (?:WASM|wasm) (?:module|component) version|unsupported trigger type|doesn't export|no (?:supported )?handler`)
)

// containerFailure reads what shim and runtime say of a container that could
// not be made or started.
func containerFailure(node, message string, terminal bool) *failure {
	message = clip(message)
	words := shimWords(message)
	switch {
	case foreign.MatchString(message):
		return failed(true, CodeWrongArchitecture, "the image is for another processor than node %s has; publish Wasm instead of a native program: %s", node, words)
	case imports.MatchString(message):
		return failed(true, CodeMissingImport, "the shim on node %s does not have what the module imports; build it for an older Spin, or upgrade containerd-shim-spin: %s", node, words)
	case oldShim.MatchString(message):
		return failed(true, CodeMissingImport, "the shim on node %s cannot serve this module, which often means that the shim is too old for the tool that built it; upgrade containerd-shim-spin: %s", node, words)
	case noHandler.MatchString(message):
		return sandboxFailure(node, message)
	}
	return failed(terminal, CodeContainerRefused, "node %s cannot start the container: %s", node, words)
}

// shimNoise is what kubelet and containerd put before the shim's words.
var shimNoise = regexp.MustCompile(`^(?:Error: |failed to (?:create|start) containerd (?:task|container): |failed to create shim task: |failed to start container "[^"]*": |error during container (?:init|start): |rpc error: code = \w+ desc = |failed to generate container "[^"]*" spec: |Others?\("|others?: |Internal error: |unknown: )`)

func shimWords(message string) string {
	message = strings.TrimSpace(message)
	for {
		short := shimNoise.ReplaceAllString(message, "")
		if short == message {
			break
		}
		message = short
	}
	return excerpt(strings.TrimSuffix(strings.TrimSuffix(message, ": unknown"), `")`))
}

// excerpt makes one line of at most maxExcerpt bytes of words that come from
// outside, without control characters.
func excerpt(s string) string {
	s = strings.Map(func(r rune) rune {
		switch {
		case unicode.IsSpace(r):
			return ' '
		case unicode.IsControl(r) || r == utf8.RuneError:
			return -1
		}
		return r
	}, clip(s))
	s = strings.Join(strings.Fields(s), " ")
	if len(s) <= maxExcerpt {
		return strings.TrimRight(s, ".")
	}
	s = s[:maxExcerpt]
	for !utf8.ValidString(s) { // cut within a character
		s = s[:len(s)-1]
	}
	return s + "…"
}

// ready says whether a pod takes traffic.
func ready(p *corev1.Pod) bool {
	for _, c := range p.Status.Conditions {
		if c.Type == corev1.PodReady {
			return c.Status == corev1.ConditionTrue
		}
	}
	return false
}
