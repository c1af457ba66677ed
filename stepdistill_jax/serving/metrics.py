"""Defines the metrics that Prometheus reads at `/metrics`."""

from collections.abc import Callable

from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    generate_latest,
)

CONTENT_TYPE = CONTENT_TYPE_LATEST
SECONDS = (0.005, 0.01, 0.02, 0.03, 0.05, 0.07, 0.1, 0.15, 0.2, 0.3, 0.5, 0.7, 1, 2, 3, 5, 10, 30)
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)


class Metrics:
    """The metrics of one service, in a separate registry."""

    def __init__(self, waiting: Callable[[], int], ready: Callable[[], bool]):
        """Registers the metrics.

        Args:
            waiting: returns the count of unanswered rows.
            ready: returns whether the server accepts requests.
        """
        self._registry = registry = CollectorRegistry()
        self.requests = Counter(
            "stepdistill_requests",
            "Requests to /predict by HTTP status; 499: the client disconnected",
            ["status"],
            registry=registry,
        )
        self.rows = Counter("stepdistill_rows", "Rows answered", registry=registry)
        self.request_seconds = Histogram(
            "stepdistill_request_seconds",
            "Seconds from a request's head to its answer, for requests answered with 200",
            buckets=SECONDS,
            registry=registry,
        )
        self.batch_rows = Histogram(
            "stepdistill_batch_rows", "Rows per batch", buckets=ROWS, registry=registry
        )
        self.batch_seconds = Histogram(
            "stepdistill_batch_seconds", "Seconds per batch", buckets=SECONDS, registry=registry
        )
        queue = Gauge("stepdistill_queue_rows", "Rows waiting or being decoded", registry=registry)
        queue.set_function(waiting)
        state = Gauge(
            "stepdistill_ready", "1 while the server accepts requests, else 0", registry=registry
        )
        state.set_function(ready)

    def text(self) -> bytes:
        """Returns the metrics in Prometheus's text format."""
        return generate_latest(self._registry)
