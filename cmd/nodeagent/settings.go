package main

import (
	"encoding/json"
	"fmt"
	"io"
	"os"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/urfave/cli/v2"

	"github.com/hearth-sh/hearth/api/v1alpha1"
	"github.com/hearth-sh/hearth/internal/client"
)

// settingsFlags are the settings of a revision.
func settingsFlags() []cli.Flag {
	return []cli.Flag{
		&cli.GenericFlag{Name: "env", Aliases: []string{"e"}, Value: &repeated{}, Usage: "environment variable `NAME=VALUE`; repeatable"},
		&cli.GenericFlag{Name: "secret", Value: &repeated{}, Usage: "secret `NAME` (value from the environment), NAME=@FILE or NAME=VALUE (which others may see in the process list); repeatable"},
		&cli.StringFlag{Name: "memory", Usage: "memory limit of one request, `SIZE` such as 64MiB", DefaultText: fmt.Sprintf("%d MiB for a new function", v1alpha1.DefaultMemoryMiB)},
		&cli.DurationFlag{Name: "timeout", Usage: "deadline of one request, from its arrival, a `DURATION`", DefaultText: fmt.Sprintf("%v for a new function", v1alpha1.DefaultTimeoutMS*time.Millisecond)},
		&cli.IntFlag{Name: "concurrency", Usage: "requests at once, `N`, before others queue", DefaultText: fmt.Sprintf("%d for a new function", v1alpha1.DefaultConcurrency)},
		&cli.StringFlag{Name: "runtime", Usage: "`RUNTIME` of the function: resident (in the engine of every node, at no cost while idle) or spin (pods of its own, on a cluster)", DefaultText: "resident for a new function"},
		&cli.StringFlag{Name: "host", Usage: "additional DNS `NAME` that it answers to, on a cluster; '' removes it"},
		&cli.GenericFlag{Name: "route", Value: &repeated{}, Usage: "`PATH` of --host that reaches it, with everything below it; repeatable, replaces all routes; '' removes them"},
		&cli.GenericFlag{Name: "node-selector", Value: &repeated{}, Usage: "run it, and keep its secrets, on nodes with this label only, `LABEL=VALUE`; LABEL- takes one back, '' all; repeatable, for a resident function on a cluster"},
		&cli.StringFlag{Name: "autoscaler", Usage: "what decides how many pods a spin function has, `AUTOSCALER`: none, hpa or keda (each must be in the cluster); '' goes back to one pod", DefaultText: "none for a new function"},
		&cli.IntFlag{Name: "min-replicas", Usage: "least number `N` of a spin function's pods; 0: the default", DefaultText: fmt.Sprint(v1alpha1.DefaultMinReplicas)},
		&cli.IntFlag{Name: "max-replicas", Usage: "greatest number `N` of a spin function's pods, which hpa and keda need; 0: the default", DefaultText: "--min-replicas"},
		&cli.IntFlag{Name: "target-cpu", Usage: "processor time, in `PERCENT` of what the pods request, that hpa and keda aim for; 0: the default", DefaultText: fmt.Sprint(v1alpha1.DefaultTargetCPUPercent)},
	}
}

// settingsFrom reads settingsFlags; what was not given stays nil.
func settingsFrom(c *cli.Context) (client.Settings, error) {
	var s client.Settings
	if c.IsSet("memory") {
		mib, err := parseMiB(c.String("memory"))
		if err != nil {
			return s, usageError("--memory %v", err)
		}
		s.MemoryMiB = &mib
	}
	if c.IsSet("timeout") {
		d := c.Duration("timeout")
		if d%time.Millisecond != 0 {
			return s, usageError("--timeout %v is not a whole number of milliseconds", d)
		}
		ms := int(d / time.Millisecond)
		s.TimeoutMS = &ms
	}
	if c.IsSet("concurrency") {
		n := c.Int("concurrency")
		s.Concurrency = &n
	}
	if err := exposureFrom(c, &s); err != nil {
		return s, err
	}
	if err := placementFrom(c, &s); err != nil {
		return s, err
	}
	if err := autoscalingFrom(c, &s); err != nil {
		return s, err
	}
	for _, pair := range repeatedOf(c, "env") {
		name, value, err := parsePair(pair)
		if err != nil {
			return s, usageError("--env: %v", err)
		}
		set(&s.Env, name, &value)
	}
	for _, pair := range repeatedOf(c, "secret") {
		name, value, err := parseSecret(pair, os.LookupEnv, readSecretFile)
		if err != nil {
			return s, usageError("--secret: %v", err)
		}
		set(&s.Secrets, name, &value)
	}
	for _, name := range repeatedOf(c, "unset-env") {
		set(&s.Env, name, nil)
	}
	for _, name := range repeatedOf(c, "unset-secret") {
		set(&s.Secrets, name, nil)
	}
	return s, nil
}

