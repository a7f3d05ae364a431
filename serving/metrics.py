"""Prometheus metrics under vLLM's names, so that existing dashboards and gateways work, and ``fly:`` for ours.

What the engine counts is read from its statistics at each scrape; latencies are those that clients see, measured
here. Each application has its own registry.
"""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from fly_jax.outputs import EngineStats

MODEL = "model_name"
TTFT_BUCKETS = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160)
ITL_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 10)
E2E_BUCKETS = (0.05, 0.1, 0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960)


class EngineCollector(Collector):
    """The engine's own counters and gauges, from the statistics that the scrape has just read."""

    def __init__(self, model_name: str) -> None:
        self.stats: EngineStats | None = None
        self._model = model_name

    def collect(self) -> Iterator[Metric]:
        stats = self.stats
        if stats is None:
            return
        yield from self._gauges(stats)
        yield from self._counters(stats)
        yield self._labelled_counter(
            "vllm:request_success", "Requests by the reason they ended.", "finished_reason", stats.requests_finished
        )
        layout = GaugeMetricFamily("fly:layout_info", "1 for the layout in use.", labels=[MODEL, "layout"])
        layout.add_metric([self._model, stats.layout], 1)
        yield layout

    def _gauges(self, stats: EngineStats) -> Iterator[Metric]:
        yield self._gauge("vllm:num_requests_running", "Requests being computed.", stats.running)
        yield self._gauge("vllm:num_requests_waiting", "Requests in the queue.", stats.waiting)
        yield self._gauge("vllm:kv_cache_usage_perc", "Used fraction of the KV blocks, 0 to 1.", stats.kv_usage)
        yield self._gauge(
            "fly:compiles_after_warmup", "Compiles while serving; must stay 0.", stats.compiles_after_warmup
        )
        if stats.last_switch is not None:
            drain, cutover = stats.last_switch.drain_seconds, stats.last_switch.cutover_seconds
            yield self._gauge("fly:switch_drain_seconds", "How long the last switch waited for old work.", drain)
            yield self._gauge("fly:switch_cutover_seconds", "How long the last switch itself took.", cutover)

    def _counters(self, stats: EngineStats) -> Iterator[Metric]:
        yield self._counter("vllm:prompt_tokens", "Prompt tokens computed.", stats.prompt_tokens)
        yield self._counter("vllm:generation_tokens", "Tokens generated.", stats.generation_tokens)
        yield self._counter(
            "vllm:num_preemptions", "Requests taken out of a step for lack of blocks.", stats.preemptions
        )
        yield self._counter("fly:switches", "Changes of layout.", stats.switches)

    def _gauge(self, name: str, text: str, value: float) -> Metric:
        family = GaugeMetricFamily(name, text, labels=[MODEL])
        family.add_metric([self._model], value)
        return family

    def _counter(self, name: str, text: str, value: float) -> Metric:
        family = CounterMetricFamily(name, text, labels=[MODEL])
        family.add_metric([self._model], value)
        return family

    def _labelled_counter(self, name: str, text: str, label: str, values: dict[str, int]) -> Metric:
        family = CounterMetricFamily(name, text, labels=[MODEL, label])
        for key, value in values.items():
            family.add_metric([self._model, str(key)], value)
        return family


class ServerMetrics:
    """One application's registry."""

    content_type = CONTENT_TYPE_LATEST

    def __init__(self, model_name: str) -> None:
        self._registry = CollectorRegistry()
        self._engine = EngineCollector(model_name)
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

    def _histogram(self, name: str, text: str, model_name: str, buckets: tuple[float, ...]) -> Histogram:
        histogram = Histogram(name, text, labelnames=[MODEL], buckets=buckets, registry=self._registry)
        return histogram.labels(model_name)

    def render(self, stats: EngineStats | None) -> bytes:
        """The text of a scrape; without statistics, only what the server measured itself."""
        self._engine.stats = stats
        return generate_latest(self._registry)
