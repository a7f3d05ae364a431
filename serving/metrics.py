"""Prometheus metrics under vLLM's names, so that existing dashboards and gateways work, and ``fly:`` for ours.

What the engine counts is read from its statistics at each scrape; latencies are those that clients see, measured
here. Each application has its own registry.

A switch's cutover is a histogram, since it is final once reported. Its worst gap is a gauge of the last switch: it
grows until the last stream that it held up goes on, and a histogram can take nothing back.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from fly_jax.outputs import EngineStats, FinishReason, SwitchReport, SwitchStrategy
from fly_jax.policy.adaptive import DecisionKind
from serving.connections import ConnectionCounts

MODEL = "model_name"
TTFT_BUCKETS = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160)
ITL_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 10)
E2E_BUCKETS = (0.05, 0.1, 0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960)
CUTOVER_BUCKETS = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)
# What the policy may decide, and what may become of it; holding the layout is no decision to count.
DECISIONS = (*(kind.value for kind in DecisionKind if kind is not DecisionKind.HOLD), "refused", "given_up")


class EngineCollector(Collector):
    """Counters and gauges: of the connections, and the engine's own from the statistics that the scrape has read."""

    def __init__(self, model_name: str, connections: ConnectionCounts) -> None:
        self.stats: EngineStats | None = None
        self._model, self._connections = model_name, connections

    def collect(self) -> Iterator[Metric]:
        yield from self._of_connections(self._connections)
        stats = self.stats
        if stats is None:
            return
        yield from self._gauges(stats)
        yield from self._counters(stats)
        yield from self._labelled_counters(stats)
        yield self._info("fly:layout_info", "1 for the layout in use.", "layout", stats.layout)
        yield self._info("fly:policy_info", "1 for the layout policy in force.", "policy", stats.policy)
        if stats.last_switch is not None:
            yield from self._last_switch(stats.last_switch)

    def _of_connections(self, counts: ConnectionCounts) -> Iterator[Metric]:
        yield self._gauge("fly:http_connections", "Open connections.", counts.open)
        yield self._counter("fly:http_connections_refused", "Connections beyond the limit.", counts.refused)
        timed_out = {str(phase): count for phase, count in counts.timed_out.items()}
        text = "Connections closed by what they kept the server waiting for."
        yield self._labelled_counter("fly:http_connections_timed_out", text, "phase", timed_out)

    def _gauges(self, stats: EngineStats) -> Iterator[Metric]:
        yield self._gauge("vllm:num_requests_running", "Requests being computed.", stats.running)
        yield self._gauge("vllm:num_requests_waiting", "Requests in the queue.", stats.waiting)
        yield self._gauge("fly:num_requests_paused", "Requests whose KV waits for its group.", stats.paused)
        yield self._gauge("vllm:kv_cache_usage_perc", "Used fraction of the KV blocks, 0 to 1.", stats.kv_usage)
        yield self._gauge(
            "fly:compiles_after_warmup", "Compiles while serving; must stay 0.", stats.compiles_after_warmup
        )

    def _labelled_counters(self, stats: EngineStats) -> Iterator[Metric]:
        """Every series from the start, at 0: a rate over one that appears with its first event misses that event."""
        for name, text, label, known, counts in (
            ("vllm:request_success", "Requests by the reason they ended.", "finished_reason",
             FinishReason, stats.requests_finished),
            ("fly:switches", "Changes of layout by strategy.", "strategy", SwitchStrategy, stats.switches),
            ("fly:layout_decisions", "What the layout policy decided.", "decision", DECISIONS, stats.decisions),
        ):  # fmt: skip
            yield self._labelled_counter(name, text, label, {str(key): 0 for key in known} | counts)

    def _last_switch(self, report: SwitchReport) -> Iterator[Metric]:
        for name, text, value in (
            ("drain_seconds", "How long the last switch waited for old work.", report.drain_seconds),
            ("precopy_seconds", "How long the last switch copied KV while old work went on.", report.precopy_seconds),
            ("cutover_seconds", "The last switch: last old step launched to first new one.", report.cutover_seconds),
            ("worst_gap_seconds", "Longest that a stream stood still in the last switch.", report.worst_gap_seconds),
            ("kv_bytes_moved", "KV bytes that the last switch moved.", report.kv_bytes_moved),
            ("kv_blocks_moved", "KV blocks that the last switch moved.", report.kv_blocks_moved),
            ("relayout_launches", "Programs launched to move KV in the last switch.", report.relayout_launches),
            ("tokens_recomputed", "Tokens whose KV the last switch gave up.", report.tokens_recomputed),
        ):
            yield self._gauge(f"fly:last_switch_{name}", text, value)

    def _counters(self, stats: EngineStats) -> Iterator[Metric]:
        yield self._counter("vllm:prompt_tokens", "Prompt tokens computed.", stats.prompt_tokens)
        yield self._counter("vllm:generation_tokens", "Tokens generated.", stats.generation_tokens)
        yield self._counter(
            "vllm:num_preemptions", "Requests taken out of a step for lack of blocks.", stats.preemptions
        )
        yield self._counter(
            "vllm:corrupted_requests", "Requests ended by NaN or infinite logits.", stats.corrupted_requests
        )
        recomputed, moved = stats.switch_tokens_recomputed, stats.switch_kv_bytes_moved
        yield self._counter("fly:switch_tokens_recomputed", "Tokens computed again after switches.", recomputed)
        yield self._counter("fly:switch_kv_bytes_moved", "KV bytes that switches moved.", moved)

    def _gauge(self, name: str, text: str, value: float) -> Metric:
        family = GaugeMetricFamily(name, text, labels=[MODEL])
        family.add_metric([self._model], value)
        return family

    def _counter(self, name: str, text: str, value: float) -> Metric:
        family = CounterMetricFamily(name, text, labels=[MODEL])
        family.add_metric([self._model], value)
        return family

    def _info(self, name: str, text: str, label: str, value: str) -> Metric:
        family = GaugeMetricFamily(name, text, labels=[MODEL, label])
        family.add_metric([self._model, value], 1)
        return family

    def _labelled_counter(self, name: str, text: str, label: str, values: dict[str, int]) -> Metric:
        family = CounterMetricFamily(name, text, labels=[MODEL, label])
        for key, value in values.items():
            family.add_metric([self._model, str(key)], value)
        return family


