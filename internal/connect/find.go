package connect

import (
	"context"
	"crypto/x509"
	"fmt"
	"slices"

	discoveryv1 "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// maxEndpoints bounds one list of the API's endpoints: it has a few replicas.
const maxEndpoints = 100

// backend is a ready pod of the API and its port for https.
type backend struct {
	pod  string
	uid  string
	port int32
}

// portName asks the Service under which name its pods serve https.
func (c *Cluster) portName(ctx context.Context) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	service, err := c.client.CoreV1().Services(c.system).Get(ctx, Service, metav1.GetOptions{})
	if err != nil {
		return "", c.explain(err, "read the Service "+Service, `the verb get on services, resourceNames ["`+Service+`"],`, c.notInstalled())
	}
	for _, port := range service.Spec.Ports {
		if port.Port == servicePort {
			return port.Name, nil
		}
	}
	return "", &Error{Message: fmt.Sprintf("the Service %s in the namespace %s of %s has no port %d", Service, c.system, c, servicePort),
		Remedy: "it is not the one of Hearth's chart: install the chart again, or name its namespace with --system-namespace"}
}

// backends lists the ready pods, in a stable order.
func (c *Cluster) backends(ctx context.Context, portName string) ([]backend, error) {
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	list, err := c.client.DiscoveryV1().EndpointSlices(c.system).List(ctx, metav1.ListOptions{
		LabelSelector: discoveryv1.LabelServiceName + "=" + Service, Limit: maxEndpoints,
	})
	if err != nil {
		return nil, c.explain(err, "list the endpoints of the Service "+Service, "the verb list on endpointslices of discovery.k8s.io", c.notInstalled())
	}
	var found []backend
	for _, slice := range list.Items {
		port := slices.IndexFunc(slice.Ports, func(p discoveryv1.EndpointPort) bool {
			name := ""
			if p.Name != nil {
				name = *p.Name
			}
			return name == portName && p.Port != nil
		})
		if port < 0 {
			continue
		}
		for _, endpoint := range slice.Endpoints {
			ready := endpoint.Conditions.Ready == nil || *endpoint.Conditions.Ready // absent means ready, says the API
			if target := endpoint.TargetRef; ready && target != nil && target.Kind == "Pod" {
				found = append(found, backend{pod: target.Name, uid: string(target.UID), port: *slice.Ports[port].Port})
			}
		}
	}
	slices.SortFunc(found, func(a, b backend) int {
		switch {
		case a.pod < b.pod:
			return -1
		case a.pod > b.pod:
			return 1
		}
		return 0
	})
	// A pod has one endpoint for each family of addresses.
	return slices.CompactFunc(found, func(a, b backend) bool { return a.uid == b.uid }), nil
}

// nobodyReady is the error when backends found none.
func (c *Cluster) nobodyReady() *Error {
	return &Error{
		Message: fmt.Sprintf("no pod of the Service %s in the namespace %s of %s is ready", Service, c.system, c),
		Remedy:  fmt.Sprintf("`kubectl -n %s get pods` says what they wait for", c.system),
	}
}

// authority reads the certificate authority that the API published.
func (c *Cluster) authority(ctx context.Context) (*x509.CertPool, error) {
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	const remedy = "the API publishes it when it starts: `kubectl -n %s logs deployment/" + Service + "` may say why it has not; or give it with --ca-file"
	published, err := c.client.CoreV1().ConfigMaps(c.system).Get(ctx, Service, metav1.GetOptions{})
	if err != nil {
		return nil, c.explain(err, "read the ConfigMap "+Service, `the verb get on configmaps, resourceNames ["`+Service+`"],`, missing{
			message: fmt.Sprintf("the API has not published its certificate authority: there is no ConfigMap %s in the namespace %s of %s", Service, c.system, c),
			remedy:  fmt.Sprintf(remedy, c.system),
		})
	}
	pem := published.Data[authorityKey]
	pool := x509.NewCertPool()
	if len(pem) > maxAuthority || !pool.AppendCertsFromPEM([]byte(pem)) {
		return nil, &Error{Message: fmt.Sprintf("the ConfigMap %s in the namespace %s of %s has no certificate under the key %s", Service, c.system, c, authorityKey),
			Remedy: fmt.Sprintf(remedy, c.system)}
	}
	return pool, nil
}
