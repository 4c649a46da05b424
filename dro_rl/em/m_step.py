"""What goes through the models together in an M-step: the rows of some questions, and what multiplies each."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor

from dro_rl.config import DROConfig
from dro_rl.em.weighing import weigh
from dro_rl.likelihood import depth, unshared
from dro_rl.likelihood.packing import Row
from dro_rl.models.module import WeightedRows
from dro_rl.prompts import Prompter
from dro_rl.prompts.rows import answer_row, selector_row
from dro_rl.records import Question, Rollout
from dro_rl.roles import ROLES, Role


class Group:
    """The rollouts of one question (or those of them that fell to this process), as rows for the models.

    Args:
        rollouts: of the question.
        question: itself.
        prompters: the prompts of each role.
        config: the settings.
        roles: which models move. Rows of the other are not made.
    """

    def __init__(
        self,
        rollouts: Sequence[Rollout],
        question: Question,
        prompters: Mapping[Role, Prompter],
        config: DROConfig,
        roles: Collection[Role],
    ) -> None:
        self.rollouts = list(rollouts)
        self.selector_rows: list[Row] = []
        self.generator_rows: list[Row] = []
        self.samples = list(dict.fromkeys(rollout.token_ids for rollout in rollouts))
        """Distinct samples: the completions of the selector's row."""
        self.selections = list(
            dict.fromkeys(
                rollout.selection.numbers
                for rollout in rollouts
                if rollout.selection.valid and not rollout.weight < config.min_weight
            )
        )
        """Distinct selections that the generator reads: a row each."""
        if "selector" in roles:
            self.selector_rows.append(selector_row(prompters["selector"], question, self.samples, config))
        if "generator" in roles:
            self.generator_rows += [
                answer_row(prompters["generator"], question, numbers, config.answer_aliases)
                for numbers in self.selections
            ]

    def tokens(self, packed: Mapping[Role, bool]) -> int:
        """Tokens of all rows, as the models take them: each prompt once where a role packs, else once a completion."""
        rows = {"selector": self.selector_rows, "generator": self.generator_rows}
        return sum(len(row) if packed[role] else unshared(row) for role in ROLES for row in rows[role])

    def depth(self, role: Role) -> int:
        """Tokens of a role's longest prompt with its longest completion; 0 without rows."""
        return max(map(depth, self.selector_rows if role == "selector" else self.generator_rows), default=0)


class MicroBatch:
    """Groups whose rows share a forward and a backward pass.

    Args:
        groups: of distinct questions; none for a process that only keeps the others company.
        config: the settings.
        on_policy: whether the proposal is the policy.
        eos_token_id: what a row of weight zero is made of, where there is nothing to read.
    """

    def __init__(self, groups: Sequence[Group], config: DROConfig, on_policy: bool, eos_token_id: int) -> None:
        self.config, self.on_policy = config, on_policy
        self._nothing = WeightedRows([Row((eos_token_id,), [(eos_token_id,)])], [0.0])
        self._rows: dict[Role, list[Row]] = {"selector": [], "generator": []}
        self._sample_of: list[int] = []  # of each rollout: its completion among the selector's
        self._row_of: list[int | None] = []  # and its row among the generator's
        self.rollouts: list[Rollout] = []
        samples = selections = 0
        for group in groups:
            sample, row = (
                {known: at for at, known in enumerate(found, start)}
                for found, start in ((group.samples, samples), (group.selections, selections))
            )
            self._sample_of += [sample[rollout.token_ids] for rollout in group.rollouts]
            self._row_of += [row.get(rollout.selection.numbers) for rollout in group.rollouts]
            self._rows["selector"] += group.selector_rows
            self._rows["generator"] += group.generator_rows
            self.rollouts += group.rollouts
            samples, selections = samples + len(sample), selections + len(row)
        self._samples, self._selections = samples, selections

    @property
    def fresh(self) -> bool:
        """Whether the rollouts have not been weighed: one forward pass gives weights and loss."""
        return any(math.isnan(rollout.weight) for rollout in self.rollouts)

    def rows(self, role: Role) -> WeightedRows:
        """A role's rows, with the coefficients that the rollouts have."""
        if not self._rows[role]:  # the other processes' gradients wait for ours
            return self._nothing
        return WeightedRows(self._rows[role], self._coefficients(role))

    def tokens(self, role: Role) -> int:
        """Tokens of a role's rows."""
        return sum(map(len, self._rows[role]))

    def weigh(self, selection_logps: Tensor, answer_logps: Tensor) -> tuple[list[float], list[float]]:
        """Weigh fresh rollouts by what the forward pass said, and keep them.

        Args:
            selection_logps: of the selector's completions, in row order, nats.
            answer_logps: of the generator's rows, nats.

        Returns:
            The coefficients of both roles, as `WeightedRows` has them.
        """
        policy, answers = selection_logps.tolist(), answer_logps.tolist()
        columns = {
            "proposal": [rollout.proposal_logp for rollout in self.rollouts],
            "policy": [policy[i] for i in self._sample_of],
            "answers": [math.nan if i is None else answers[i] for i in self._row_of],
        }
        matrix = {
            name: torch.tensor(column, dtype=torch.float64).reshape(-1, self.config.num_generations)
            for name, column in columns.items()
        }
        self.rollouts = weigh(
            self.rollouts,
            matrix["proposal" if self.on_policy else "policy"],
            matrix["answers"],
            self.config,
            on_policy=self.on_policy,
        )
        return self._coefficients("selector"), self._coefficients("generator") or [0.0]

    @property
    def samples_plainly(self) -> bool:
        """Whether log q is meant to be log p, up to the engine; not of no rollouts."""
        return any(self.config.sampling_at(rollout.temperature).on_policy for rollout in self.rollouts)

    @property
    def completion_tokens(self) -> int:
        """Tokens of the selector's completions."""
        return sum(len(completion) for row in self._rows["selector"] for completion in row.completions)

    def proposal_logps(self) -> Tensor:
        """log q of the selector's completions, in row order."""
        logps = torch.zeros(self._samples, dtype=torch.float64)
        for i, rollout in zip(self._sample_of, self.rollouts, strict=True):
            logps[i] = rollout.proposal_logp
        return logps

    def _coefficients(self, role: Role) -> list[float]:
        """Duplicates are one row, with their coefficients summed."""
        summed = [0.0] * (self._samples if role == "selector" else self._selections)
        for rollout, sample, row in zip(self.rollouts, self._sample_of, self._row_of, strict=True):
            if role == "selector":
                summed[sample] += rollout.selector_coefficient
            elif row is not None:
                summed[row] += rollout.weight
        return summed
