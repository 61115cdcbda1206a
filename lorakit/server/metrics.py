"""What Prometheus reads: vLLM's names where the meaning is vLLM's, and `lorakit:` for what it does not tell.

Gauges and counters are read from the engine when they are asked for; only histograms are kept here.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from lorakit.engine.handle import RequestHandle
from lorakit.engine.stats import EngineStats
from lorakit.server.served import Served

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
_TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000, 50000, 100000)
_STATES = ("ready", "restarting", "dead")


class Metrics:
    """The metrics of one server."""

    def __init__(self, served: Callable[[], Served | None]) -> None:
        """Has seen no request yet.

        Args:
            served: what is served, once it has been loaded.
        """
        self._registry = CollectorRegistry()
        self._served = served
        self._registry.register(_OfEngine(served))

        def histogram(name: str, what: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(name, what, ["model_name"], buckets=buckets, registry=self._registry)

        self._first = histogram("vllm:time_to_first_token_seconds", "Until the first token.", _SECONDS)
        self._between = histogram("vllm:inter_token_latency_seconds", "Between two tokens of a sequence.", _SECONDS)
        self._whole = histogram("vllm:e2e_request_latency_seconds", "Until a sequence's end.", _SECONDS)
        self._queued = histogram("vllm:request_queue_time_seconds", "Until a sequence joined the batch.", _SECONDS)
        self._prompt = histogram("vllm:request_prompt_tokens", "Tokens of a prompt.", _TOKENS)
        self._generated = histogram("vllm:request_generation_tokens", "Tokens of a sequence generated.", _TOKENS)
        labels = ["model_name", "finished_reason"]
        self._success = Counter("vllm:request_success", "Sequences that have ended.", labels, registry=self._registry)
        self._failed = Counter(
            "lorakit:request_failures", "Requests that have failed, by error.", ["error"], registry=self._registry
        )
        self._news: queue.SimpleQueue[RequestHandle | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="lorakit-metrics", daemon=True)
        self._thread.start()

    def text(self) -> bytes:
        """All of them, in Prometheus' text format."""
        return generate_latest(self._registry)

    def ended(self, handle: RequestHandle) -> None:
        """Takes a request that has ended into account, soon."""
        self._news.put(handle)

    def close(self) -> None:
        """Takes the last ones into account."""
        self._news.put(None)
        self._thread.join()

    def _run(self) -> None:
        # A long answer has thousands of times between tokens: too much for the engine to wait for.
        while (handle := self._news.get()) is not None:
            served = self._served()
            self._observe(handle, "" if served is None else served.base_id)

    def _observe(self, handle: RequestHandle, base: str) -> None:
        self._prompt.labels(base).observe(len(handle.request.prompt))
        if handle.error is not None:
            self._failed.labels(type(handle.error).__name__).inc()
        for sequence in range(handle.request.n):
            completion = handle.completion(sequence)
            if completion is None:
                continue
            reason = {"cancelled": "abort"}.get(completion.finish_reason, completion.finish_reason)
            self._success.labels(base, reason).inc()
            self._generated.labels(base).observe(len(completion.token_ids))
            self._whole.labels(base).observe(completion.seconds)
            if completion.queued is not None:
                self._queued.labels(base).observe(completion.queued)
            if completion.times:
                self._first.labels(base).observe(completion.times[0])
            between = self._between.labels(base)
            for before, after in zip(completion.times, completion.times[1:], strict=False):
                between.observe(after - before)


class _OfEngine(Collector):
    """What the engine knows itself."""

    def __init__(self, served: Callable[[], Served | None]) -> None:
        self._served = served

    def collect(self) -> Iterator[Metric]:
        """Reads it now."""
        served = self._served()
        if served is None:
            return
        stats = served.engine.stats()
        yield from _of_vllm(stats, served)
        yield from _of_adapters(stats)
        yield from _of_tenants(stats)

    def describe(self) -> Iterator[Metric]:
        """Nothing is asked for when it is registered: the engine may not be there yet."""
        return iter(())


