"""Every metric of Lathe, declared once, and the endpoint that shows them.

`python -m lathe.common.metrics` prints docs/metrics.md. gRPC's metrics have their conventional names, so that
existing dashboards work.
"""

from __future__ import annotations

import errno
from collections.abc import Iterable
from threading import Thread
from typing import Protocol
from wsgiref.simple_server import WSGIServer

import prometheus_client
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.metrics import MetricWrapperBase

from lathe.common.errors import FailedPrecondition

_GRPC_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_HTTP_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
_STEP_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160)
_WAIT_SECONDS = (0.1, 0.5, 1, 5, 15, 30, 60, 300, 900, 1800, 3600, 7200, 14400, 43200, 86400)
# The next two are vLLM's buckets, so that the numbers of both can be laid side by side.
_FIRST_TOKEN_SECONDS = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0),
    *(20.0, 40.0, 80.0, 160.0, 640.0, 2560.0),
)
_OUTPUT_TOKEN_SECONDS = (
    *(0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0),
    *(20.0, 40.0, 80.0),
)
ENGINE_ENDS = ("stopped", "failed", "died", "lost")
_GRPC_LABELS = ("grpc_type", "grpc_service", "grpc_method")


class Metrics:
    """All metrics of one process, on a registry of its own. `main` makes one and passes it on."""

    def __init__(self, version: str = "", registry: CollectorRegistry | None = None) -> None:
        # `…_created` series double the output and trip promtool.
        prometheus_client.disable_created_metrics()  # type: ignore[no-untyped-call]
        self.registry = registry if registry is not None else CollectorRegistry()
        self._declare_grpc(self.registry)
        self._declare_control(self.registry)
        self._declare_engine(self.registry)
        self._declare_gateway(self.registry)
        self.build_info = Gauge(
            "lathe_build_info", "Always 1; the version is in the label.", ("version",), registry=self.registry
        )
        if version:
            self.build_info.labels(version=version).set(1)

    def _declare_grpc(self, reg: CollectorRegistry) -> None:
        self.grpc_started = Counter(
            "grpc_server_started_total", "Calls started on the server.", _GRPC_LABELS, registry=reg
        )
        self.grpc_handled = Counter(
            "grpc_server_handled_total",
            "Calls completed on the server, by status code.",
            (*_GRPC_LABELS, "grpc_code"),
            registry=reg,
        )
        self.grpc_handling_seconds = Histogram(
            "grpc_server_handling_seconds",
            "Time from the start of a call to its end.",
            _GRPC_LABELS,
            registry=reg,
            buckets=_GRPC_SECONDS,
        )

    def _declare_control(self, reg: CollectorRegistry) -> None:
        self.jobs = Gauge("lathe_jobs", "Jobs by state.", ("state",), registry=reg)
        self.engines = Gauge("lathe_engines", "Engines by state.", ("state",), registry=reg)
        self.job_queue_wait_seconds = Histogram(
            "lathe_job_queue_wait_seconds",
            "Time from queued to the first lease.",
            registry=reg,
            buckets=_WAIT_SECONDS,
        )
        self.job_oldest_wait_seconds = Gauge(
            "lathe_job_oldest_wait_seconds",
            "How long the job that waits longest has been queued; 0 while none waits.",
            registry=reg,
        )
        self.engine_ends = Counter(
            "lathe_engine_ends_total",
            "Engines that are no more, by why: stopped (no longer needed), failed (it did not start), died "
            "(while it served) or lost (not heard of in time).",
            ("why",),
            registry=reg,
        )
        # Nobody sees a counter's first increase if there was no zero before it.
        for why in ENGINE_ENDS:
            self.engine_ends.labels(why)
        self.dependency_up = Gauge(
            "lathe_dependency_up",
            "1 while a service reaches what it depends on (database or store), 0 while it does not.",
            ("service", "dependency"),
            registry=reg,
        )
        self.datasets = Gauge("lathe_datasets", "Datasets by state.", ("state",), registry=reg)
        self.audits = Gauge(
            "lathe_audits",
            "Audits by state: running (waiting ones among them), ready, error (of the rows) or failed (for a while).",
            ("state",),
            registry=reg,
        )
        self.dataset_oldest_wait_seconds = Gauge(
            "lathe_dataset_oldest_wait_seconds",
            "How long the oldest import, validation or audit that is not done has been asked for; 0 without any.",
            ("task",),
            registry=reg,
        )
        self.upload_bytes = Counter(
            "lathe_upload_bytes_total", "Bytes taken in by uploads of every door.", registry=reg
        )

    def _declare_engine(self, reg: CollectorRegistry) -> None:
        self.engine_step_seconds = Histogram(
            "lathe_engine_step_seconds",
            "Time of one optimizer step, all its slices together.",
            registry=reg,
            buckets=_STEP_SECONDS,
        )
        self.engine_tokens = Counter(
            "lathe_engine_tokens_total",
            "Tokens through the model, by kind: train, prompt or sampled.",
            ("kind",),
            registry=reg,
        )
        self.engine_failed_sequences = Counter(
            "lathe_engine_failed_sequences_total",
            "Sequences that ended because the model gave NaN or infinity instead of a next token.",
            registry=reg,
        )
        self.engine_memory_bytes = Gauge(
            "lathe_engine_memory_bytes",
            "Memory that the engine holds: resident, or allocated on a GPU.",
            registry=reg,
        )
        self.engine_adapters_loaded = Gauge(
            "lathe_engine_adapters_loaded", "Adapters in the engine's memory.", registry=reg
        )

    def _declare_gateway(self, reg: CollectorRegistry) -> None:
        self.http_requests = Counter(
            "lathe_http_requests_total",
            "HTTP requests, by route template, method and status code.",
            ("route", "method", "code"),
            registry=reg,
        )
        self.http_request_seconds = Histogram(
            "lathe_http_request_seconds",
            "Time from the request's head to the last byte of its answer.",
            ("route",),
            registry=reg,
            buckets=_HTTP_SECONDS,
        )
        self.time_to_first_token_seconds = Histogram(
            "lathe_time_to_first_token_seconds",
            "Time from the request to its first sampled token.",
            registry=reg,
            buckets=_FIRST_TOKEN_SECONDS,
        )
        self.time_per_output_token_seconds = Histogram(
            "lathe_time_per_output_token_seconds",
            "Mean time per sampled token after the first, of one request.",
            registry=reg,
            buckets=_OUTPUT_TOKEN_SECONDS,
        )

        self.chat_tokens = Counter(
            "lathe_chat_tokens_total",
            "Tokens of chat requests, by kind: prompt, cached_prompt (part of prompt) or completion.",
            ("kind",),
            registry=reg,
        )

    def declared(self) -> Iterable[MetricWrapperBase]:
        """Every metric, in the order of declaration."""
        return (value for value in vars(self).values() if isinstance(value, MetricWrapperBase))


