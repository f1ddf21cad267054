package main

import (
	"context"
	"maps"
	"math"
	"runtime"
	"slices"
	"strings"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promauto"
)

// metrics are what Prometheus sees. docs/operating.md has what to make of them.
type metrics struct {
	registry      *prometheus.Registry
	requests      *prometheus.HistogramVec       // but those for a check of a token:
	validations   map[string]prometheus.Observer // by class of status; bound, as a look for labels would be felt
	problems      *prometheus.CounterVec
	panics        prometheus.Counter
	registrations *prometheus.CounterVec
	mails         *prometheus.CounterVec
	signIns       *prometheus.CounterVec
	reuse         prometheus.Counter
	dropped       *prometheus.CounterVec
	keycloak      *prometheus.HistogramVec
	tasks         *prometheus.CounterVec
	synced        *prometheus.CounterVec
	passes        *prometheus.CounterVec
}

// The buckets of what waits for PostgreSQL or Keycloak, and of a check of a token, which takes microseconds.
var (
	seconds   = []float64{.0025, .01, .025, .05, .1, .25, .5, 1, 2.5, 10}
	fractions = []float64{.00005, .0001, .00025, .0005, .001, .0025, .01, .05, .25, 1, 10}
)

// What labels may be. They are bounded: never a path, a user or an error's text.
var (
	statusClasses = []string{"2xx", "4xx", "5xx"}
	outcomes      = []string{"ok", "unavailable", "refused"} // see outcome
	flows         = []string{"password", "code"}
	steps         = []string{"begin", "mail", "resend", "verified", "expired", "cancelled"}
	passStatuses  = []string{"done", "aborted", "failed"}
	signInEnds    = []string{"ok", problemInvalidCredentials.slug(), problemOTPRequired.slug(),
		problemAccountNotVerified.slug(), problemAccountDisabled.slug(), problemAccountSetupRequired.slug(),
		problemSignInIncomplete.slug(), problemTooManyRequests.slug(), problemUnavailable.slug(), problemInternal.slug()}
)

