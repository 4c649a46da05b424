"""The exact E-step: in place of samples every selection that the constraint admits, once, as if drawn alike.

q is then uniform over the selections and p/q the policy itself up to a constant, so the weights are the posterior
p(z|x, y), exactly, and the evidence bound is log p(y|x) itself. There are N!/(N−K)! of them, of each length that there
may be: for small N and K.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

from dro_rl.config import DROConfig
from dro_rl.engines.protocol import GenerationRequest, TrainedSelector
from dro_rl.engines.vllm_adapters import Adapters
from dro_rl.errors import InputError
from dro_rl.proposal import Completion, SamplingParams
from dro_rl.selection import SelectionSpec
from dro_rl.selection.constraint import SelectionConstraint

MAX_LOG_RATIO = 100.0
"""Nats: as good as none."""


class EnumerationEngine:
    """Lists selections. It asks no model, so weights, seeds and temperature make no difference."""

    @classmethod
    def check(cls, config: DROConfig, adapters: Adapters | None = None) -> None:
        """Refuse free text, which cannot be listed, a ratio that is cut, and a proposal that is meant to be p."""
        if not config.constrain_selection:
            raise InputError(
                "rollout_engine",
                "enumeration",
                "what can be listed are the selections that constrain_selection admits",
                "Set constrain_selection: true.",
            )
        if config.window_size is not None:
            raise InputError(
                "window_size",
                config.window_size,
                "rollout_engine: enumeration lists the selections of a whole list, not all ways through its windows",
                "Leave it unset, or use another engine.",
            )
        if config.max_log_ratio < MAX_LOG_RATIO:
            raise InputError(
                "max_log_ratio",
                config.max_log_ratio,
                "an exact posterior has whole ratios, and a listed selection may be much likelier than one in all",
                f"Use {MAX_LOG_RATIO:g}.",
            )

        if config.resample_ties == "redraw":
            raise InputError(
                "resample_ties", "redraw", "what lists every selection lists the same again", "Use replace, or none."
            )
        if config.temperature == 1 and config.temperature_end is None:
            raise InputError(
                "temperature",
                config.temperature,
                "listed selections stand as if drawn at a temperature without bound, and 1 says that they are p's own",
                "Use 1000.",
            )

    @classmethod
    def start(
        cls, config: DROConfig, selector: TrainedSelector, generator: TrainedSelector | None = None
    ) -> EnumerationEngine:
        return cls()

    @contextmanager
    def at(self, step: int) -> Iterator[EnumerationEngine]:
        """It lists the same, whatever the step."""
        yield self

    def generate(self, request: GenerationRequest) -> list[list[Completion]]:
        """Every selection of each question: as many as `num_generations`, or `InputError`."""
        assert request.constraints is not None, "as `check` asks"
        return [_listed(constraint, request.num_generations) for constraint in request.constraints]

    def samples_policy(self, sampling: SamplingParams) -> bool:
        return False

    def forget(self) -> None:
        """It keeps no weights."""

    def close(self) -> None:
        """It leaves nothing."""


def check_listed(spec: SelectionSpec, num_documents: int, m: int, where: str = "") -> None:
    """Refuse a question that has more or fewer selections than the m that are listed of each order of its candidates.

    Args:
        spec: how many documents are selected.
        num_documents: its candidates.
        m: what is listed.
        where: which question it is, for the reader.
    """
    if (count := spec.count(num_documents)) != m:
        raise InputError(
            "num_generations",
            m,
            f"rollout_engine: enumeration lists all {count} selections of {spec} of {num_documents} documents{where}",
            f"Use {count} for each of candidate_orders, with as many documents for every question, or another engine.",
        )


def _listed(constraint: SelectionConstraint, m: int) -> list[Completion]:
    check_listed(SelectionSpec(constraint.least, constraint.k), constraint.num_documents, m)
    # log q of the whole stands at its end: of listed tokens none has a probability of its own.
    return [Completion(ids, (*[0.0] * (len(ids) - 1), -math.log(m))) for ids in _walk(constraint, ())]


def _walk(constraint: SelectionConstraint, written: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
    """Every way on from what is written to an end, in the order of tokens."""
    for token in constraint.allowed(written):
        following = (*written, token)
        if token == constraint.end:
            yield following
        else:
            yield from _walk(constraint, following)
