package main

import (
	"context"
	"fmt"
	"slices"
	"time"

	"golang.org/x/sync/errgroup"
	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/hearth-sh/hearth/api/v1alpha1"
	"github.com/hearth-sh/hearth/test/bench/report"
)

const (
	// targetFirst is from a submit to the first answer, p50.
	targetFirst = time.Second
	// peerPort is where the Deployment's pod listens.
	peerPort = 8080
)

// submits measures one function after the other, and in turns the same answer
// from a Deployment.
func submits(ctx context.Context, b *bench) error {
	tenants, err := b.newTenants(ctx, 2)
	if err != nil {
		return err
	}
	// The first of a node proves its sandbox, the first of a tenant starts its
	// worker: what is measured is a cluster that runs.
	if _, err := b.submit(ctx, tenants[0], "bench-first"); err != nil {
		return err
	}
	var acknowledged, answered, peer []time.Duration
	phases := map[string][]time.Duration{}
	for i := range b.submits {
		name := fmt.Sprintf("bench-submit-%d", i)
		s, err := b.submit(ctx, tenants[0], name)
		if err != nil {
			return err
		}
		acknowledged, answered = append(acknowledged, s.acknowledged), append(answered, s.answered)
		f, err := b.api().Wait(ctx, name, nil)
		if err != nil {
			return err
		}
		if f.State != v1alpha1.StateReady {
			return fmt.Errorf("%s answered and is %s", name, f.State)
		}
		for _, p := range f.Phases {
			phases[p.Name] = append(phases[p.Name], time.Duration(p.Milliseconds*float64(time.Millisecond)))
		}
		if err := b.remove(ctx, name); err != nil {
			return err
		}
		if i%2 == 0 {
			d, err := b.deployment(ctx, tenants[1], fmt.Sprintf("peer-%d", i))
			if err != nil {
				return err
			}
			peer = append(peer, d)
		}
	}
	p50 := report.Median(answered)
	b.table.Title(fmt.Sprintf("Submit to first answer, a module of %d KB, %d one after the other", len(b.hello)/1000, b.submits))
	b.table.Hold("p50", report.Milliseconds(p50), "", "≤ "+report.Milliseconds(targetFirst), p50 <= targetFirst)
	b.table.Add("p95", report.Milliseconds(report.Quantile(answered, 0.95)), report.Times(report.Quantile(answered, 0.95), p50)+" p50")
	b.table.Add("acknowledged (durable), p50", report.Milliseconds(report.Median(acknowledged)), fmt.Sprintf("p95 %s", report.Milliseconds(report.Quantile(acknowledged, 0.95))))
	var sum time.Duration
	for _, name := range []string{"receive", "check", "publish", "record", "pull", "verify", "compile", "store", "load", "instantiate"} {
		if median := report.Median(phases[name]); len(phases[name]) > 0 {
			b.table.Add("  "+name, report.Milliseconds(median), share(median, p50))
			sum += median
		}
	}
	b.table.Add("  between them", report.Milliseconds(p50-sum), share(p50-sum, p50))
	b.table.Title(fmt.Sprintf("The same as a Deployment, Service and Ingress, image already on every node, %d in turns with the above", len(peer)))
	b.table.Add("apply to first answer, p50", report.Milliseconds(report.Median(peer)), report.Times(report.Median(peer), p50)+" a submit")
	b.table.Add("p95", report.Milliseconds(report.Quantile(peer, 0.95)), "")
	return nil
}

func share(part, whole time.Duration) string {
	return fmt.Sprintf("%.0f %%", 100*float64(part)/float64(max(whole, 1)))
}