// newMetrics makes the metrics, with the series of all values that their labels may have: one that begins with its
// first event hides that event from rate() and increase().
func newMetrics() *metrics {
	reg := prometheus.NewRegistry()
	reg.MustRegister(collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	f := promauto.With(reg)
	histogram := func(name, help string, buckets []float64, labels []string, values ...[]string) *prometheus.HistogramVec {
		v := f.NewHistogramVec(prometheus.HistogramOpts{Name: name, Help: help, Buckets: buckets}, labels)
		initialise(v.MetricVec, nil, values...)
		return v
	}
	counter := func(name, help string, labels []string, values ...[]string) *prometheus.CounterVec {
		v := f.NewCounterVec(prometheus.CounterOpts{Name: name, Help: help}, labels)
		initialise(v.MetricVec, nil, values...)
		return v
	}
	f.NewGaugeVec(prometheus.GaugeOpts{Name: "auth_build_info", Help: "1; the labels say what runs."},
		[]string{"version", "goversion"}).WithLabelValues(version(), runtime.Version()).Set(1)
	var differences []string
	for d := range descriptions {
		differences = append(differences, string(d))
	}
	return &metrics{
		registry: reg,
		requests: histogram("auth_http_request_duration_seconds", "Time to answer a request, but for a check of a token.",
			seconds, []string{"route", "method", "status"}),
		validations: observers(histogram("auth_validate_duration_seconds", "Time to check a token for a gateway.",
			fractions, []string{"status"}), statusClasses),
		problems: counter("auth_problems_total", "Errors answered to clients, by problem type.",
			[]string{"type"}, slices.Collect(maps.Keys(problems))),
		panics: counter("auth_panics_total", "Handlers that panicked.", nil).WithLabelValues(),
		registrations: counter("auth_registrations_total", "Steps of registrations and invitations, as audited.",
			[]string{"step"}, steps),
		mails: counter("auth_verification_mails_total", "Verification mails handed to Keycloak.",
			[]string{"outcome"}, []string{"sent", "failed"}),
		signIns: counter("auth_sign_ins_total", "Sign-ins that came to an end: ok, or the problem type.",
			[]string{"flow", "outcome"}, flows, signInEnds),
		reuse: counter("auth_refresh_token_reuse_total", "Sessions ended because of an old token.", nil).WithLabelValues(),
		dropped: counter("auth_audit_refusals_dropped_total", "Refusals that were too many to be audited.",
			[]string{"action"}),
		keycloak: histogram("auth_keycloak_call_duration_seconds", "Time of calls to Keycloak.",
			seconds, []string{"operation", "outcome"}, keycloakOperations, outcomes),
		tasks: counter("auth_tasks_total", "Tasks of the queue that were done or have failed.",
			[]string{"kind", "outcome"}, taskKinds, outcomes),
		synced: counter("auth_sync_differences_total", "Differences that full passes found.",
			[]string{"class", "outcome"}, differences, []string{"repaired", "remaining"}),
		passes: counter("auth_sync_passes_total", "Full passes that came to an end; dry runs are none.",
			[]string{"status"}, passStatuses),
	}
}

// initialise makes the series of all values of the labels behind those that are given. Without any it fails for the
// metrics of routes, which addRoute initialises.
func initialise(v *prometheus.MetricVec, given []string, values ...[]string) {
	if len(values) == 0 {
		_, _ = v.GetMetricWithLabelValues(given...)
		return
	}
	first, rest := values[0], values[1:] // #nosec G602 -- there is one
	for _, value := range first {
		initialise(v, append(slices.Clip(given), value), rest...)
	}
}

// observers are those of v by its only label.
func observers(v *prometheus.HistogramVec, values []string) map[string]prometheus.Observer {
	of := map[string]prometheus.Observer{}
	for _, value := range values {
		of[value] = v.WithLabelValues(value)
	}
	return of
}

// addRoute makes the series of a route.
func (m *metrics) addRoute(name string, patterns ...string) {
	m.dropped.WithLabelValues(name)
	for _, pattern := range patterns {
		if method, path, ok := strings.Cut(pattern, " "); ok {
			initialise(m.requests.MetricVec, []string{path, method}, statusClasses)
		}
	}
}

// watch adds what is looked up when Prometheus asks for it.
func (m *metrics) watch(s *server) {
	f, stat := promauto.With(m.registry), s.store.pool.Stat
	gauge := func(name, help string, value func() float64) {
		f.NewGaugeFunc(prometheus.GaugeOpts{Name: name, Help: help}, value)
	}
	counter := func(name, help string, value func() float64) {
		f.NewCounterFunc(prometheus.CounterOpts{Name: name, Help: help}, value)
	}
	gauge("auth_database_pool_acquired_connections", "Connections to PostgreSQL that are in use.",
		func() float64 { return float64(stat().AcquiredConns()) })
	gauge("auth_database_pool_max_connections", "The most connections that this instance opens.",
		func() float64 { return float64(stat().MaxConns()) })
	counter("auth_database_pool_waits_total", "Times that no connection was free.",
		func() float64 { return float64(stat().EmptyAcquireCount()) })
	counter("auth_database_pool_wait_seconds_total", "How long was waited for a connection to be free or opened.",
		func() float64 { return stat().EmptyAcquireWaitTime().Seconds() })
	gauge("auth_revocations_read_timestamp_seconds", "When the revocations were read last; 0: not yet.",
		func() float64 { return max(0, float64(s.verifier.revoked.lastRead().UnixMilli())/1000) })
	gauge("auth_signing_keys_read_timestamp_seconds", "When Keycloak's keys were read last; 0: not yet.",
		func() float64 { return max(0, float64(s.verifier.keys.Load().read.UnixMilli())/1000) })
	m.registry.MustRegister(queueState{s})
}

// queueState asks PostgreSQL what is due. It is the same for all instances.
type queueState struct{ *server }

var (
	tasksDue = prometheus.NewDesc("auth_tasks_due", "Tasks of the queue that are due, by kind; of all instances, "+
		"and no more than the 1,000 oldest.", []string{"kind"}, nil)
	oldestDue = prometheus.NewDesc("auth_task_oldest_due_seconds", "How long the oldest task that is due has waited, "+
		"of all instances; NaN: PostgreSQL does not say.", nil, nil)
)

func (q queueState) Describe(to chan<- *prometheus.Desc) { to <- tasksDue; to <- oldestDue }

func (q queueState) Collect(to chan<- prometheus.Metric) {
	ctx, cancel := context.WithTimeout(context.Background(), time.Second)
	defer cancel()
	now := q.now()
	due, oldest, err := q.store.tasksDue(ctx, now)
	age := now.Sub(oldest).Seconds()
	if err != nil {
		age = math.NaN()
	} else {
		for _, kind := range taskKinds {
			to <- prometheus.MustNewConstMetric(tasksDue, prometheus.GaugeValue, float64(due[kind]), kind)
		}
	}
	to <- prometheus.MustNewConstMetric(oldestDue, prometheus.GaugeValue, age)
}
