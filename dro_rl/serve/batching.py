"""One thread has the models; what is asked meanwhile waits in a bounded queue, and goes to work together.

Nothing waits for company: a batch is what stands in the queue when the thread is free. Knows nothing of HTTP.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Generic, TypeVar

from dro_rl.serve.refusals import Refusal

logger = logging.getLogger(__name__)

Item = TypeVar("Item")
Result = TypeVar("Result")
STOPPED = "the server stops, and this was not answered; ask again once it is back"


class Batcher(Generic[Item, Result]):
    """Items in, futures out.

    Args:
        work: results of a batch, in order. An error of several is the error of those alone that have it by themselves.
        batch_size: items that go to work together, at most.
        most_waiting: items in the queue, at most.
        watch: told of each batch: how many, and in how many seconds.
    """

    def __init__(
        self,
        work: Callable[[Sequence[Item]], Sequence[Result]],
        batch_size: int,
        most_waiting: int,
        watch: Callable[[int, float], None] = lambda count, seconds: None,
    ) -> None:
        self._work, self._batch_size, self._most_waiting, self._watch = work, batch_size, most_waiting, watch
        self._queue: deque[tuple[Item, Future[Result]]] = deque()
        self._working: list[Future[Result]] = []
        self._changed = threading.Condition()
        self._stopping = False
        self._seconds = 1.0
        self._thread = threading.Thread(target=self._run, name="models", daemon=True)

    def start(self) -> None:
        """Begin to work."""
        self._thread.start()

    @property
    def waiting(self) -> int:
        """Items in the queue."""
        return len(self._queue)

    @property
    def working(self) -> int:
        """Items in work."""
        return len(self._working)

    @property
    def stopping(self) -> bool:
        """Whether nothing is taken any more."""
        return self._stopping

    def submit(self, item: Item) -> Future[Result]:
        """Put an item in the queue. Cancelling its future takes it out again, as long as it waits.

        Raises:
            Refusal: the queue is full, or the server stops.
        """
        with self._changed:
            if self._stopping:
                raise stopped()
            if len(self._queue) >= self._most_waiting:
                self._queue = deque(entry for entry in self._queue if not entry[1].cancelled())
            if len(self._queue) >= self._most_waiting:
                raise Refusal(
                    503,
                    f"{self._most_waiting} questions wait already; ask again when there is room",
                    "queue_full",
                    retry_after=self._seconds * len(self._queue) / self._batch_size,
                )
            future: Future[Result] = Future()
            self._queue.append((item, future))
            self._changed.notify()
            return future

    def stop(self) -> None:
        """Take nothing more, and finish what was taken."""
        with self._changed:
            self._stopping = True
            self._changed.notify()

    def abandon(self) -> None:
        """Refuse all that is not finished. What the models do at this moment cannot be interrupted, and is dropped."""
        self.stop()
        with self._changed:
            left = [*self._working, *(future for _, future in self._queue)]
            self._queue.clear()
            for future in left:
                if not future.cancelled() and not future.done():
                    future.set_exception(stopped())

    def join(self, seconds: float) -> bool:
        """Whether the thread has ended, within so many seconds."""
        self._thread.join(seconds)
        return not self._thread.is_alive()

    def _run(self) -> None:
        while batch := self._next():
            self._finish(batch)
            with self._changed:
                self._working = []

    def _next(self) -> list[tuple[Item, Future[Result]]]:
        """What goes to work next; nothing once the server stops and the queue is empty."""
        with self._changed:
            while True:
                batch: list[tuple[Item, Future[Result]]] = []
                while self._queue and len(batch) < self._batch_size:
                    item, future = self._queue.popleft()
                    if future.set_running_or_notify_cancel():
                        batch.append((item, future))
                if batch or self._stopping:
                    self._working = [future for _, future in batch]
                    return batch
                self._changed.wait()

    def _finish(self, batch: Sequence[tuple[Item, Future[Result]]]) -> None:
        """Give each item of a batch its result, or its error."""
        began = time.monotonic()
        try:
            results = self._work([item for item, _ in batch])
        except Exception as error:
            if len(batch) > 1:
                for entry in batch:
                    self._finish([entry])
                return
            self._settle(batch[0][1], error=error)
            return
        seconds = time.monotonic() - began
        self._seconds += 0.2 * (seconds - self._seconds)
        self._watch(len(batch), seconds)
        for (_, future), result in zip(batch, results, strict=True):
            self._settle(future, result=result)

    def _settle(self, future: Future[Result], *, result: Result | None = None, error: Exception | None = None) -> None:
        with self._changed:
            if future.done():
                return  # it was given up meanwhile
            if error is not None:
                future.set_exception(error)
            else:
                future.set_result(result)  # type: ignore[arg-type]


def stopped() -> Refusal:
    """What is said to those who ask too late."""
    return Refusal(503, STOPPED, "stopping", retry_after=5)
