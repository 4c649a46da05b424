"""What is counted, as Prometheus reads it."""

from __future__ import annotations

from dro_rl.serve.batching import Batcher
from dro_rl.serve.work import Asked, Served

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
SIZES = (1, 2, 4, 8, 16, 32, 64)


class Metrics:
    """Counters of one server.

    Args:
        paths: the routes by which requests are told apart; all others are one.
    """

    def __init__(self, paths: frozenset[str]) -> None:
        from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

        self._paths, self.registry = paths, CollectorRegistry()
        self._requests = Counter(
            "dro_rl_requests", "Requests by route and status; 499 for a client that hung up.", ["path", "status"],
            registry=self.registry,
        )  # fmt: skip
        self._seconds = Histogram(
            "dro_rl_request_seconds", "From a request's head to its answer.", ["path"], buckets=SECONDS,
            registry=self.registry,
        )  # fmt: skip
        self._sizes = Histogram(
            "dro_rl_batch_questions", "Questions that went to work together.", buckets=SIZES, registry=self.registry
        )
        self._work = Counter("dro_rl_model_seconds", "Seconds that the models worked.", registry=self.registry)
        self._tokens = Counter(
            "dro_rl_tokens", "Tokens of prompts and answers, as in `usage`.", ["kind"], registry=self.registry
        )
        self._waiting = Gauge("dro_rl_waiting", "Questions in the queue.", registry=self.registry)
        self._working = Gauge("dro_rl_working", "Questions in work.", registry=self.registry)

    def follow(self, batcher: Batcher[Asked, Served]) -> None:
        """Tell how long its queue is."""
        self._waiting.set_function(lambda: batcher.waiting)
        self._working.set_function(lambda: batcher.working)

    def request(self, path: str, status: int, seconds: float) -> None:
        """A request has come to its end."""
        path = path if path in self._paths else "other"
        self._requests.labels(path, str(status)).inc()
        self._seconds.labels(path).observe(seconds)

    def batch(self, count: int, seconds: float) -> None:
        """The models have worked."""
        self._sizes.observe(count)
        self._work.inc(seconds)

    def tokens(self, prompt: int, completion: int) -> None:
        """A question was answered."""
        self._tokens.labels("prompt").inc(prompt)
        self._tokens.labels("completion").inc(completion)

    def text(self) -> tuple[bytes, str]:
        """All of it, and its content type."""
        from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

        return generate_latest(self.registry), CONTENT_TYPE_LATEST
