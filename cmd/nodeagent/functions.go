package main

import (
	"cmp"
	"context"
	"fmt"
	"io"
	"maps"
	"slices"
	"strconv"
	"strings"

	"github.com/urfave/cli/v2"

	"github.com/hearth-sh/hearth/api/v1alpha1"
	"github.com/hearth-sh/hearth/internal/client"
	"github.com/hearth-sh/hearth/internal/command"
)

func functionsCommand() *cli.Command {
	return &cli.Command{
		Name:        "functions",
		Aliases:     []string{"fn"},
		Usage:       "list, change, roll back and delete functions",
		Description: "Everything a submitted function is: its URL, revisions and settings. Values of secrets are never shown.",
		Subcommands: []*cli.Command{
			{
				Name: "list", Aliases: []string{"ls"}, Usage: "list the functions",
				Description: "With a kubeconfig it lists the functions of its context's namespace, unless --tenant or --all-tenants says otherwise.",
				Flags: append([]cli.Flag{
					&cli.BoolFlag{Name: "all-tenants", Aliases: []string{"A"}, Usage: "list the functions of all tenants", DisableDefaultText: true},
					outputFlag(),
				}, apiFlags("list only functions of this `TENANT`")...),
				Action: action(functionsList),
			},
			{
				Name: "get", Usage: "show one function", ArgsUsage: "NAME",
				Flags:        append([]cli.Flag{outputFlag()}, apiFlags(ownerUsage)...),
				Action:       action(functionsGet),
				BashComplete: completeFunctions,
			},
			{
				Name: "revisions", Usage: "list a function's revisions, newest first", ArgsUsage: "NAME",
				Flags:        append([]cli.Flag{outputFlag()}, apiFlags(ownerUsage)...),
				Action:       action(functionsRevisions),
				BashComplete: completeFunctions,
			},
			{
				Name: "rollback", Usage: "go back to an older revision", ArgsUsage: "NAME",
				Description: "Without --to it is the revision that answered before the present one. It is still compiled, so this takes a moment only.",
				Flags: append([]cli.Flag{
					&cli.IntFlag{Name: "to", Usage: "number of the `REVISION` to go back to", DefaultText: "the one that answered before"},
					waitFlag(), outputFlag(),
				}, apiFlags(ownerUsage)...),
				Action:       action(functionsRollback),
				BashComplete: completeFunctions,
			},
			{
				Name: "delete", Aliases: []string{"rm"}, Usage: "delete a function with all its revisions", ArgsUsage: "NAME",
				Flags:        apiFlags(ownerUsage),
				Action:       action(functionsDelete),
				BashComplete: completeFunctions,
			},
			{
				Name: "set", Usage: "change settings: a new revision of the same module", ArgsUsage: "NAME",
				Description: "Settings that are not named stay as they are.\n\n" +
					"Examples:\n" +
					"   nodeagent functions set hello --memory 64MiB --timeout 5s\n" +
					"   nodeagent functions set hello --env GREETING=hi --unset-env OLD --secret API_KEY",
				Flags: append(append(settingsFlags(),
					&cli.GenericFlag{Name: "unset-env", Value: &repeated{}, Usage: "remove the environment variable `NAME`; repeatable"},
					&cli.GenericFlag{Name: "unset-secret", Value: &repeated{}, Usage: "remove the secret `NAME`; repeatable"},
					waitFlag(), outputFlag()), apiFlags(ownerUsage)...),
				Action:       action(functionsSet),
				BashComplete: completeFunctions,
			},
		},
	}
}

// withFunction runs f with a client and the function named by the argument.
func withFunction(c *cli.Context, f func(cl *connection, name string, asJSON bool) error) error {
	name, err := functionArgument(c)
	if err != nil {
		return err
	}
	return withClient(c, func(cl *connection, asJSON bool) error {
		if err := checkOwner(c.Context, cl, name); err != nil {
			return err
		}
		return f(cl, name, asJSON)
	})
}

// ownerUsage is what --tenant means where a function is named: names are
// unique across tenants, so it is no part of them.
const ownerUsage = "`TENANT` that the function must belong to"

// checkOwner holds --tenant, if it was given, against the function's tenant: a
// command meant for one tenant changes nothing of another.
func checkOwner(ctx context.Context, cl *connection, name string) error {
	if cl.choice.Tenant == "" {
		return nil
	}
	f, _, err := cl.Get(ctx, name)
	if err != nil {
		return err
	}
	return checkTenant(cl, f)
}

func checkTenant(cl *connection, f v1alpha1.Function) error {
	if wanted := cl.choice.Tenant; wanted != "" && f.Tenant != wanted {
		return fail(exitRefused, fmt.Sprintf("%s belongs to the tenant %s, not to %s", printable(f.Name), printable(f.Tenant), printable(wanted)),
			"leave --tenant (or HEARTH_TENANT) out, or name that tenant")
	}
	return nil
}