// deployment makes what plain Kubernetes needs for one URL, of a program that
// needs no start of its own and no pull, and waits for its first answer.
func (b *bench) deployment(ctx context.Context, namespace, name string) (time.Duration, error) {
	meta := metav1.ObjectMeta{Name: name, Namespace: namespace}
	labels := map[string]string{"app": name}
	host := name + "." + b.base
	path, ingressClass, gone := networkingv1.PathTypePrefix, class, int64(0)
	begin := time.Now()
	api := b.cluster.Client()
	if _, err := api.AppsV1().Deployments(namespace).Create(ctx, &appsv1.Deployment{ObjectMeta: meta, Spec: appsv1.DeploymentSpec{
		Selector: &metav1.LabelSelector{MatchLabels: labels},
		Template: corev1.PodTemplateSpec{ObjectMeta: metav1.ObjectMeta{Labels: labels}, Spec: corev1.PodSpec{
			TerminationGracePeriodSeconds: &gone,
			Containers: []corev1.Container{{
				Name: "main", Image: toolbox, ImagePullPolicy: corev1.PullIfNotPresent, Args: []string{"serve", fmt.Sprintf(":%d", peerPort), name},
				Ports: []corev1.ContainerPort{{ContainerPort: peerPort}},
			}},
		}},
	}}, metav1.CreateOptions{}); err != nil {
		return 0, err
	}
	if _, err := api.CoreV1().Services(namespace).Create(ctx, &corev1.Service{ObjectMeta: meta, Spec: corev1.ServiceSpec{
		Selector: labels, Ports: []corev1.ServicePort{{Port: peerPort}},
	}}, metav1.CreateOptions{}); err != nil {
		return 0, err
	}
	backend := networkingv1.IngressBackend{Service: &networkingv1.IngressServiceBackend{Name: name, Port: networkingv1.ServiceBackendPort{Number: peerPort}}}
	if _, err := api.NetworkingV1().Ingresses(namespace).Create(ctx, &networkingv1.Ingress{ObjectMeta: meta, Spec: networkingv1.IngressSpec{
		IngressClassName: &ingressClass,
		Rules: []networkingv1.IngressRule{{Host: host, IngressRuleValue: networkingv1.IngressRuleValue{HTTP: &networkingv1.HTTPIngressRuleValue{
			Paths: []networkingv1.HTTPIngressPath{{Path: "/", PathType: &path, Backend: backend}},
		}}}},
	}}, metav1.CreateOptions{}); err != nil {
		return 0, err
	}
	if err := b.answers(ctx, "http://"+host+"/", name); err != nil {
		return 0, err
	}
	took := time.Since(begin)
	background := metav1.DeletePropagationBackground
	if err := api.AppsV1().Deployments(namespace).Delete(ctx, name, metav1.DeleteOptions{PropagationPolicy: &background}); err != nil {
		return 0, err
	}
	if err := api.CoreV1().Services(namespace).Delete(ctx, name, metav1.DeleteOptions{}); err != nil {
		return 0, err
	}
	if err := api.NetworkingV1().Ingresses(namespace).Delete(ctx, name, metav1.DeleteOptions{}); err != nil {
		return 0, err
	}
	// What ends takes processor time, too.
	return took, b.cluster.WaitFor(ctx, "the pod of "+name+" to be gone", soon, func(ctx context.Context) (bool, error) {
		pods, err := api.CoreV1().Pods(namespace).List(ctx, metav1.ListOptions{LabelSelector: "app=" + name})
		return err == nil && len(pods.Items) == 0, nil
	})
}

// concurrentSubmits sends many at once, each a function and a module of its own.
func concurrentSubmits(ctx context.Context, b *bench) error {
	tenants, err := b.newTenants(ctx, b.tenants)
	if err != nil {
		return err
	}
	all, names := make([]submission, b.concurrent), make([]string, b.concurrent)
	retriesBefore := b.retries.Load()
	begin := time.Now()
	group, groupCtx := errgroup.WithContext(ctx)
	for i := range all {
		names[i] = fmt.Sprintf("bench-concurrent-%d", i)
		group.Go(func() (err error) {
			all[i], err = b.submit(groupCtx, tenants[i%len(tenants)], names[i])
			return err
		})
	}
	if err := group.Wait(); err != nil {
		return err
	}
	took := time.Since(begin)
	var acknowledged, answered []time.Duration
	for _, s := range all {
		acknowledged, answered = append(acknowledged, s.acknowledged), append(answered, s.answered)
	}
	retries := b.retries.Load() - retriesBefore
	b.table.Title(fmt.Sprintf("%d submits at once from %d tenants, each another module", b.concurrent, len(tenants)))
	b.table.Hold("acknowledged, all after", report.Milliseconds(slices.Max(acknowledged)), fmt.Sprintf("p50 %s, p95 %s; %d calls were tried again", report.Milliseconds(report.Median(acknowledged)), report.Milliseconds(report.Quantile(acknowledged, 0.95)), retries),
		fmt.Sprintf("all %d", b.concurrent), true)
	b.table.Add("first answer, all after", report.Milliseconds(took), fmt.Sprintf("p50 %s, p95 %s; %s a function", report.Milliseconds(report.Median(answered)), report.Milliseconds(report.Quantile(answered, 0.95)), report.Milliseconds(took/time.Duration(b.concurrent))))
	return b.remove(ctx, names...)
}
