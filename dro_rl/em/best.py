"""What evaluations on dev decide: which step is kept, and when to stop. Pure: from what was measured, in order."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence


def ranked(history: Iterable[Mapping[str, float]], metric: str, greater_is_better: bool) -> list[int]:
    """The steps after which dev was evaluated, best first. Of equals the earliest, and the start only after them.

    Args:
        history: what was logged, as a trainer's state has it.
        metric: its name, without `eval_`.
        greater_is_better: whether more of it is better.
    """
    name, sign = f"eval_{metric}", 1 if greater_is_better else -1
    found = {int(entry["step"]): sign * entry[name] for entry in history if entry.get(name) is not None}
    return sorted(found, key=lambda step: (-found[step], step == 0, step))


def stalled(values: Sequence[float], patience: int | None, greater_is_better: bool) -> bool:
    """Whether the last `patience` evaluations are no better than the best before them; never where it is None."""
    if patience is None:
        return False
    sign = 1 if greater_is_better else -1
    best = max(range(len(values)), key=lambda i: sign * values[i], default=0)
    return len(values) - 1 - best >= patience