func withClient(c *cli.Context, f func(cl *connection, asJSON bool) error) error {
	asJSON := false
	if c.String("output") != "" {
		var err error
		if asJSON, err = wantsJSON(c); err != nil {
			return err
		}
	}
	p := newProgress(c.App.ErrWriter, asJSON)
	cl, err := connectAPI(c.Context, c, p, true)
	p.stop()
	if err != nil {
		return err
	}
	defer cl.Close()
	return f(cl, asJSON)
}

func functionsList(c *cli.Context) error {
	if err := command.NoArguments(c); err != nil {
		return err
	}
	return withClient(c, func(cl *connection, asJSON bool) error {
		tenant := cl.tenant
		if c.Bool("all-tenants") {
			if cl.choice.Tenant != "" && c.IsSet("tenant") {
				return usageError("--tenant and --all-tenants contradict each other; give one of them")
			}
			tenant = ""
		}
		list, err := cl.List(c.Context, tenant)
		if err != nil {
			return err
		}
		if asJSON {
			return printJSON(c.App.Writer, list)
		}
		if len(list.Items) == 0 {
			where := ""
			if tenant != "" {
				where = " of the tenant " + printable(tenant)
			}
			fprintf(c.App.Writer, "There are no functions%s yet. Submit one: nodeagent submit FILE|DIR\n", where)
			return nil
		}
		t, now := terminalOf(c.App.Writer), nowOf(c)
		table := newTable(c.App.Writer)
		// Nodes and runtimes are a cluster's.
		nodes := slices.ContainsFunc(list.Items, func(f v1alpha1.Function) bool { return f.Warm != "" || f.Settings.Runtime != "" })
		warm := func(s string) string {
			if nodes {
				return s + "\t"
			}
			return ""
		}
		fprintf(table, "NAME\t%s\tREVISION\t%sTENANT\tCHANGED\tURL\n", t.paint(plain, "STATE"), warm("WARM\tRUNTIME"))
		for _, f := range list.Items {
			fprintf(table, "%s\t%s\t%s\t%s%s\t%s\t%s\n", printable(f.Name), t.paint(stateColour(string(f.State)), printable(string(f.State))),
				revisionText(f), warm(printable(f.Warm)+"\t"+runtimeText(f.Settings)), printable(f.Tenant), age(now, f.UpdatedAt), cmp.Or(printable(f.URL), "-"))
		}
		return table.Flush()
	})
}

func runtimeText(s v1alpha1.Settings) string {
	if s.Runtime == "" {
		return string(v1alpha1.RuntimeResident)
	}
	return printable(string(s.Runtime))
}

// warmText says where the function answers without compiling.
func warmText(f v1alpha1.Function) string {
	if f.Settings.Runtime == v1alpha1.RuntimeSpin {
		return printable(f.Warm) // pods, wherever they are
	}
	return printable(f.Warm) + " nodes"
}

// revisionText is the newest revision, and the one that answers when that is another.
func revisionText(f v1alpha1.Function) string {
	switch {
	case f.ActiveRevision == f.Revision:
		return strconv.Itoa(f.Revision)
	case f.ActiveRevision == 0:
		return fmt.Sprintf("%d (none answers)", f.Revision)
	}
	return fmt.Sprintf("%d (%d answers)", f.Revision, f.ActiveRevision)
}

func functionsGet(c *cli.Context) error {
	return withFunction(c, func(cl *connection, name string, asJSON bool) error {
		f, _, err := cl.Get(c.Context, name)
		if err != nil {
			return err
		}
		if asJSON {
			return printJSON(c.App.Writer, f)
		}
		printFunction(c.App.Writer, f, age(nowOf(c), f.UpdatedAt))
		return nil
	})
}

func printFunction(w io.Writer, f v1alpha1.Function, changed string) {
	t := terminalOf(w)
	table := newTable(w)
	row := func(name, value string) { fprintf(table, "%s\t%s\n", name, value) }
	row("name", printable(f.Name))
	row("state", t.paint(stateColour(string(f.State)), printable(string(f.State))))
	if f.Error != nil {
		row("error", printable(f.Error.Code+": "+f.Error.Detail))
	}
	for i, warning := range f.Warnings {
		row(firstOnly(i, "warning"), printable(warning.Code+": "+warning.Detail))
	}
	if f.URL == "" {
		row("url", "none yet")
	} else {
		row("url", printable(f.URL))
	}
	if f.PathURL != "" {
		row("", printable(f.PathURL))
	}
	if f.Warm != "" {
		row("warm", warmText(f))
	}
	row("revision", revisionText(f))
	row("tenant", printable(f.Tenant))
	row("digest", printable(f.Digest))
	row("image", printable(f.Image))
	exposureRows(row, f.Settings)
	row("limits", limitsLine(f.Settings))
	for i, name := range slices.Sorted(maps.Keys(f.Settings.Env)) {
		row(firstOnly(i, "env"), printable(name+"="+f.Settings.Env[name]))
	}
	if len(f.Settings.SecretNames) > 0 {
		row("secrets", printable(strings.Join(f.Settings.SecretNames, ", ")))
	}
	row("changed", changed+" ago")
	if len(f.Phases) > 0 {
		row("time", phaseLine(f.Phases))
	}
	_ = table.Flush()
}

