"""What goes through the models together in an M-step: the rows of some questions, and what multiplies each."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor

from dro_rl.em.method import Method
from dro_rl.em.weighing import weigh
from dro_rl.likelihood import depth, unshared
from dro_rl.likelihood.packing import Row
from dro_rl.objective import ADVANTAGES, selector_coefficients
from dro_rl.prompts import Prompter
from dro_rl.prompts.rows import answer_row, selector_row
from dro_rl.records import Question, Rollout, Sample
from dro_rl.roles import Role


class Group:
    """The rollouts of one question, and those of them that fell to this process as rows for the models.

    Args:
        whole: all m of the question, weighed or not.
        mine: places among them of those that are computed here.
        question: itself.
        prompters: the prompts of each role.
        method: what is asked, scored and weighed.
        roles: which models move. Rows of the others are not made.
    """

    def __init__(
        self,
        whole: Sequence[Sample],
        mine: Sequence[int],
        question: Question,
        prompters: Mapping[Role, Prompter],
        method: Method,
        roles: Collection[Role],
    ) -> None:
        self.whole, self.mine = whole, mine
        own = [whole[place] for place in mine]
        self.samples = list(dict.fromkeys(sample.token_ids for sample in own))
        """Distinct samples: the completions of the selector's row."""
        self.selections = list(
            dict.fromkeys(
                sample.selection.numbers
                for sample in own
                if sample.selection.valid and not _is_light(sample, method.weighting.min_weight)
            )
        )
        """Distinct selections that the generator reads: a row each."""
        self.rows: dict[Role, list[Row]] = {role: [] for role in roles}
        if "selector" in roles:
            self.rows["selector"] = [selector_row(prompters["selector"], question, self.samples, method.spec)]
        if "generator" in roles:
            self.rows["generator"] = [
                answer_row(prompters["generator"], question, numbers, method.scoring.answer_aliases)
                for numbers in self.selections
            ]

    def tokens(self, packed: Mapping[Role, bool]) -> int:
        """Tokens of all rows, as the models take them: each prompt once where a role packs, else once a completion."""
        return sum(len(row) if packed[role] else unshared(row) for role, rows in self.rows.items() for row in rows)

    def depth(self, role: Role) -> int:
        """Tokens of a role's longest prompt with its longest completion; 0 without rows."""
        return max(map(depth, self.rows.get(role, ())), default=0)


