package deploy

import (
	"strings"
	"testing"
	"time"
	"unicode/utf8"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"

	"github.com/hearth-sh/hearth/api/v1alpha1"
	"github.com/hearth-sh/hearth/internal/kube"
)

// TestReasons holds the words of kubelet, containerd, registries, schedulers
// and shims against what is made of them. The messages are as these programs
// write them; those that a bench can produce are in the tests on a real cluster.
func TestReasons(t *testing.T) {
	waiting := func(reason, message string, restarts int32) corev1.Pod {
		return corev1.Pod{Spec: corev1.PodSpec{NodeName: "n1"}, Status: corev1.PodStatus{ContainerStatuses: []corev1.ContainerStatus{{
			RestartCount: restarts, State: corev1.ContainerState{Waiting: &corev1.ContainerStateWaiting{Reason: reason, Message: message}},
		}}}}
	}
	crashed := func(restarts int32, end corev1.ContainerStateTerminated) corev1.Pod {
		p := waiting("CrashLoopBackOff", "back-off 10s restarting failed container=app", restarts)
		p.Status.ContainerStatuses[0].LastTerminationState.Terminated = &end
		return p
	}
	creating := waiting("ContainerCreating", "", 0)
	unready := corev1.Pod{Spec: corev1.PodSpec{NodeName: "n1"}, Status: corev1.PodStatus{ContainerStatuses: []corev1.ContainerStatus{{State: corev1.ContainerState{Running: &corev1.ContainerStateRunning{}}}}}}
	event := func(reason, message string) []corev1.Event {
		return []corev1.Event{{Reason: "FailedScheduling", Message: "earlier"}, {Reason: reason, Message: message}}
	}
	refused := func(message string) *appsv1.Deployment {
		return &appsv1.Deployment{Status: appsv1.DeploymentStatus{Conditions: []appsv1.DeploymentCondition{{Type: appsv1.DeploymentReplicaFailure, Status: corev1.ConditionTrue, Reason: "FailedCreate", Message: message}}}}
	}
	pod := func(p corev1.Pod) []corev1.Pod { return []corev1.Pod{p} }

	for name, tt := range map[string]struct {
		pods       []corev1.Pod
		deployment *appsv1.Deployment
		events     []corev1.Event
		logs       string
		unread     bool // the logs cannot be had
		code       string
		terminal   bool
		words      string
		never      string
	}{
		"nothing is wrong yet": {pods: pod(creating)},
		"a node without the shim": {pods: pod(creating), events: event("FailedCreatePodSandBox", `Failed to create pod sandbox: rpc error: code = Unknown desc = failed to get sandbox runtime: no runtime for "spin" is configured`),
			code: CodeRuntimeMissing, terminal: true, words: "install containerd-shim-spin"},
		"a handler without its binary": {pods: pod(creating), events: event("FailedCreatePodSandBox", `Failed to create pod sandbox: rpc error: code = Unknown desc = failed to start sandbox "1": failed to create containerd task: failed to start shim: failed to resolve runtime path: runtime "io.containerd.spin.v2" binary not installed "containerd-shim-spin-v2": file does not exist: executable file not found in $PATH`),
			code: CodeRuntimeMissing, terminal: true, words: "its shim missing"},
		"no network": {pods: pod(creating), events: event("FailedCreatePodSandBox", `plugin type="flannel" failed (add): open /run/flannel/subnet.env: no such file or directory`),
			code: CodeContainerRefused, words: "flannel"},
		"a volume that is not there": {pods: pod(creating), events: event("FailedMount", `MountVolume.SetUp failed for volume "x" : secret "x" not found`), code: CodeContainerRefused, words: `secret "x" not found`},
		"a native program for another processor": {pods: pod(crashed(1, corev1.ContainerStateTerminated{ExitCode: 255, Reason: "Error"})), logs: "exec /app: exec format error",
			code: CodeWrongArchitecture, terminal: true, words: "another processor"},
		"an index without this platform": {pods: pod(waiting("ErrImagePull", `failed to pull and unpack image "r.example/a:1": no match for platform in manifest: not found`, 0)), code: CodeWrongArchitecture, terminal: true, words: "no match for platform"},
		"an import that Spin's linker lacks": {pods: pod(waiting("RunContainerError", `failed to create containerd task: failed to create shim task: Others("component imports instance `+"`wasi:http/types@0.2.10`"+`, but a matching implementation was not found in the linker"): unknown`, 1)),
			code: CodeMissingImport, terminal: true, words: "does not have what the module imports"},
		"an import told by the log":              {pods: pod(crashed(1, corev1.ContainerStateTerminated{ExitCode: 137, Reason: "Error"})), logs: "Error: unknown import: `env::now` has not been defined", code: CodeMissingImport, terminal: true, words: "env::now"},
		"a shim too old for the app":             {pods: pod(crashed(1, corev1.ContainerStateTerminated{ExitCode: 137, Reason: "Error", Message: "expected AOT compiled component but found other data"})), code: CodeMissingImport, terminal: true, words: "too old"},
		"a crash once, which a restart may heal": {pods: pod(crashed(1, corev1.ContainerStateTerminated{ExitCode: 1, Reason: "Error", Message: "boom"})), code: CodeCrashed, words: "exit code 1: boom", never: "CrashLoopBackOff"},
		"a crash again and again":                {pods: pod(crashed(3, corev1.ContainerStateTerminated{ExitCode: 1, Reason: "Error", Message: "boom"})), code: CodeCrashed, terminal: true, words: "boom", never: "CrashLoopBackOff"},
		"a crash without a word":                 {pods: pod(crashed(3, corev1.ContainerStateTerminated{ExitCode: 2, Reason: "Error"})), code: CodeCrashed, terminal: true, words: "exit code 2 and said nothing", never: "CrashLoopBackOff"},
		"a crash whose words are not there yet":  {pods: pod(crashed(3, corev1.ContainerStateTerminated{ExitCode: 2, Reason: "Error"})), unread: true, code: CodeCrashed, words: "exit code 2"},
		"a shim that gave up without a word":     {pods: pod(crashed(3, corev1.ContainerStateTerminated{ExitCode: 137, Reason: "Error"})), code: CodeCrashed, terminal: true, words: "containerd-shim-spin is older than what built the module", never: "CrashLoopBackOff"},
		"too little memory":                      {pods: pod(crashed(3, corev1.ContainerStateTerminated{ExitCode: 137, Reason: "OOMKilled"})), code: CodeOutOfMemory, terminal: true, words: "raise the function's memory"},
		"an image that is gone": {pods: pod(waiting("ErrImagePull", `failed to pull and unpack image "r.example/a@sha256:1": failed to resolve reference "r.example/a@sha256:1": r.example/a@sha256:1: not found`, 0)),
			code: CodeImagePull, terminal: true, words: "the registry does not have it: r.example/a@sha256:1: not found"},
		"a registry that refuses": {pods: pod(waiting("ImagePullBackOff", `Back-off pulling image "r.example/a:1": ErrImagePull: failed to pull and unpack image "r.example/a:1": failed to resolve reference "r.example/a:1": pull access denied, repository does not exist or may require authorization: authorization failed: no basic auth credentials`, 0)),
			code: CodeImagePull, words: "may not pull the image", never: "Back-off"},
		"a registry that is away, by the event of an older kubelet": {pods: pod(waiting("ImagePullBackOff", `Back-off pulling image "r.example/a:1"`, 0)), events: event("Failed", `Failed to pull image "r.example/a:1": rpc error: code = Unknown desc = failed to do request: Head "https://r.example/v2/": dial tcp: connection refused`),
			code: CodeImagePull, words: "cannot pull the image: failed to do request", never: "rpc error"},
		"a name that is none":     {pods: pod(waiting("InvalidImageName", `couldn't parse image name "A"`, 0)), code: CodeImagePull, terminal: true, words: "image's name"},
		"a missing secret":        {pods: pod(waiting("CreateContainerConfigError", `secret "x" not found`, 0)), code: CodeContainerRefused, words: `secret "x" not found`},
		"what containerd refuses": {pods: pod(waiting("CreateContainerError", `failed to generate container "1" spec: no command specified`, 0)), code: CodeContainerRefused, words: "no command specified", never: "failed to generate"},
		"no room": {pods: pod(corev1.Pod{Status: corev1.PodStatus{Conditions: []corev1.PodCondition{{Type: corev1.PodScheduled, Status: corev1.ConditionFalse, Reason: "Unschedulable", Message: "0/3 nodes are available: 3 Insufficient memory."}}}}),
			code: CodeUnschedulable, words: "3 Insufficient memory"},
		"a pod that the node refused":    {pods: pod(corev1.Pod{Spec: corev1.PodSpec{NodeName: "n1"}, Status: corev1.PodStatus{Phase: corev1.PodFailed, Reason: "OutOfcpu", Message: "Pod was rejected"}}), code: CodePodRefused, words: "OutOfcpu"},
		"a pod that does not answer":     {pods: pod(unready), events: event("Unhealthy", "Readiness probe failed: HTTP probe failed with statuscode: 500"), code: CodeNotReady, words: "statuscode: 500"},
		"a quota":                        {deployment: refused(`pods "a-1" is forbidden: exceeded quota: q, requested: pods=1, used: pods=1, limited: pods=1`), code: CodeQuota, words: "ResourceQuota"},
		"a policy":                       {deployment: refused(`pods "a-1" is forbidden: violates PodSecurity "restricted:latest": runAsNonRoot != true`), code: CodePodRefused, words: "PodSecurity"},
		"no such class":                  {deployment: refused(`pods "a-1" is forbidden: pod rejected: RuntimeClass "x" not found`), code: CodeRuntimeMissing, terminal: true, words: "RuntimeClass"},
		"what nothing heals comes first": {pods: []corev1.Pod{waiting("CreateContainerConfigError", "x", 0), waiting("InvalidImageName", "y", 0)}, code: CodeImagePull, terminal: true, words: "y"},
	} {
		t.Run(name, func(t *testing.T) {
			f := diagnose(evidence{deployment: tt.deployment, pods: tt.pods,
				events: func(*corev1.Pod) []corev1.Event { return tt.events }, logs: func(*corev1.Pod) (string, bool) { return tt.logs, !tt.unread }})
			if f == nil {
				if tt.code != "" {
					t.Error("nothing found")
				}
				return
			}
			if f.Code != tt.code || f.terminal != tt.terminal || !strings.Contains(f.Detail, tt.words) || tt.never != "" && strings.Contains(f.Detail, tt.never) {
				t.Errorf("%s (terminal %t): %s", f.Code, f.terminal, f.Detail)
			}
		})
	}
}

