package clusternode

import (
	"encoding/json"
	"net/http"
	"time"

	"github.com/hearth-sh/hearth/api/v1alpha1"
	"github.com/hearth-sh/hearth/internal/health"
	"github.com/hearth-sh/hearth/internal/images"
	"github.com/hearth-sh/hearth/internal/node"
)

const (
	// maxImagesListed is v1alpha1.ImagesStatus's limit.
	maxImagesListed = 100
	// maxSimulationBytes is ample for a Simulation.
	maxSimulationBytes = 4 << 10
)

// Sections implements agent.ClusterNode.
func (c *cluster) Sections(s *health.Sections) {
	c.mu.Lock()
	monitor, loop, identity := c.monitor, c.loop, c.identity
	c.mu.Unlock()
	if monitor != nil {
		for _, state := range monitor.Snapshot().Runtimes {
			r := v1alpha1.RuntimeStatus{
				Name: state.Runtime.Name, Handler: state.Runtime.Handler, Version: state.Runtime.Version, Binary: state.Runtime.Binary,
				Proven: state.Proven, Since: state.Since, Problems: state.Runtime.Problems,
			}
			if state.Last != nil {
				r.ProvedAt, r.Code, r.Message = timeOrNil(state.Last.At), string(state.Last.Code), state.Last.Message
			}
			s.Runtimes = append(s.Runtimes, r)
		}
	}
	if loop != nil {
		status, _ := loop.Status()
		s.Images = imagesStatus(status)
	}
	if identity != nil {
		s.Instance = &v1alpha1.InstanceStatus{
			ID: identity.InstanceID, Type: identity.InstanceType, Zone: identity.Zone,
			LifeCycle: string(identity.LifeCycle), Role: identity.Role,
		}
	}
	if d := c.drainer.Status(); d.Phase != node.DrainIdle {
		s.Interruption = &v1alpha1.InterruptionStatus{
			Kind: string(d.Notice.Kind), Simulated: d.Notice.ID == simulatedID, Phase: string(d.Phase), Since: d.Since,
			Deadline: timeOrNil(d.Notice.Deadline.UTC()), Pods: d.Total, Gone: d.Gone, Terminating: d.Terminating,
			Blocked: d.Blocked, Forced: d.Forced, Left: d.Left, Error: d.LastError,
		}
	}
}

func imagesStatus(s images.Status) *v1alpha1.ImagesStatus {
	out := &v1alpha1.ImagesStatus{
		Total: s.Total, Warm: s.Counts[images.StateWarm], Failed: s.Counts[images.StateFailed], Summary: s.Summary,
	}
	for _, image := range s.Images {
		if image.State == images.StateWarm {
			continue
		}
		if len(out.Images) == maxImagesListed {
			break
		}
		i := v1alpha1.ImageStatus{Image: image.Image, State: string(image.State), Users: image.Users, NextTry: timeOrNil(image.NextTry)}
		if image.State == images.StatePulling && image.Total > 0 {
			percent := int(image.Done * 100 / image.Total)
			i.Percent = &percent
		}
		if image.Code != "" {
			i.Error = &v1alpha1.FunctionError{Code: image.Code, Detail: image.Message}
		}
		out.Images = append(out.Images, i)
	}
	return out
}

func timeOrNil(t time.Time) *time.Time {
	if t.IsZero() {
		return nil
	}
	return &t
}

// Routes implements agent.ClusterNode:
//
//	POST   /v1/simulation   begin what a Simulation says
//	DELETE /v1/simulation   take all simulations back
func (c *cluster) Routes(mux *http.ServeMux) {
	mux.HandleFunc("POST /v1/simulation", func(w http.ResponseWriter, r *http.Request) {
		var s Simulation
		decoder := json.NewDecoder(http.MaxBytesReader(w, r.Body, maxSimulationBytes))
		decoder.DisallowUnknownFields()
		err := decoder.Decode(&s)
		if err == nil {
			err = c.notices.begin(s)
		}
		if err != nil {
			http.Error(w, err.Error(), http.StatusUnprocessableEntity)
			return
		}
		w.WriteHeader(http.StatusAccepted)
	})
	mux.HandleFunc("DELETE /v1/simulation", func(w http.ResponseWriter, _ *http.Request) {
		c.notices.end()
		w.WriteHeader(http.StatusNoContent)
	})
}
