"""What `/metrics` shows, in a registry of its own."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)


class Metrics:
    """Counters of one server. All are safe to change from any thread."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "tidal_requests",
            "Requests by path and status; 499: the client hung up before the answer began",
            ["path", "code"],
            registry=self.registry,
        )
        self.waiting = Gauge("tidal_queue_length", "Texts that wait", registry=self.registry)
        self.running = Gauge("tidal_running", "Texts being written", registry=self.registry)
        self.bytes = Counter("tidal_generated_bytes", "Bytes written, end marks left out", registry=self.registry)
        self.passes = Counter("tidal_passes", "Passes of the model", registry=self.registry)
        self.failed_passes = Counter("tidal_failed_passes", "Passes of the model that failed", registry=self.registry)
        self.drafted = Counter("tidal_drafted_chars", "Chars drafted in finished texts", registry=self.registry)
        self.accepted = Counter("tidal_accepted_chars", "Those of them that were kept", registry=self.registry)
        self.queue_seconds = self._histogram("tidal_queue_seconds", "From a text's acceptance to its first pass")
        self.first_byte_seconds = self._histogram(
            "tidal_first_byte_seconds", "From a text's acceptance to its first byte"
        )
        self.request_seconds = self._histogram("tidal_request_seconds", "From a request's acceptance to its last byte")

    def _histogram(self, name: str, text: str) -> Histogram:
        return Histogram(name, text, buckets=_SECONDS, registry=self.registry)

    def text(self) -> bytes:
        """All of them in Prometheus' text format."""
        return generate_latest(self.registry)