// exposureRows are the settings that only a cluster has.
func exposureRows(row func(name, value string), s v1alpha1.Settings) {
	if s.Runtime != "" {
		row("runtime", runtimeText(s))
	}
	if s.Host != "" {
		routes := ""
		if len(s.Routes) > 0 {
			routes = " (" + printable(strings.Join(s.Routes, ", ")) + ")"
		}
		row("host", printable(s.Host)+routes)
	}
	if s.Placement != nil {
		for i, label := range slices.Sorted(maps.Keys(s.Placement.NodeSelector)) {
			row(firstOnly(i, "nodes"), printable(label+"="+s.Placement.NodeSelector[label]))
		}
	}
	if a := s.Autoscaling; a != nil {
		kind := a.Autoscaler
		if kind == "" {
			kind = v1alpha1.AutoscalerNone
		}
		least := max(a.MinReplicas, v1alpha1.DefaultMinReplicas)
		pods := fmt.Sprintf("%d", least)
		if kind != v1alpha1.AutoscalerNone {
			pods = fmt.Sprintf("%d to %d, autoscaler %s", least, max(least, a.MaxReplicas), kind)
			if a.TargetCPUPercent > 0 {
				pods += fmt.Sprintf(", aiming for %d %% of the processor time requested", a.TargetCPUPercent)
			}
		}
		row("pods", printable(pods))
	}
}

func firstOnly(i int, s string) string {
	if i == 0 {
		return s
	}
	return ""
}

func functionsRevisions(c *cli.Context) error {
	return withFunction(c, func(cl *connection, name string, asJSON bool) error {
		list, err := cl.Revisions(c.Context, name)
		if err != nil {
			return err
		}
		if asJSON {
			return printJSON(c.App.Writer, list)
		}
		t, now := terminalOf(c.App.Writer), nowOf(c)
		table := newTable(c.App.Writer)
		fprintf(table, "REVISION\t%s\tANSWERS\tSIZE\tDIGEST\tMADE\tERROR\n", t.paint(plain, "STATE"))
		for _, r := range list.Items {
			answers, problem := "", ""
			if r.Active {
				answers = "yes"
			}
			if r.Error != nil {
				problem = printable(r.Error.Code)
			}
			fprintf(table, "%d\t%s\t%s\t%s\t%s\t%s ago\t%s\n", r.Revision, t.paint(stateColour(string(r.State)), printable(string(r.State))),
				answers, humanBytes(r.SizeBytes), shortDigest(r.Digest), age(now, r.CreatedAt), problem)
		}
		return table.Flush()
	})
}

func functionsRollback(c *cli.Context) error {
	to := c.Int("to")
	if to < 0 || c.IsSet("to") && to == 0 {
		return usageError("--to %d is no revision: they begin with 1", to)
	}
	return withFunction(c, func(cl *connection, name string, asJSON bool) error {
		f, err := cl.Rollback(c.Context, name, to, client.Change{Wait: c.Duration("wait")})
		if err != nil {
			return err
		}
		return finishChange(c, cl, f, asJSON)
	})
}

func functionsSet(c *cli.Context) error {
	settings, err := settingsFrom(c)
	if err != nil {
		return err
	}
	if settings.Empty() {
		return usageError("nothing to change: give --memory, --timeout, --concurrency, --env, --secret, --unset-env, --unset-secret, --runtime, --host, --route, --node-selector, --autoscaler, --min-replicas, --max-replicas or --target-cpu")
	}
	return withFunction(c, func(cl *connection, name string, asJSON bool) error {
		f, err := cl.Patch(c.Context, name, client.Change{Settings: settings, Wait: c.Duration("wait")})
		if err != nil {
			return err
		}
		return finishChange(c, cl, f, asJSON)
	})
}

// finishChange waits when the server's own wait was shorter, and reports.
func finishChange(c *cli.Context, cl *connection, f v1alpha1.Function, asJSON bool) error {
	if wait := c.Duration("wait"); f.State == v1alpha1.StatePending && wait > client.MaxServerWait {
		p := newProgress(c.App.ErrWriter, asJSON)
		var err error
		f, err = waitReady(c.Context, cl.Client, f, wait-client.MaxServerWait, p)
		p.stop()
		if err != nil {
			return err
		}
	}
	return reportChange(c, f, outcome{asJSON: asJSON, wait: c.Duration("wait")})
}

func functionsDelete(c *cli.Context) error {
	return withFunction(c, func(cl *connection, name string, _ bool) error {
		if err := cl.Delete(c.Context, name, ""); err != nil {
			return err
		}
		fprintf(c.App.Writer, "%s is deleted\n", printable(name))
		return nil
	})
}
