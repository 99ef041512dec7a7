package functions_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/google/go-containerregistry/pkg/authn"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"github.com/hearth-sh/hearth/test/chart"
)

// The registry of these tests wants a password of everybody. Only the Secret
// that the chart is told of has it.
const (
	registrySecret = "functions-registry"
	// credentialsFile is where the chart puts it.
	credentialsFile = "/etc/hearth/registry/config.json"
)

// login is what the registry wants now. A test that is over before those that
// run beside each other changes it.
var login = authn.Basic{Username: "hearth", Password: "the-first-sesame"}

// credentials writes the Secret as `kubectl create secret docker-registry` does.
func credentials(ctx context.Context) error {
	config, err := json.Marshal(map[string]any{"auths": map[string]any{
		registry.Host: map[string]string{"username": login.Username, "password": login.Password},
	}})
	if err != nil {
		return err
	}
	text, err := json.Marshal(string(config))
	if err != nil {
		return err
	}
	_, err = bench.ApplyManifest(ctx, fmt.Appendf(nil, `apiVersion: v1
kind: Namespace
metadata: {name: %[1]s}
---
apiVersion: v1
kind: Secret
type: kubernetes.io/dockerconfigjson
metadata: {name: %[2]s, namespace: %[1]s}
stringData: {.dockerconfigjson: %[3]s}
`, chart.Namespace, registrySecret, text))
	return err
}

// seenBy reads a file as a pod's only container sees it.
func seenBy(ctx context.Context, pod corev1.Pod, file string) ([]byte, error) {
	pid, err := process(ctx, pod)
	if err != nil {
		return nil, err
	}
	return os.ReadFile(fmt.Sprintf("/proc/%d/root%s", pid, file))
}

// holders are the pods that have the credentials.
func holders(ctx context.Context) (pods []corev1.Pod, err error) {
	for _, component := range []string{"api", "agent"} {
		some, err := podsOf(ctx, component)
		if err != nil {
			return nil, err
		}
		pods = append(pods, some...)
	}
	return pods, nil
}

func TestCredentialsOfTheRegistryChangeWithoutARestartAndAreNotTheEngines(t *testing.T) {
	tenant := newTenant(t)
	submit(t, tenant, "before-rotation", "with the first password")
	waitObject(t, tenant, "before-rotation", "every node to be warm", allWarm)
	before, err := holders(t.Context())
	if err != nil {
		t.Fatal(err)
	}

	// As it is done without anybody noticing: both are good for a while.
	first := login
	login = authn.Basic{Username: "rotated", Password: "the-second-sesame"}
	if err := registry.Admit(t.Context(), map[string]string{first.Username: first.Password, login.Username: login.Password}); err != nil {
		t.Fatal(err)
	}
	if err := credentials(t.Context()); err != nil {
		t.Fatal(err)
	}
	// kubelet looks at a pod's Secrets at the latest once a minute, and when the
	// pod changes.
	for _, p := range before {
		patch := fmt.Appendf(nil, `{"metadata":{"annotations":{"hearth.test/look":%q}}}`, strconv.FormatInt(time.Now().UnixNano(), 10))
		if _, err := bench.Client().CoreV1().Pods(p.Namespace).Patch(t.Context(), p.Name, types.MergePatchType, patch, metav1.PatchOptions{}); err != nil {
			t.Fatal(err)
		}
	}
	if err := bench.WaitFor(t.Context(), "the API and the agents to have the new password", 2*soon, func(ctx context.Context) (bool, error) {
		for _, p := range before {
			data, err := seenBy(ctx, p, credentialsFile)
			if err != nil {
				return false, err
			}
			if !strings.Contains(string(data), login.Password) {
				return false, nil
			}
		}
		return true, nil
	}); err != nil {
		t.Fatal(err)
	}
	if err := registry.Admit(t.Context(), map[string]string{login.Username: login.Password}); err != nil {
		t.Fatal(err)
	}
	f := submit(t, tenant, "after-rotation", "with the second password")
	waitObject(t, tenant, "after-rotation", "every node to be warm", allWarm)
	answers(t, f.URL, "with the second password")
	after, err := holders(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if was, is := restarts(before), restarts(after); was != is || len(before) != len(after) {
		t.Errorf("%d restarts of %d pods, %d of %d before", is, len(after), was, len(before))
	}

	// What guests run beside has neither the file nor the password.
	for _, node := range nodes {
		engine, err := onNode(t.Context(), "engine", node)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := seenBy(t.Context(), engine, credentialsFile); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("the engine of %s and the file: %v", node, err)
		}
		pid, err := process(t.Context(), engine)
		if err != nil {
			t.Fatal(err)
		}
		for _, p := range []string{first.Password, login.Password} {
			if has, err := remembers(pid, p); has || err != nil {
				t.Errorf("the engine of %s remembers a password: %t, %v", node, has, err)
			}
		}
	}
	// It is the agent's alone where it is: precompile children are other users.
	agents, err := podsOf(t.Context(), "agent")
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range agents {
		pid, err := process(t.Context(), p)
		if err != nil {
			t.Fatal(err)
		}
		info, err := os.Stat(fmt.Sprintf("/proc/%d/root%s", pid, credentialsFile))
		if err != nil || info.Mode().Perm() != 0o400 {
			t.Errorf("%s: %v %v", p.Spec.NodeName, info, err)
		}
	}
}
