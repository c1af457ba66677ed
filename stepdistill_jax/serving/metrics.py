"""What Prometheus reads at `/metrics`."""

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
    """Of one service, in a registry of its own."""

    def __init__(self, waiting: Callable[[], int], ready: Callable[[], bool]):
        """`waiting` and `ready` are asked whenever the metrics are read."""
        self._registry = registry = CollectorRegistry()
        self.requests = Counter(
            "stepdistill_requests",
            "Requests to /predict by HTTP status; 499 is a client that left",
            ["status"],
            registry=registry,
        )
        self.rows = Counter("stepdistill_rows", "Rows answered", registry=registry)
        self.request_seconds = Histogram(
            "stepdistill_request_seconds",
            "From the head of a request to its answer, of those answered with 200",
            buckets=SECONDS,
            registry=registry,
        )
        self.batch_rows = Histogram(
            "stepdistill_batch_rows", "Rows of a batch", buckets=ROWS, registry=registry
        )
        self.batch_seconds = Histogram(
            "stepdistill_batch_seconds", "Time of a batch", buckets=SECONDS, registry=registry
        )
        queue = Gauge("stepdistill_queue_rows", "Rows that wait or are decoded", registry=registry)
        queue.set_function(waiting)
        state = Gauge(
            "stepdistill_ready", "1 while requests are taken, 0 before and after", registry=registry
        )
        state.set_function(ready)

    def text(self) -> bytes:
        """In the text format of Prometheus."""
        return generate_latest(self._registry)