class MicroBatch:
    """Groups whose rows share a forward and a backward pass.

    Args:
        groups: of distinct questions; none for a process that only keeps the others company.
        method: what is asked, scored and weighed.
        roles: which models move.
        on_policy: whether the proposal is the policy that weighs.
        eos_token_id: what a row of weight zero is made of, where there is nothing to read.
    """

    def __init__(
        self, groups: Sequence[Group], method: Method, roles: Sequence[Role], on_policy: bool, eos_token_id: int
    ) -> None:
        self.groups, self.method, self.on_policy = groups, method, on_policy
        self.rollouts = [group.whole[place] for group in groups for place in group.mine]
        """Those of this process, in order; weighed once `coefficients` has been called."""
        nothing = Row((eos_token_id,), [(eos_token_id,)])
        # Without rows of our own, the other processes' gradients still wait for ours.
        self.rows: dict[Role, list[Row]] = {
            role: [row for group in groups for row in group.rows[role]] or [nothing] for role in roles
        }
        self._sample_of: list[int] = []  # of each rollout: its completion among the selector's
        self._row_of: list[int | None] = []  # and its row among the generator's
        samples = selections = 0
        for group in groups:
            sample = {known: at for at, known in enumerate(group.samples, samples)}
            row = {known: at for at, known in enumerate(group.selections, selections)}
            own = [group.whole[place] for place in group.mine]
            self._sample_of += [sample[rollout.token_ids] for rollout in own]
            self._row_of += [row.get(rollout.selection.numbers) for rollout in own]
            samples, selections = samples + len(sample), selections + len(row)
        self._counts: dict[Role, int] = {"selector": samples, "generator": selections}

    @property
    def fresh(self) -> bool:
        """Whether the rollouts have not been weighed: one forward pass gives weights and loss."""
        return not all(isinstance(rollout, Rollout) for rollout in self.rollouts)

    def tokens(self, role: Role) -> int:
        """Tokens of a role's rows."""
        return sum(map(len, self.rows[role]))

    @property
    def completion_tokens(self) -> int:
        """Tokens of the selector's completions."""
        return sum(len(completion) for row in self.rows["selector"] for completion in row.completions)

    def proposal_logps(self) -> Tensor:
        """log q of the selector's completions, in row order."""
        logps = torch.zeros(self._counts["selector"], dtype=torch.float64)
        for i, rollout in zip(self._sample_of, self.rollouts, strict=True):
            logps[i] = rollout.proposal_logp
        return logps

    def coefficients(self, logps: Mapping[Role, Tensor]) -> dict[Role, list[float]]:
        """What multiplies each log-probability in the losses. Duplicates are one row, with their coefficients summed.

        Args:
            logps: of the selector's completions and of the generator's rows, in row order, detached, nats. Fresh
                rollouts are weighed by them, and kept.

        Returns:
            By role, in row order.
        """
        if not self.groups:
            return {role: [0.0] for role in self.rows}
        moved: list[float] | None = None
        if self.fresh:
            self._weigh(logps)
        elif "selector" in logps:
            known = logps["selector"].tolist()
            moved = [known[i] for i in self._sample_of]
        found: dict[Role, list[float]] = {}
        if "selector" in self.rows:
            found["selector"] = self._summed("selector", self._sample_of, self._selector_coefficients(moved))
        if "generator" in self.rows:
            weights = [rollout.weight for rollout in self._weighed()]
            found["generator"] = self._summed("generator", self._row_of, weights) or [0.0]
        return found

    def _weigh(self, logps: Mapping[Role, Tensor]) -> None:
        policy, answers = logps["selector"].tolist(), logps["generator"].tolist()
        proposal = [rollout.proposal_logp for rollout in self.rollouts]
        self.rollouts = [
            *weigh(
                self.rollouts,
                self._matrix(proposal if self.on_policy else [policy[i] for i in self._sample_of]),
                self._matrix([math.nan if i is None else answers[i] for i in self._row_of]),
                self.method.weighting,
                self.method.reward,
                on_policy=self.on_policy,
            )
        ]

    def _selector_coefficients(self, moved: Sequence[float] | None) -> list[float]:
        """Of each rollout of this process, by what the E-step said of its whole group and its log p of the moment.

        Args:
            moved: log p of the moment; None where the weights are still those that the E-step weighed with.
        """
        if moved is None:  # fresh groups are whole here
            whole, mine = self._weighed(), list(range(len(self.rollouts)))
        else:
            whole = [_rollout(sample) for group in self.groups for sample in group.whole]
            m = self.method.num_generations
            mine = [g * m + place for g, group in enumerate(self.groups) for place in group.mine]
        sampled = self._matrix([rollout.selection_logp for rollout in whole])
        now = sampled.clone()
        if moved is not None:  # of other processes' rollouts nothing is asked but what the E-step said
            now.view(-1)[mine] = torch.tensor(moved, dtype=torch.float64)
        weighting = self.method.weighting
        coefficients = selector_coefficients(
            self._matrix([rollout.weight for rollout in whole]),
            baseline=weighting.baseline,
            advantages=self._matrix([r.advantage for r in whole]) if weighting.objective in ADVANTAGES else None,
            epsilon=weighting.epsilon if weighting.objective == "grpo" else None,
            follows_failures=weighting.objective != "maxrl",
            proposal_weights=self._matrix([rollout.proposal_weight for rollout in whole]),
            selection_logps=now,
            sampled_logps=sampled,
            reference_logps=self._matrix([r.reference_logp for r in whole]) if weighting.beta else None,
            beta=weighting.beta,
            entropy_coef=weighting.entropy_coef,
        )
        return coefficients.view(-1)[mine].tolist()

    def _weighed(self) -> list[Rollout]:
        return [_rollout(rollout) for rollout in self.rollouts]

    def _summed(self, role: Role, places: Sequence[int | None], values: Sequence[float]) -> list[float]:
        summed = [0.0] * self._counts[role]
        for place, value in zip(places, values, strict=True):
            if place is not None:
                summed[place] += value
        return summed

    def _matrix(self, values: Sequence[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float64).reshape(-1, self.method.num_generations)


def _is_light(sample: Sample, min_weight: float) -> bool:
    """Whether the generator leaves it out. What has not been weighed is read."""
    return isinstance(sample, Rollout) and sample.weight < min_weight


def _rollout(sample: Sample) -> Rollout:
    assert isinstance(sample, Rollout), "the E-step has weighed it"
    return sample
