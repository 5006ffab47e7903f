"""Prometheus metrics under vLLM's names, in a registry of the app's own."""

from __future__ import annotations

from collections.abc import Iterable

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from moeforge.serve.async_engine import AsyncEngine

CONTENT_TYPE = CONTENT_TYPE_LATEST
_LABELS = ("model_name",)
_FIRST_TOKEN = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0,
    160.0, 640.0, 2560.0,
)  # fmt: skip
_BETWEEN_TOKENS = (
    0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0,
)  # fmt: skip
_WHOLE = (
    0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0, 960.0,
    1920.0, 7680.0,
)  # fmt: skip


class Metrics:
    """Latencies, observed by the server as tokens come, beside the engine's own counters, read when asked for."""

    def __init__(self, engine: AsyncEngine, model: str) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(_EngineCollector(engine, model))

        def histogram(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(f"vllm:{name}", text, _LABELS, registry=self._registry, buckets=buckets).labels(model)

        self.first_token = histogram("time_to_first_token_seconds", "Time to the first token.", _FIRST_TOKEN)
        self.between_tokens = histogram("inter_token_latency_seconds", "Time between two tokens.", _BETWEEN_TOKENS)
        self.whole = histogram("e2e_request_latency_seconds", "Time from request to last token.", _WHOLE)

    def text(self) -> bytes:
        """The exposition, of type CONTENT_TYPE."""
        return generate_latest(self._registry)


class _EngineCollector(Collector):
    def __init__(self, engine: AsyncEngine, model: str) -> None:
        self._engine, self._model = engine, model

    def collect(self) -> Iterable[Metric]:
        stats = self._engine.stats
        for name, text, value in (
            ("num_requests_running", "Sequences in the running batch.", stats.num_running),
            ("num_requests_waiting", "Sequences that wait for a place.", stats.num_waiting),
            ("kv_cache_usage_perc", "Share of the KV cache in use, 0 to 1.", stats.kv_cache_usage),
        ):
            gauge = GaugeMetricFamily(f"vllm:{name}", text, labels=_LABELS)
            gauge.add_metric([self._model], value)
            yield gauge
        for name, text, value in (
            ("prompt_tokens", "Prompt tokens processed.", stats.prompt_tokens),
            ("generation_tokens", "Tokens generated.", stats.generation_tokens),
            ("num_preemptions", "Sequences put back to free memory.", stats.preemptions),
            ("prefix_cache_queries", "Prompt tokens looked up in the prefix cache.", stats.prefix_queries),
            ("prefix_cache_hits", "Prompt tokens found in the prefix cache.", stats.prefix_hits),
        ):
            counter = CounterMetricFamily(f"vllm:{name}", text, labels=_LABELS)
            counter.add_metric([self._model], value)
            yield counter
        finished = CounterMetricFamily(
            "vllm:request_success", "Finished sequences.", labels=(*_LABELS, "finished_reason")
        )
        for reason in ("stop", "length", "abort"):
            finished.add_metric([self._model, reason], stats.requests_by_finish_reason.get(reason, 0))
        yield finished
