"""What Prometheus may ask for: /metrics, to admins, and to whoever asks from this machine itself.

Does not know: what is counted beyond requests, streams and the jobs in the store.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable

from fastapi import APIRouter, Request
from fastapi.responses import Response
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from luthier.api.auth import bearer, check_admin, refused
from luthier.store.jobs import Jobs

router = APIRouter(tags=["health"])

METHODS = ("GET", "POST", "PUT", "PATCH", "DELETE", "HEAD", "OPTIONS")
SECONDS = (0.005, 0.02, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)


class _JobStates(Collector):
    """The jobs by state, counted when they are asked for."""

    def __init__(self, jobs: Jobs) -> None:
        self._jobs = jobs

    def describe(self) -> Iterable[Metric]:
        return ()  # so that registering it asks the database nothing

    def collect(self) -> Iterable[Metric]:
        counts = self._jobs.counts()
        states = GaugeMetricFamily("luthier_jobs", "Fine-tuning jobs by state.", labels=["state"])
        for state, number in counts.items():
            states.add_metric([state], number)
        yield states
        yield GaugeMetricFamily("luthier_jobs_waiting", "Jobs that wait for a worker.", value=counts["queued"])


class Metrics:
    """The counters of one app, in a registry of its own."""

    def __init__(self, jobs: Jobs) -> None:
        self.registry = CollectorRegistry()
        labels = ("route", "method", "status")
        self.requests = Counter("luthier_requests", "Requests answered.", labels, registry=self.registry)
        self.seconds = Histogram(
            "luthier_request_seconds",
            "Seconds until an answer was whole.",
            ("route",),
            buckets=SECONDS,
            registry=self.registry,
        )
        self.streams = Gauge("luthier_streams", "Answers that are being streamed now.", registry=self.registry)
        self.registry.register(_JobStates(jobs))
        ProcessCollector(registry=self.registry)

    def count(self, route: str, method: str, status: int, seconds: float) -> None:
        method = method if method in METHODS else "other"  # a client must not be able to make new series
        self.requests.labels(route, method, str(status)).inc()
        self.seconds.labels(route).observe(seconds)

    def text(self) -> bytes:
        return generate_latest(self.registry)


def _local(request: Request) -> bool:
    """Asked from this machine, and not by a proxy on it for somebody else."""
    if request.client is None or "x-forwarded-for" in request.headers or "forwarded" in request.headers:
        return False
    try:
        return ipaddress.ip_address(request.client.host).is_loopback
    except ValueError:
        return False


@router.get("/metrics", summary="Counters for Prometheus")
def metrics(request: Request) -> Response:
    app = request.app
    if not _local(request):
        token = bearer(request.headers.get("authorization"))
        key = app.state.doorkeeper.verify(token)
        if key is None:
            raise refused(token)
        check_admin(key)
    counted: Metrics = app.state.metrics
    return Response(counted.text(), media_type="text/plain; version=0.0.4; charset=utf-8")