class ServerMetrics:
    """One application's registry."""

    content_type = CONTENT_TYPE_LATEST

    def __init__(self, model_name: str, connections: ConnectionCounts) -> None:
        self._registry = CollectorRegistry()
        self._engine = EngineCollector(model_name, connections)
        self._registry.register(self._engine)
        self.time_to_first_token = self._histogram(
            "vllm:time_to_first_token_seconds", "Arrival to first token.", model_name, TTFT_BUCKETS
        )
        self.inter_token_latency = self._histogram(
            "vllm:inter_token_latency_seconds", "Gap between the tokens of one request.", model_name, ITL_BUCKETS
        )
        self.e2e_request_latency = self._histogram(
            "vllm:e2e_request_latency_seconds", "Arrival to the end of a request.", model_name, E2E_BUCKETS
        )

        self._switch_cutover = self._histogram(
            "fly:switch_cutover_seconds", "Last old step launched to first new one.", model_name, CUTOVER_BUCKETS
        )
        self._last_observed_switch = 0

    def _histogram(self, name: str, text: str, model_name: str, buckets: tuple[float, ...]) -> Histogram:
        histogram = Histogram(name, text, labelnames=[MODEL], buckets=buckets, registry=self._registry)
        return histogram.labels(model_name)

    def render(self, stats: EngineStats | None) -> bytes:
        """The text of a scrape; without statistics, only what the server measured itself."""
        self._engine.stats = stats
        if stats is not None:
            self._observe_switches(stats.switch_history)
        return generate_latest(self._registry)

    def _observe_switches(self, history: Sequence[SwitchReport]) -> None:
        """Each switch once, when it has settled; those that have left the history by then are not seen."""
        for report in history:
            if not report.settled:
                return
            if report.number > self._last_observed_switch:
                self._switch_cutover.observe(report.cutover_seconds)
                self._last_observed_switch = report.number
