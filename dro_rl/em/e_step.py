"""The E-step: sample selections, score the answers they lead to, and weigh them. From questions to rollouts."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import NamedTuple

import torch

from dro_rl.config import DROConfig
from dro_rl.em.timing import PhaseClock
from dro_rl.em.weighing import weigh
from dro_rl.engines.protocol import RolloutEngine
from dro_rl.likelihood import Model, answer_logp, score_rows
from dro_rl.likelihood.packing import Row
from dro_rl.prompts import Prompter
from dro_rl.prompts.rows import answer_row, selector_row
from dro_rl.proposal import Completion, SamplingParams
from dro_rl.records import Question, Rollout
from dro_rl.roles import Role
from dro_rl.selection import parse_selection
from dro_rl.selection.constraint import SelectionConstraint


class SamplingRequest(NamedTuple):
    """The arguments of `RolloutEngine.generate`."""

    prompts: Sequence[Sequence[int]]
    num_generations: int
    sampling: SamplingParams
    seeds: Sequence[int]
    constraints: Sequence[SelectionConstraint] | None


OpenModel = Callable[[], AbstractContextManager[Model]]


class EStep:
    """Turns questions into weighted rollouts with the current models.

    Args:
        open_engine: opens the selector's rollout engine.
        open_selector, open_generator: open the models for scoring, without gradient.
        open_reference: opens the initial selector, for `beta`; None without.
        selector_prompter, generator_prompter: the prompts of each role.
        config: the proposal and the weighting.
        clock: told when sampling (`rollout`) and scoring begin and end, and how many tokens went through.
        flops: operations a token of a forward pass, by role.
    """

    def __init__(
        self,
        open_engine: Callable[[], AbstractContextManager[RolloutEngine]],
        open_selector: OpenModel,
        open_generator: OpenModel,
        open_reference: OpenModel | None,
        selector_prompter: Prompter,
        generator_prompter: Prompter,
        config: DROConfig,
        clock: PhaseClock | None = None,
        flops: Mapping[Role, float] | None = None,
    ) -> None:
        self.open_engine = open_engine
        self.open_selector, self.open_generator, self.open_reference = open_selector, open_generator, open_reference
        self.selector_prompter, self.generator_prompter = selector_prompter, generator_prompter
        self.config = config
        self.clock, self.flops = clock or PhaseClock(), flops or {"selector": 0.0, "generator": 0.0}

    def __call__(
        self,
        indices: Sequence[int],
        questions: Sequence[Question],
        seeds: Sequence[int],
        temperature: float | None = None,
        sampled: Sequence[Sequence[Completion]] | None = None,
    ) -> list[Rollout]:
        """Rollouts of some questions, weighted: m of each, in order. Arguments as in `sample`."""
        rollouts, on_policy = self.sample(indices, questions, seeds, temperature, sampled)
        return weigh(
            rollouts,
            self._proposal(rollouts) if on_policy else self._selection_logps(self.open_selector, questions, rollouts),
            self._answer_logps(questions, rollouts),
            self.config,
            on_policy=on_policy,
        )

    def sample(
        self,
        indices: Sequence[int],
        questions: Sequence[Question],
        seeds: Sequence[int],
        temperature: float | None = None,
        sampled: Sequence[Sequence[Completion]] | None = None,
    ) -> tuple[list[Rollout], bool]:
        """Rollouts that are not weighed yet: what the models that train say of them is NaN.

        Args:
            indices: of the questions in the training set.
            questions: the questions themselves.
            seeds: one a question.
            temperature: of the sampling; the config's, unless told.
            sampled: what `request` was answered ahead of time, by weights that may be older; None: sample now.

        Returns:
            m rollouts of each question, in order, and whether they were drawn from the policy itself.
        """
        k = self.config.num_selected
        with self.clock.phase("inputs"):
            request, cut = self.request(questions, seeds, temperature)
        on_policy, groups = False, sampled
        if groups is None:
            with self.clock.phase("rollout"), self.open_engine() as engine:
                groups, on_policy = engine.generate(*request), engine.samples_policy(request.sampling)
        tokens = sum(map(len, request.prompts)) + sum(len(sample.ids) for group in groups for sample in group)
        self.clock.count("rollout", tokens, tokens * self.flops["selector"])
        rollouts = []
        for index, question, group, was_cut in zip(indices, questions, groups, cut, strict=True):
            for number, sample in enumerate(group):
                text = self.selector_prompter.decode(sample.ids)
                rollouts.append(
                    Rollout(
                        index,
                        number,
                        sample.ids,
                        sample.logps,
                        text,
                        parse_selection(text, len(question.documents), k),
                        prompt_cut=was_cut,
                        temperature=request.sampling.temperature,
                    )
                )
        if self.open_reference is not None:
            reference = self._selection_logps(self.open_reference, questions, rollouts).flatten().tolist()
            rollouts = [replace(r, reference_logp=logp) for r, logp in zip(rollouts, reference, strict=True)]
        return rollouts, on_policy

    def request(
        self, questions: Sequence[Question], seeds: Sequence[int], temperature: float | None = None
    ) -> tuple[SamplingRequest, list[bool]]:
        """What an engine is asked for the rollouts of some questions, and which prompts were cut to fit."""
        config, prompter = self.config, self.selector_prompter
        prompts = [prompter.selector_prompt(question, config.num_selected) for question in questions]
        constraints = [self._constraint(question) for question in questions] if config.constrain_selection else None
        sampling = config.sampling_at(temperature)
        ids = [prompt.ids for prompt in prompts]
        request = SamplingRequest(ids, config.num_generations, sampling, seeds, constraints)
        return request, [prompt.cut for prompt in prompts]

    def _constraint(self, question: Question) -> SelectionConstraint:
        return self.selector_prompter.constraint(len(question.documents), self.config.num_selected)

    def _proposal(self, rollouts: Sequence[Rollout]) -> torch.Tensor:
        return self._matrix([rollout.proposal_logp for rollout in rollouts])

    def _selection_logps(
        self, open_model: OpenModel, questions: Sequence[Question], rollouts: Sequence[Rollout]
    ) -> torch.Tensor:
        """(questions, m) log p of the sampled tokens at temperature 1, under the constraint where there is one."""
        m = self.config.num_generations
        rows = [
            selector_row(
                self.selector_prompter,
                question,
                list(dict.fromkeys(rollout.token_ids for rollout in rollouts[i * m : (i + 1) * m])),
                self.config,
            )
            for i, question in enumerate(questions)
        ]
        logps = {
            (i, completion): logp.sum().item()
            for i, (row, scored) in enumerate(zip(rows, self._score("selector", open_model, rows), strict=True))
            for completion, logp in zip(row.completions, scored, strict=True)
        }
        return self._matrix([logps[i // m, rollout.token_ids] for i, rollout in enumerate(rollouts)])

    def _answer_logps(self, questions: Sequence[Question], rollouts: Sequence[Rollout]) -> torch.Tensor:
        """(questions, m) log p(y|x, d_z), each distinct selection scored once; NaN for the invalid."""
        m, config = self.config.num_generations, self.config
        numbers = [rollout.selection.numbers for rollout in rollouts]
        keys = list(dict.fromkeys((i // m, numbers[i]) for i, r in enumerate(rollouts) if r.selection.valid))
        rows = [answer_row(self.generator_prompter, questions[i], z, config.answer_aliases) for i, z in keys]
        logps = {
            key: answer_logp(scored, config.answer_likelihood, config.answer_aliases).item()
            for key, scored in zip(keys, self._score("generator", self.open_generator, rows), strict=True)
        }
        return self._matrix([logps.get((i // m, z), math.nan) for i, z in enumerate(numbers)])

    def _score(self, role: Role, open_model: OpenModel, rows: Sequence[Row]) -> list[list[torch.Tensor]]:
        config, tokens = self.config, sum(map(len, rows))
        self.clock.count("scoring", tokens, tokens * self.flops[role])
        with self.clock.phase("scoring"), open_model() as model:
            return score_rows(
                model, rows, config.tokens_per_microbatch, config.scoring.shared_prefix, config.prefix_tree
            )

    def _matrix(self, values: Sequence[float]) -> torch.Tensor:
        """(questions, m) float64, also of no questions: a process may have none in the last part of an E-step."""
        return torch.tensor(values, dtype=torch.float64).reshape(-1, self.config.num_generations)
