"""What the two steps of an iteration are told: small values, made of the settings once."""

from __future__ import annotations

from dataclasses import dataclass

from dro_rl.config import DROConfig
from dro_rl.likelihood import Scoring
from dro_rl.objective import Weighting
from dro_rl.proposal import SamplingParams
from dro_rl.rewards import Reward
from dro_rl.selection import SelectionSpec
from dro_rl.selection.windows import Windows


@dataclass(frozen=True, slots=True)
class Method:
    """How selections are asked for, drawn, scored and weighed.

    Args:
        spec: what the selector is asked for.
        num_generations: m, samples of a question.
        sampling: the proposal q, at the temperature of the first iteration.
        scoring: how both models score.
        weighting: how samples are weighed, and what the selector's gradient is made of.
        reward: what they are weighed by.
        answering: how the generator writes the answers that rewards look at.
        candidate_orders: how many orders of a question's candidates its samples are split over.
        windows: how long lists of candidates are shown; None for whole.
    """

    spec: SelectionSpec
    num_generations: int
    sampling: SamplingParams
    scoring: Scoring
    weighting: Weighting
    reward: Reward = Reward()
    answering: SamplingParams = SamplingParams(64, temperature=0.0)
    candidate_orders: int = 1
    windows: Windows | None = None

    @classmethod
    def of(cls, config: DROConfig) -> Method:
        """The recipe's."""
        return cls(
            config.spec,
            config.num_generations,
            config.sampling,
            config.scoring,
            config.weighting_rule,
            config.reward_rule,
            SamplingParams(config.max_answer_length, config.answer_temperature),
            config.candidate_orders,
            config.windows,
        )