// exposureFrom reads what only a cluster's API knows. Whether host and routes
// are possible is the server's word.
func exposureFrom(c *cli.Context, s *client.Settings) error {
	if c.IsSet("runtime") {
		runtime := v1alpha1.FunctionRuntime(c.String("runtime"))
		if runtime != v1alpha1.RuntimeResident && runtime != v1alpha1.RuntimeSpin {
			return usageError("--runtime %q is not resident or spin", c.String("runtime"))
		}
		s.Runtime = &runtime
	}
	routes := repeatedOf(c, "route")
	if c.IsSet("host") {
		host := c.String("host")
		s.Host = &host
		if host == "" {
			if slices.ContainsFunc(routes, func(r string) bool { return r != "" }) {
				return usageError("--route is a path of --host, which is being removed")
			}
			s.Routes = &[]string{} // they are the host's
		}
	}
	if len(routes) == 0 {
		return nil
	}
	kept := []string{}
	for _, route := range routes {
		switch {
		case route != "" && route[0] != '/':
			return usageError("--route %q is no path; it begins with a slash", route)
		case route == "" && len(routes) > 1:
			return usageError("--route '' removes all routes and stands alone")
		case route != "":
			kept = append(kept, route)
		}
	}
	s.Routes = &kept
	return nil
}

// placementFrom reads where a function runs. Which labels are allowed is the
// server's word.
func placementFrom(c *cli.Context, s *client.Settings) error {
	labels := repeatedOf(c, "node-selector")
	for _, label := range labels {
		name, value, ok := strings.Cut(label, "=")
		switch {
		case label == "" && len(labels) > 1:
			return usageError("--node-selector '' takes all labels back and stands alone")
		case label == "":
			s.AnyNode = true
		case ok && name != "":
			set(&s.NodeSelector, name, &value)
		case !ok && len(label) > 1 && strings.HasSuffix(label, "-"):
			set(&s.NodeSelector, strings.TrimSuffix(label, "-"), nil)
		default:
			return usageError("--node-selector %q is no label; write LABEL=VALUE, or LABEL- to take it back", label)
		}
	}
	return nil
}

// autoscalingFrom reads how many pods a function has. How many there may be is
// the server's word.
func autoscalingFrom(c *cli.Context, s *client.Settings) error {
	if c.IsSet("autoscaler") {
		a := v1alpha1.Autoscaler(c.String("autoscaler"))
		switch a {
		case "":
			s.FixedSize = true
		case v1alpha1.AutoscalerNone, v1alpha1.AutoscalerHPA, v1alpha1.AutoscalerKEDA:
			s.Autoscaling.Autoscaler = &a
		default:
			return usageError("--autoscaler %q is not none, hpa or keda", c.String("autoscaler"))
		}
	}
	for _, f := range []struct {
		flag string
		to   **int
	}{{"min-replicas", &s.Autoscaling.MinReplicas}, {"max-replicas", &s.Autoscaling.MaxReplicas}, {"target-cpu", &s.Autoscaling.TargetCPUPercent}} {
		if !c.IsSet(f.flag) {
			continue
		}
		if s.FixedSize {
			return usageError("--%s is a part of what --autoscaler '' takes back; give one of them", f.flag)
		}
		n := c.Int(f.flag)
		if n < 0 {
			return usageError("--%s %d is less than 0", f.flag, n)
		}
		*f.to = &n
	}
	return nil
}