func FuzzExcerptsAreOneBoundedLine(f *testing.F) {
	f.Add("Others(\"x\n\x1b[31m\"): unknown")
	f.Add(strings.Repeat("ä", 600))
	f.Fuzz(func(t *testing.T, s string) {
		for _, got := range []string{excerpt(s), containerFailure("n", s, true).Detail, pullFailure("n", s).Detail, sandboxFailure("n", s).Detail} {
			if strings.ContainsAny(got, "\n\r\x00\x1b") || len(got) > maxExcerpt+300 || !utf8.ValidString(got) {
				t.Errorf("%q", got)
			}
		}
	})
}

func TestAnOutageDoesNotMakeARevisionOneThatNeverAnswered(t *testing.T) {
	began := time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
	before, after := began.Add(-time.Hour), began.Add(time.Minute)
	f := &kube.Function{Status: v1alpha1.FunctionStatus{History: []v1alpha1.RevisionStatus{
		{Revision: 1, ActivatedAt: &before}, {Revision: 2, ActivatedAt: &after}, {Revision: 3},
	}}}
	for revision, want := range map[int]bool{
		1: false, // before, in an earlier rollout: this one may fail
		2: true, 3: false, 4: false,
	} {
		if got := answeredSince(f, revision, began); got != want {
			t.Errorf("revision %d: %t", revision, got)
		}
	}
}

func TestTheKubeletsWordsAboutALogThatIsGoneAreNotTheFunctions(t *testing.T) {
	for words, gone := range map[string]bool{
		"unable to retrieve container logs for containerd://0f": true,
		`failed to try resolving symlinks in path "/var/log/pods/team_fn_1/fn/2.log": lstat /var/log/pods/team_fn_1/fn/2.log: no such file or directory`: true,
		`failed to open log file "/var/log/pods/team_fn_1/fn/2.log": no such file or directory`:                                                          true,
		"failed to open my own file": false, "": false,
	} {
		if got := logsGone(words); got != gone {
			t.Errorf("%q: %t", words, got)
		}
	}
}
