"""Figures of a running server, in the form that Prometheus reads.

Counts and times only: no prompt, no answer and nobody's name. Experts go by name, which everybody
who may ask can see.
"""

from collections.abc import Callable, Iterable
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from flexolmo.inference.engine import EngineStats

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class Metrics:
    """The figures of one server."""

    def __init__(self, stats: Callable[[], EngineStats] | None = None):
        """Begin at zero; `stats` are those of the engine, if there is one."""
        self.registry = CollectorRegistry()
        if stats is not None:
            self.registry.register(_EngineFigures(stats))
        self.responses = self._counter(
            "flexolmo_http_responses", "HTTP responses begun.", ["route", "status"]
        )
        self.seconds = self._times(
            "flexolmo_http_response_seconds", "Time to the end of a response.", ["route"]
        )
        self.endings = self._counter(
            "flexolmo_endings", "Texts that ended, by the reason for which they did.", ["reason"]
        )
        self.refusals = self._counter(
            "flexolmo_refusals", "Requests that were refused, by the error's code.", ["code"]
        )
        self.uses = self._counter(
            "flexolmo_expert_requests", "Requests that an expert was on for.", ["expert"]
        )
        self.first_token = self._times(
            "flexolmo_first_token_seconds", "Time from a decision to a text's first token."
        )
        self.next_token = self._times(
            "flexolmo_next_token_seconds", "Time between tokens of a text."
        )
        self.audit_failures = self._counter(
            "flexolmo_audit_failures", "Entries that could not be written to the audit log."
        )
        self.upkeep_failures = self._counter(
            "flexolmo_upkeep_failures",
            "Changes of files, or of an issuer's keys, that could not be taken over.",
            ["what"],
        )

    def _counter(self, name: str, meaning: str, labels: Iterable[str] = ()) -> Counter:
        return Counter(name, meaning, labels, registry=self.registry)

    def _times(self, name: str, meaning: str, labels: Iterable[str] = ()) -> Histogram:
        return Histogram(name, meaning, labels, registry=self.registry, buckets=_SECONDS)

    def expose(self) -> bytes:
        """All figures, in Prometheus' text format."""
        return generate_latest(self.registry)


class _EngineFigures(Collector):
    """The engine's own figures, read when they are asked for."""

    def __init__(self, stats: Callable[[], EngineStats]):
        self._stats = stats

    def collect(self) -> Iterable[Metric]:
        found = self._stats()
        gauges: dict[str, tuple[Any, str]] = {
            "running": (found.running, "Texts in the batch."),
            "waiting": (found.waiting, "Texts that wait for a place in the batch."),
            "block_bytes": (found.block_bytes, "Memory for keys and values, as budgeted."),
            "blocks": (found.blocks, "Blocks of that memory."),
            "free_blocks": (found.free_blocks, "Blocks that hold nothing."),
            "cached_blocks": (found.cached_blocks, "Blocks of the prefix cache."),
            "loaded_experts": (len(found.loaded_experts), "Experts in memory."),
        }
        counters: dict[str, tuple[int, str]] = {
            "prompt_tokens": (found.prompt_tokens, "Tokens of prompts read."),
            "cached_tokens": (found.cached_tokens, "Tokens of prompts not read again."),
            "written_tokens": (found.written_tokens, "Tokens written."),
        }
        for name, (value, meaning) in gauges.items():
            yield GaugeMetricFamily(f"flexolmo_engine_{name}", meaning, value=value)
        for name, (value, meaning) in counters.items():
            yield CounterMetricFamily(f"flexolmo_engine_{name}", meaning, value=value)