func set(m *map[string]*string, name string, value *string) {
	if *m == nil {
		*m = map[string]*string{}
	}
	(*m)[name] = value
}

// parsePair splits NAME=VALUE. Whether the name is allowed is the server's word.
func parsePair(s string) (name, value string, err error) {
	name, value, ok := strings.Cut(s, "=")
	switch {
	case !ok:
		return "", "", fmt.Errorf("%q has no =; write NAME=VALUE", s)
	case name == "":
		return "", "", fmt.Errorf("the name before = is empty; write NAME=VALUE")
	}
	return name, value, nil
}

// parseSecret reads NAME, NAME=@FILE or NAME=VALUE. Its errors never contain a
// value.
func parseSecret(s string, lookup func(string) (string, bool), read func(string) (string, error)) (name, value string, err error) {
	name, value, explicit := strings.Cut(s, "=")
	if name == "" {
		return "", "", fmt.Errorf("the name is empty; write NAME, NAME=@FILE or NAME=VALUE")
	}
	if !explicit {
		value, ok := lookup(name)
		if !ok {
			return "", "", fmt.Errorf("the environment has no variable %s; set it, or write %s=@FILE", name, name)
		}
		return name, value, nil
	}
	if path, isFile := strings.CutPrefix(value, "@"); isFile {
		value, err := read(path)
		if err != nil {
			return "", "", fmt.Errorf("read the value of %s: %w", name, err)
		}
		return name, value, nil
	}
	return name, value, nil
}

// readSecretFile reads a value, without the newline at its end that editors add.
func readSecretFile(path string) (string, error) {
	f, err := os.Open(path)
	if err != nil {
		return "", err
	}
	defer f.Close()
	data, err := io.ReadAll(io.LimitReader(f, v1alpha1.MaxEnvBytes+1))
	if err != nil {
		return "", err
	}
	if len(data) > v1alpha1.MaxEnvBytes {
		return "", fmt.Errorf("%s is larger than the %d KiB that all variables together may have", path, v1alpha1.MaxEnvBytes>>10)
	}
	return strings.TrimSuffix(strings.TrimSuffix(string(data), "\n"), "\r"), nil
}

// parseMiB reads 64, 64M, 64MiB, 1G or 1GiB.
func parseMiB(s string) (int, error) {
	number := strings.TrimRight(s, "BbIiMmGg ")
	n, err := strconv.Atoi(strings.TrimSpace(number))
	if err != nil || n <= 0 {
		return 0, fmt.Errorf("%q is no size; write 64MiB or 1GiB", s)
	}
	switch strings.ToLower(strings.TrimSpace(s[len(number):])) {
	case "", "m", "mib":
		return n, nil
	case "g", "gib":
		if n > v1alpha1.MaxMemoryMiB {
			return 0, fmt.Errorf("%q is more than the %d MiB a function may have", s, v1alpha1.MaxMemoryMiB)
		}
		return n << 10, nil
	}
	return 0, fmt.Errorf("%q has an unknown unit; write 64MiB or 1GiB", s)
}

// repeated is an option that can be given several times. Unlike the library's
// slices it does not split values at commas, which environment values contain.
type repeated struct{ values []string }

// serializedPrefix marks the form in which the library copies a value from one
// name of an option to its aliases, which share this very object.
const serializedPrefix = "\x00repeated:"

func (r *repeated) Set(s string) error {
	if strings.HasPrefix(s, serializedPrefix) {
		return nil
	}
	r.values = append(r.values, s)
	return nil
}

// String is what help shows as the default: nothing.
func (r *repeated) String() string { return "" }

// Serialize is called by the library for aliases.
func (r *repeated) Serialize() string {
	data, _ := json.Marshal(r.values) // strings always marshal
	return serializedPrefix + string(data)
}

func repeatedOf(c *cli.Context, name string) []string {
	if r, ok := c.Generic(name).(*repeated); ok && r != nil {
		return r.values
	}
	return nil
}
