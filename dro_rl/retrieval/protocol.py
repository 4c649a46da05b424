"""What a retriever is. `bm25`, `colbert` and `dense` are three of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Protocol

from dro_rl.retrieval.passages import PassageStore


class Hit(NamedTuple):
    """A passage that was found.

    Args:
        row: its place in the corpus, from 0.
        score: the retriever's, the higher the better; scores of two retrievers do not compare.
    """

    row: int
    score: float


class Retriever(Protocol):
    """One way to index passages and to find them again. Made from its settings; then built and opened, or opened.

    `format` is the version of its rules: an index of another one is refused.
    """

    format: ClassVar[int]

    @property
    def name(self) -> str:
        """As on the command line."""
        ...

    def settings(self) -> dict[str, Any]:
        """What its scores depend on besides the passages: the arguments that make an equal one."""
        ...

    def versions(self) -> Mapping[str, str]:
        """The packages that compute the scores, with their versions; under `weights` the hash of a model's."""
        ...

    def check(self) -> None:
        """Raise `InputError` for what would end a build or a search: a setting, a missing package or compiler."""
        ...

    def build(self, passages: PassageStore, folder: Path, processes: int) -> None:
        """Index the passages into a folder of its own. Killed and called again, it goes on."""
        ...

    def open(self, folder: Path, rank: int = 0) -> None:
        """Make an index that was built ready for `search`, on the GPU of this rank. Call `check` before."""
        ...

    def search(self, queries: Sequence[str], k: int) -> list[list[Hit]]:
        """At most k passages for each query, best first, of equal score the earlier ones; none that share nothing."""
        ...
