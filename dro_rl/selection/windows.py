"""More candidates than a selector reads at once: a window of them slides from the end of the list to its front.

The habit of list-wise rankers (RankGPT, arXiv 2304.09542). Each window is selected from like a list of its
own. What is picked comes to stand first in it, the others follow in their order, and the next window begins `stride`
candidates nearer to the front: it shows so many new ones, and after them the first of the window before, what was
picked ahead of all others. What is picked of the last window, which holds the front of the list, is the selection.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from dro_rl.errors import InputError


@dataclass(frozen=True, slots=True)
class Windows:
    """How the candidates of a long list are shown.

    Args:
        size: candidates of a window; a list that has no more is shown whole, once.
        stride: candidates that each further window shows anew; the last one shows what is left.
    """

    size: int
    stride: int

    @classmethod
    def of(cls, size: int | None, stride: int | None, most: int) -> Windows | None:
        """What a recipe's `window_size` and `window_stride` say; None without windows.

        Args:
            size: candidates of a window.
            stride: new ones of each further window; None for as many as there is room for.
            most: K, the documents that a window may pick, all of which go on to the next.

        Raises:
            InputError: a stride without a size, or windows in which what was picked has no room beside anything new.
        """
        if size is None:
            if stride is not None:
                raise InputError(
                    "window_stride", stride, "this is how far windows of window_size slide", "Give window_size too."
                )
            return None
        if size <= most:
            raise InputError(
                "window_size",
                size,
                f"a window holds the {most} documents that the one before may pick (num_selected), and others",
                f"Use {max(2 * most, 20)}, say, or more than {most}.",
            )
        room = size - most
        if stride is not None and not 1 <= stride <= room:
            raise InputError(
                "window_stride",
                stride,
                f"each window shows at least 1 new candidate, and of {size} at most {room}, beside the {most} that the "
                "one before may pick (num_selected)",
                f"Use {room} or less, or leave it unset.",
            )
        return cls(size, room if stride is None else stride)

    def count(self, num_documents: int) -> int:
        """How many windows a list of so many candidates takes."""
        return 1 + max(0, -((self.size - num_documents) // self.stride))


@dataclass(frozen=True, slots=True)
class Slide:
    """Where a rollout stands in its list.

    Args:
        order: all candidates' numbers as the list is now; empty for a list that is shown whole, as it stands.
        start: how many stand before the window.
        windows: how it slides; None where the list is shown whole.
    """

    order: tuple[int, ...]
    start: int = 0
    windows: Windows | None = None

    @classmethod
    def begin(cls, windows: Windows | None, num_documents: int, order: Sequence[int] = ()) -> Slide:
        """At the end of a list.

        Args:
            windows: how long lists are shown; None for whole.
            num_documents: N.
            order: the list, where it is not 1..N.
        """
        if windows is None or num_documents <= windows.size:
            return cls(tuple(order))
        return cls(tuple(order) or tuple(range(1, num_documents + 1)), num_documents - windows.size, windows)

    @property
    def shown(self) -> tuple[int, ...]:
        """The numbers in the window, as the selector is shown them; empty for the whole list as it stands."""
        return self.order if self.windows is None else self.order[self.start : self.start + self.windows.size]

    @property
    def last(self) -> bool:
        """Whether the window holds the front of the list: what is picked of it is the selection."""
        return self.start == 0

    def after(self, picked: Sequence[int]) -> Slide:
        """The next window, of one that is not the last.

        Args:
            picked: numbers of the window, best first.
        """
        assert self.windows is not None, "a list that is shown whole has one window"
        shown, chosen = self.shown, set(picked)
        reordered = (*picked, *(number for number in shown if number not in chosen))
        order = (*self.order[: self.start], *reordered, *self.order[self.start + len(shown) :])
        return replace(self, order=order, start=max(0, self.start - self.windows.stride))