def _of_vllm(stats: EngineStats, served: Served) -> Iterator[Metric]:
    base, tenants = {"model_name": served.base_id}, stats.tenants.values()
    yield _gauge("vllm:num_requests_running", "Sequences in the batch.", sum(stats.running.values()), base)
    yield _gauge("vllm:num_requests_waiting", "Sequences that have not begun.", sum(stats.waiting.values()), base)
    yield _gauge("vllm:kv_cache_usage_perc", "Share of the key-value cache in use, 0 to 1.", 1 - stats.cache_free, base)
    prompts, cached = sum(one.prompt_tokens for one in tenants), sum(one.cached_tokens for one in tenants)
    yield _counter("vllm:prompt_tokens", "Tokens of prompts.", prompts, base)
    yield _counter("vllm:generation_tokens", "Generated tokens.", sum(one.generated_tokens for one in tenants), base)
    yield _counter("vllm:prefix_cache_queries", "Tokens of prompts that were looked up.", prompts, base)
    yield _counter("vllm:prefix_cache_hits", "Those of them that the prefix cache had.", cached, base)
    # The value is the time, as in vLLM: of several label sets the newest holds.
    yield _gauge(
        "vllm:lora_requests_info",
        "Adapters whose requests run and wait, and how many the device has room for.",
        time.time(),
        {
            "max_lora": str(_room(stats, len(served.names))),
            "running_lora_adapters": ",".join(sorted(name for name in stats.running if name is not None)),
            "waiting_lora_adapters": ",".join(sorted(name for name in stats.waiting if name is not None)),
        },
    )


def _room(stats: EngineStats, adapters: int) -> int:
    """How many adapters of the mean size the device holds at once; without a limit as many as there are."""
    if stats.device.limit is None or not stats.device.adapters:
        return max(1, adapters)
    return max(1, stats.device.limit * stats.device.adapters // max(1, stats.device.nbytes))


def _of_adapters(stats: EngineStats) -> Iterator[Metric]:
    adapters = GaugeMetricFamily("lorakit:adapters", "Adapters in a kind of memory.", labels=["tier"])
    nbytes = GaugeMetricFamily("lorakit:adapter_bytes", "Bytes that they take.", labels=["tier"])
    limits = GaugeMetricFamily(
        "lorakit:adapter_limit_bytes", "Bytes that they may take; none: no limit.", labels=["tier"]
    )
    for name, tier in (("device", stats.device), ("host", stats.host)):
        adapters.add_metric([name], tier.adapters)
        nbytes.add_metric([name], tier.nbytes)
        if tier.limit is not None:
            limits.add_metric([name], tier.limit)
    yield from (adapters, nbytes, limits)
    loads = stats.loads
    yield _counter("lorakit:adapter_reads", "Adapters brought into host memory.", loads.reads)
    yield _counter("lorakit:adapter_read_seconds", "What that took.", loads.read_seconds)
    yield _counter("lorakit:adapter_loads", "Adapters brought to the device.", loads.copies)
    yield _counter("lorakit:adapter_load_bytes", "Bytes of them.", loads.copied_bytes)
    yield _counter("lorakit:adapter_load_seconds", "What that took, for requests.", loads.copy_seconds)
    yield _counter("lorakit:adapter_evictions", "Adapters that made room on the device.", loads.evictions)
    yield _gauge("lorakit:replicas", "Engines that serve.", stats.replicas)
    yield _counter("lorakit:forwards", "Forwards since the engine's loop began.", stats.steps)
    yield _counter("lorakit:segments", "Adapters of each of them, the base being one, summed.", stats.segments)
    state = GaugeMetricFamily("lorakit:engine_state", "1 for the state that the engine is in.", labels=["state"])
    for name in _STATES:
        state.add_metric([name], float(stats.state == name))
    yield state


def _of_tenants(stats: EngineStats) -> Iterator[Metric]:
    counters = {
        name: CounterMetricFamily(f"lorakit:tenant_{name}", what, labels=["tenant"])
        for name, what in (
            ("requests", "Requests of a tenant's."),
            ("prompt_tokens", "Tokens of their prompts."),
            ("cached_tokens", "Those of them that the prefix cache had."),
            ("generated_tokens", "Tokens generated for them."),
        )
    }
    gauges = {
        name: GaugeMetricFamily(f"lorakit:tenant_{name}", what, labels=["tenant"])
        for name, what in (
            ("running", "Sequences of a tenant's in the batch."),
            ("waiting", "Those that have not begun."),
        )
    }
    for tenant, usage in stats.tenants.items():
        for name, metric in (counters | gauges).items():
            metric.add_metric([tenant], getattr(usage, name))
    yield from (counters | gauges).values()


def _gauge(name: str, what: str, value: float, labels: dict[str, str] | None = None) -> Metric:
    found = GaugeMetricFamily(name, what, labels=list(labels or ()))
    found.add_metric(list((labels or {}).values()), value)
    return found


def _counter(name: str, what: str, value: float, labels: dict[str, str] | None = None) -> Metric:
    found = CounterMetricFamily(name, what, labels=list(labels or ()))
    found.add_metric(list((labels or {}).values()), value)
    return found
