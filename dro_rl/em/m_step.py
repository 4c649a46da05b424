"""What goes through the models together in an M-step: the rows of some questions, and what multiplies each."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from dro_rl.em.method import Method
from dro_rl.em.weighing import weigh
from dro_rl.likelihood import depth, unshared
from dro_rl.likelihood.packing import Row
from dro_rl.objective import ADVANTAGES, selector_coefficients
from dro_rl.prompts import Prompter
from dro_rl.prompts.rows import answer_row, selector_rows
from dro_rl.records import Question, Rollout, Sample, Written
from dro_rl.roles import POLICIES, Role

NOTHING = 1e-12
"""A coefficient below this is the rounding of weights that are equal."""


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
        self.whole, self.mine, self.question = whole, mine, question
        own = [whole[place] for place in mine]
        self.samples: list[Written] = []
        """Distinct samples, or windows of them: the completions of the selector's rows, in their order."""
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
            self.rows["selector"], self.samples = selector_rows(prompters["selector"], question, own, method.spec)
        if "generator" in roles:
            self.rows["generator"] = [
                answer_row(prompters["generator"], question, numbers, method.scoring.answer_aliases)
                for numbers in self.selections
            ]

    def tokens(self, packed: Mapping[Role, bool]) -> int:
        """Tokens of all rows, as the models take them: each prompt once where a role packs, else once a completion."""
        return sum(self.by_role(packed).values())

    def by_role(self, packed: Mapping[Role, bool]) -> dict[Role, int]:
        """`tokens` of each role."""
        return {
            role: sum(len(row) if packed[role] else unshared(row) for row in rows) for role, rows in self.rows.items()
        }

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
        unmoved: whether the selector is still the one that the E-step weighed with, and no dropout disturbs it.
        eos_token_id: what a row of weight zero is made of, where there is nothing to read.
    """

    def __init__(
        self,
        groups: Sequence[Group],
        method: Method,
        roles: Sequence[Role],
        *,
        on_policy: bool,
        unmoved: bool,
        eos_token_id: int,
    ) -> None:
        self.groups, self.method, self.on_policy = groups, method, on_policy
        # What the generator says of the answers can tell which questions teach the selector nothing.
        self.roles = sorted(roles, key=lambda role: role in POLICIES)
        self.rollouts = [group.whole[place] for group in groups for place in group.mine]
        """Those of this process, in order; weighed once the passes have said what they need."""
        self._fresh = not all(isinstance(rollout, Rollout) for rollout in self.rollouts)
        self._unmoved = unmoved or self._fresh
        self._nothing = Row((eos_token_id,), [(eos_token_id,)])
        self._size = len(groups[0].whole) if groups else 1  # m
        self._idle = [False] * len(groups)
        self.tokens: dict[Role, int] = {}
        """Of each role's rows, once it has read them."""
        self.completion_tokens = 0
        """Of the selector's completions, once it has read them."""
        self._places: dict[Role, list[list[int]]] = {}  # of each rollout: its completions, or its row, of a role's rows
        self._counts: dict[Role, int] = {}

    def rows(self, role: Role, logps: Mapping[Role, Tensor] = MappingProxyType({})) -> list[Row]:
        """What a role reads in this pass.

        Questions whose coefficients all vanish are left out of the selector's rows: nothing would come of them.

        Args:
            logps: of the roles before, as in `coefficients`: fresh rollouts of the policy itself are weighed by them.
        """
        if role in POLICIES:
            if self._fresh and self.on_policy and "generator" in logps:
                self._weigh(logps)
            self._idle = self._taught_nothing()
        kept = [role not in POLICIES or not idle for idle in self._idle]
        self._find_places(role, kept)
        rows = [row for group, stays in zip(self.groups, kept, strict=True) if stays for row in group.rows[role]]
        self.tokens[role] = sum(map(len, rows))
        if role in POLICIES:
            self.completion_tokens = sum(len(completion) for row in rows for completion in row.completions)
        return rows or [self._nothing]  # without rows of our own, the other processes' gradients still wait for ours

    def begins_alike(self, role: Role) -> bool:
        """Whether prompts of a role may begin alike: those of answers by their first documents, those of selections
        where a window shows rollouts of a question the same new candidates, and after them what each has picked."""
        return role not in POLICIES or any(sample.windows for group in self.groups for sample in group.whole)

    @property
    def tokens_skipped(self) -> int:
        """Tokens of the selector's rows that were left out."""
        idle = zip(self.groups, self._idle, strict=True)
        return sum(len(row) for group, left_out in idle if left_out for row in group.rows["selector"])

    @property
    def drawn_here(self) -> bool:
        """Whether the selector's pass is over completions that these very weights drew: log p ought to be log q."""
        return self.on_policy and self._unmoved and self.completion_tokens > 0

    def proposal_logps(self) -> Tensor:
        """log q of the selector's completions, in the order of its rows."""
        logps = torch.zeros(self._counts["selector"], dtype=torch.float64)
        for places, rollout in zip(self._places["selector"], self.rollouts, strict=True):
            for place, window in zip(places, rollout.all_windows, strict=False):  # a question left out has no places
                logps[place] = window.proposal_logp
        return logps

    def coefficients(self, logps: Mapping[Role, Tensor]) -> dict[Role, list[float]]:
        """What multiplies each log-probability in the losses. Duplicates are one row, with their coefficients summed.

        Args:
            logps: of the selector's completions (n,) and of the generator's rows (rows, 2), sum and mean, in the order
                of `rows`, detached, nats. Rollouts that are still fresh are weighed by them.

        Returns:
            By role, in the same order.
        """
        if self._fresh:
            self._weigh(logps)
        found: dict[Role, list[float]] = {}
        for role in logps:
            if role in POLICIES:
                values = self._selector_coefficients(None if self._unmoved else logps[role])
            else:
                values = [_rollout(rollout).weight for rollout in self.rollouts]
            found[role] = self._summed(role, values) or [0.0]
        return found

    def all_rows(self, role: Role) -> list[Row]:
        """What a role would read if nothing were left out."""
        return [row for group in self.groups for row in group.rows[role]] or [self._nothing]

    def _find_places(self, role: Role, kept: Sequence[bool]) -> None:
        """Where each rollout stands among a role's completions (of a policy, one for each window) or rows."""
        self._places[role], self._counts[role] = [], 0
        for group, stays in zip(self.groups, kept, strict=True):
            keys: Sequence[Any] = (group.samples if role in POLICIES else group.selections) if stays else ()
            at = {key: place for place, key in enumerate(keys, self._counts[role])}
            for sample in (group.whole[place] for place in group.mine):
                read = [w.written for w in sample.all_windows] if role in POLICIES else [sample.selection.numbers]
                self._places[role].append([at[key] for key in read if key in at])
            self._counts[role] += len(at)

    def _weigh(self, logps: Mapping[Role, Tensor]) -> None:
        """Weigh fresh rollouts, whose groups are whole here, by what the passes said."""
        likelihoods = [self._of_rollouts("generator", values) for values in logps["generator"].unbind(-1)]
        scored = [
            replace(each, answer_logp_sum=total, answer_logp_mean=mean)
            for each, total, mean in zip(self.rollouts, *likelihoods, strict=True)
        ]
        policy = [rollout.proposal_logp for rollout in self.rollouts]
        if not self.on_policy:
            policy = self._of_rollouts("selector", logps["selector"])
        method = self.method
        weighed = weigh(
            scored,
            self._matrix(policy),
            method.weighting,
            method.reward,
            likelihood=method.scoring.answer_likelihood,
            on_policy=self.on_policy,
        )
        self.rollouts, self._fresh = [*weighed], False

    def _of_rollouts(self, role: Role, logps: Tensor) -> list[float]:
        """What a role's pass said of each rollout, its windows together; NaN of those that it did not read."""
        known = logps.tolist()
        return [sum(known[place] for place in places) if places else math.nan for places in self._places[role]]

    def _taught_nothing(self) -> list[bool]:
        """Of each group, whether none of its samples would move the selector, whatever their log-probabilities.

        Advantages of zero stay zero. A variate takes a weight away only where the policy is the one that sampled.
        """
        weighting = self.method.weighting
        steady = weighting.objective in ADVANTAGES and not weighting.beta and not weighting.entropy_coef
        if self._fresh or not (self._unmoved or steady):
            return [False] * len(self.groups)
        values, idle = iter(self._selector_coefficients(None)), []
        for group in self.groups:
            summed: dict[Written, float] = defaultdict(float)
            for place in group.mine:
                value = next(values)
                for window in group.whole[place].all_windows:
                    summed[window.written] += value
            idle.append(all(abs(value) < NOTHING for value in summed.values()))
        return idle

    def _selector_coefficients(self, logps: Tensor | None) -> list[float]:
        """Of each rollout of this process, by what the E-step said of its whole group and its log p of the moment.

        Args:
            logps: of the moment, in the order of the selector's rows; None where they are those of the E-step.
        """
        weighting, m = self.method.weighting, self._size
        mine = [g * m + place for g, group in enumerate(self.groups) for place in group.mine]
        everything: list[Sample] = [sample for group in self.groups for sample in group.whole]
        for i, rollout in zip(mine, self.rollouts, strict=True):
            everything[i] = rollout
        whole = [_rollout(sample) for sample in everything]
        sampled = self._matrix([rollout.selection_logp for rollout in whole])
        now = sampled.clone()
        if logps is not None:  # of other processes' rollouts nothing is asked but what the E-step said
            for i, logp in zip(mine, self._of_rollouts("selector", logps), strict=True):
                now.view(-1)[i] = now.view(-1)[i] if math.isnan(logp) else logp
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

    def _summed(self, role: Role, values: Sequence[float]) -> list[float]:
        summed = [0.0] * self._counts[role]
        for places, value in zip(self._places[role], values, strict=True):
            for place in places:
                summed[place] += value
        return summed

    def _matrix(self, values: Sequence[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float64).reshape(-1, self._size)


def _is_light(sample: Sample, min_weight: float) -> bool:
    """Whether the generator leaves it out. What has not been weighed is read."""
    return isinstance(sample, Rollout) and sample.weight < min_weight


def _rollout(sample: Sample) -> Rollout:
    assert isinstance(sample, Rollout), "the E-step has weighed it"
    return sample
