package bootstrap

import (
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"time"

	"github.com/hearth-sh/hearth/internal/k3s/election"
	"github.com/hearth-sh/hearth/internal/k3s/join"
	"github.com/hearth-sh/hearth/internal/k3s/pki"
)

const (
	// answerWithin bounds asking a server itself whether it is there.
	answerWithin = 2 * time.Second
	// removeWithin bounds looking for dead servers.
	removeWithin = 30 * time.Second
	// maxNodesBytes bounds the list of servers.
	maxNodesBytes = 8 << 20
)

// server is another server of the cluster, as its Node shows it.
type server struct {
	name    string
	address string // InternalIP
}

// census is how servers that are gone are told from those that are not.
type census struct {
	self string // this machine's node
	// answers says whether something listens where a server's supervisor does.
	answers func(ctx context.Context, address string) bool
	// state is what EC2 says of an instance.
	state func(ctx context.Context, id string) (instanceState, error)
	rec   *recorder
}

// removeDead deletes the Nodes of servers whose instances EC2 says are gone and
// that do not answer. k3s then removes their members from etcd. That has to be
// done before another server joins: etcd takes nobody in while a member is
// missing, and its dead ones count towards the quorum for ever.
//
// It does not wait for the Node to become NotReady, which takes most of a
// minute; that EC2 alone says so is not enough, since it knows nothing of
// instances of another region. What cannot be told is left, and said.
func (m *machine) removeDead(ctx context.Context, through string) {
	ctx, cancel := context.WithTimeout(ctx, removeWithin)
	defer cancel()
	api, err := newAPI(through, m.decision.Credentials)
	if err != nil {
		m.rec.warn("dead servers were not looked for: %s", oneLine(err))
		return
	}
	defer api.close()
	census{
		self: m.snapshot.Identity.InstanceID, answers: answers, rec: m.rec,
		state: func(ctx context.Context, id string) (instanceState, error) {
			return instanceStateOf(ctx, m.aws, m.snapshot.Identity.ServicesDomain, id)
		},
	}.removeDead(ctx, api)
}

func (c census) removeDead(ctx context.Context, api *api) {
	servers, err := api.servers(ctx)
	if err != nil {
		c.rec.warn("dead servers were not looked for: %s", oneLine(err))
		return
	}
	for _, s := range servers {
		if s.name == c.self || c.answers(ctx, s.address) {
			continue
		}
		state, err := c.state(ctx, s.name)
		switch {
		case err != nil:
			c.rec.warn("server %s does not answer, and EC2 does not say whether it still exists (%s); if it is gone: kubectl delete node %s",
				s.name, oneLine(err), s.name)
		case state != instanceGone:
			c.rec.warn("server %s does not answer; its instance exists", s.name)
		default:
			if err := api.deleteNode(ctx, s.name); err != nil {
				c.rec.warn("the terminated server %s was not removed: %s; kubectl delete node %s", s.name, oneLine(err), s.name)
				continue
			}
			c.rec.changed()
			c.rec.note("removed the terminated server %s from the cluster and from etcd", s.name)
		}
	}
}

// answers says whether something listens where a server's supervisor does.
func answers(ctx context.Context, address string) bool {
	return address != "" && answersAt(ctx, net.JoinHostPort(address, join.DefaultPort))
}

// answersAt says whether something listens at HOST:PORT.
func answersAt(ctx context.Context, address string) bool {
	dialer := net.Dialer{Timeout: answerWithin}
	connection, err := dialer.DialContext(ctx, "tcp", address)
	if err != nil {
		return false
	}
	_ = connection.Close()
	return true
}

// api speaks to the API server as an administrator of the cluster, which whoever
// has its authorities can be.
type api struct {
	http *http.Client
	host string
}

// adminValid is how long the certificate for that is good.
const adminValid = 5 * time.Minute

func newAPI(server string, c election.Credentials) (*api, error) {
	if c.Authorities == nil {
		return nil, errors.New("this machine does not have the cluster's authorities")
	}
	certificate, err := c.Authorities.ClientCertificate("hearth:bootstrap", []string{"system:masters"}, adminValid)
	if err != nil {
		return nil, err
	}
	roots, err := pki.Pool(c.ServerCA)
	if err != nil {
		return nil, err
	}
	return &api{&http.Client{Timeout: removeWithin, Transport: &http.Transport{TLSClientConfig: &tls.Config{
		RootCAs: roots, Certificates: []tls.Certificate{certificate}, MinVersion: tls.VersionTLS12,
	}}}, server}, nil
}

func (a *api) close() { a.http.CloseIdleConnections() }

func (a *api) do(ctx context.Context, method, path string) ([]byte, error) {
	request, err := http.NewRequestWithContext(ctx, method, a.host+path, nil)
	if err != nil {
		return nil, err
	}
	request.Header.Set("Accept", "application/json")
	response, err := a.http.Do(request)
	if err != nil {
		return nil, err
	}
	defer response.Body.Close()
	body, err := io.ReadAll(io.LimitReader(response.Body, maxNodesBytes))
	if err == nil && response.StatusCode >= http.StatusBadRequest {
		err = fmt.Errorf("the API server answers %s", response.Status)
	}
	return body, err
}

// servers lists the servers of the cluster.
func (a *api) servers(ctx context.Context) ([]server, error) {
	body, err := a.do(ctx, http.MethodGet, "/api/v1/nodes?limit=500&labelSelector="+url.QueryEscape("node-role.kubernetes.io/control-plane=true"))
	if err != nil {
		return nil, err
	}
	var list struct {
		Items []struct {
			Metadata struct {
				Name string `json:"name"`
			} `json:"metadata"`
			Status struct {
				Addresses []struct{ Type, Address string } `json:"addresses"`
			} `json:"status"`
		} `json:"items"`
	}
	if err := json.Unmarshal(body, &list); err != nil {
		return nil, fmt.Errorf("the API server's answer is no list of Nodes: %w", err)
	}
	var servers []server
	for _, n := range list.Items {
		s := server{name: n.Metadata.Name}
		for _, address := range n.Status.Addresses {
			if address.Type == "InternalIP" && s.address == "" {
				s.address = address.Address
			}
		}
		servers = append(servers, s)
	}
	return servers, nil
}

func (a *api) deleteNode(ctx context.Context, name string) error {
	_, err := a.do(ctx, http.MethodDelete, "/api/v1/nodes/"+url.PathEscape(name))
	return err
}
