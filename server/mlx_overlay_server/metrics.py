"""Metrics for Prometheus (`/metrics`). Values that other modules keep are read when the metrics are asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)


class Gauges:
    """A Prometheus collector of values that are read from elsewhere: name -> (help, value)."""

    def __init__(self, read: Callable[[], dict[str, tuple[str, float]]], counters: frozenset[str]) -> None:
        self._read = read
        self._counters = counters

    def collect(self) -> Iterator[Metric]:
        """Yield the metrics as they are now; prometheus_client calls this."""
        for name, (text, value) in self._read().items():
            family = CounterMetricFamily if name in self._counters else GaugeMetricFamily
            yield family(f"mlx_omni_{name}", text, value=value)


class Metrics:
    """The metrics of one server, in a registry of its own."""

    def __init__(
        self, read: Callable[[], dict[str, tuple[str, float]]], counters: frozenset[str] = frozenset()
    ) -> None:
        """`read` returns the values that other modules keep; `counters` names those of them that only grow."""
        self.registry = CollectorRegistry()
        self.registry.register(Gauges(read, counters))
        self.requests = Counter(
            "mlx_omni_requests", "Requests by route and status.", ["route", "status"], registry=self.registry
        )
        self.prompt_tokens = Counter(
            "mlx_omni_prompt_tokens", "Tokens of prompts, reused ones included.", registry=self.registry
        )
        self.cached_tokens = Counter(
            "mlx_omni_cached_tokens", "Tokens of prompts found in the KV cache.", registry=self.registry
        )
        self.cache_hits = Counter(
            "mlx_omni_cache_hits", "Prompts whose beginning was in the KV cache.", registry=self.registry
        )
        self.completion_tokens = Counter("mlx_omni_completion_tokens", "Tokens generated.", registry=self.registry)
        self.texts = Counter("mlx_omni_texts", "Texts embedded or ranked.", registry=self.registry)
        self.text_tokens = Counter(
            "mlx_omni_text_tokens", "Tokens of texts that were embedded or ranked.", registry=self.registry
        )
        self.heard_seconds = Counter(
            "mlx_omni_heard_seconds", "Seconds of recordings that were transcribed.", registry=self.registry
        )
        self.spoken_seconds = Counter(
            "mlx_omni_spoken_seconds", "Seconds of sound that texts were spoken in.", registry=self.registry
        )
        self.first_token = Histogram(
            "mlx_omni_time_to_first_token_seconds",
            "From the request to its first token.",
            buckets=_SECONDS,
            registry=self.registry,
        )

    def text(self) -> bytes:
        """Return all metrics in Prometheus's text format."""
        return generate_latest(self.registry)
