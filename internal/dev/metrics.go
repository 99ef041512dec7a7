package dev

import (
	"context"
	"io"
	"net/http"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	dto "github.com/prometheus/client_model/go"
	"github.com/prometheus/common/expfmt"
	"github.com/prometheus/common/model"

	"github.com/hearth-sh/hearth/internal/localsocket"
)

const (
	// scrapeDeadline bounds asking a sibling process for its metrics: a
	// scrape shows what answers, it does not wait for what is starting.
	scrapeDeadline = 2 * time.Second
	// maxScrape bounds what a sibling may answer with.
	maxScrape = 16 << 20
)

// siblingGatherer gathers the metrics of another process from its socket. A
// process that does not answer contributes nothing; its absence shows in
// hearth_process_up.
type siblingGatherer struct {
	ctx    context.Context //nolint:containedctx // Gather takes none, and a gatherer lives for one scrape
	client *http.Client
	up     prometheus.Gauge
}

func newSibling(socket string) *http.Client { return localsocket.HTTPClient(socket) }

func (g siblingGatherer) Gather() ([]*dto.MetricFamily, error) {
	families, err := g.fetch()
	if err != nil {
		g.up.Set(0)
		return nil, nil //nolint:nilerr // a dead sibling must not take the scrape with it
	}
	g.up.Set(1)
	return families, nil
}

func (g siblingGatherer) fetch() ([]*dto.MetricFamily, error) {
	ctx, cancel := context.WithTimeout(g.ctx, scrapeDeadline)
	defer cancel()
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, localsocket.BaseURL+"/metrics", nil)
	if err != nil {
		return nil, err
	}
	response, err := g.client.Do(request)
	if err != nil {
		return nil, err
	}
	defer response.Body.Close()
	parser := expfmt.NewTextParser(model.UTF8Validation)
	byName, err := parser.TextToMetricFamilies(io.LimitReader(response.Body, maxScrape))
	if err != nil {
		return nil, err
	}
	families := make([]*dto.MetricFamily, 0, len(byName))
	for _, family := range byName {
		families = append(families, family)
	}
	return families, nil
}