class _Server(Protocol):
    def __call__(self, *, port: int, addr: str, registry: CollectorRegistry) -> tuple[WSGIServer, Thread]: ...


class MetricsServer:
    """`GET /metrics` on a thread of its own, so that a busy event loop cannot hide what it does."""

    def __init__(self, registry: CollectorRegistry, host: str, port: int) -> None:
        """Raises FailedPrecondition if the port is taken. Port 0 picks a free one."""
        start: _Server = prometheus_client.start_http_server
        try:
            self._server, self._thread = start(port=port, addr=host, registry=registry)
        except OSError as error:
            if error.errno in (errno.EADDRINUSE, errno.EACCES):
                why = (
                    "is already in use"
                    if error.errno == errno.EADDRINUSE
                    else "may not be opened by this user"
                )
                raise FailedPrecondition(
                    f"The metrics port {host}:{port} {why}; choose another with metrics.port.",
                    reason="PORT_IN_USE",
                    metadata={"port": str(port)},
                ) from error
            raise FailedPrecondition(f"/metrics cannot listen on {host}:{port}: {error}.") from error

    @property
    def port(self) -> int:
        """The port it listens on."""
        return int(self._server.server_port)

    def stop(self) -> None:
        """Close the port. Blocks for up to half a second."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def markdown(metrics: Metrics) -> str:
    """docs/metrics.md, from the declarations."""
    lines = [
        "# Metrics",
        "",
        "Every service shows these at `/metrics` (port 9090 unless set otherwise). "
        "Generated by `python -m lathe.common.metrics`; do not edit.",
        "",
        "| Name | Type | Labels | Meaning |",
        "|---|---|---|---|",
    ]
    for metric in metrics.declared():
        family = next(iter(metric.describe()))
        name = family.name + ("_total" if family.type == "counter" else "")
        labels = ", ".join(f"`{label}`" for label in metric._labelnames) or "none"
        lines.append(f"| `{name}` | {family.type} | {labels} | {family.documentation} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(markdown(Metrics()), end="")
