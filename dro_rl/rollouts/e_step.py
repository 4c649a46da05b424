"""The E-step: sample selections, score the answers they lead to, and weigh them. From questions to rollouts."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch

from dro_rl.config import DROConfig
from dro_rl.likelihood import Model, answer_logp, score_rows
from dro_rl.objective import (
    effective_sample_size,
    importance_weights,
    selector_coefficients,
    temperature_for_ess,
)
from dro_rl.packing import Row
from dro_rl.prompts import Prompter
from dro_rl.records import Question, Rollout, Selection
from dro_rl.rollouts.engine import Completion, RolloutEngine
from dro_rl.selection import parse_selection

OpenModel = Callable[[], AbstractContextManager[Model]]


class EStep:
    """Turns questions into weighted rollouts with the current models.

    Args:
        open_engine: opens the selector's rollout engine.
        open_selector, open_generator: open the models for scoring, without gradient.
        open_reference: opens the initial selector, for `beta`; None without.
        selector_prompter, generator_prompter: the prompts of each role.
        config: the proposal and the weighting.
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
    ) -> None:
        self.open_engine = open_engine
        self.open_selector, self.open_generator, self.open_reference = open_selector, open_generator, open_reference
        self.selector_prompter, self.generator_prompter = selector_prompter, generator_prompter
        self.config = config

    def __call__(self, indices: Sequence[int], questions: Sequence[Question], seeds: Sequence[int]) -> list[Rollout]:
        """Rollouts of some questions: m of each, in order.

        Args:
            indices: of the questions in the training set.
            questions: the questions themselves.
            seeds: one a question.
        """
        config, m = self.config, self.config.num_generations
        prompts = [self.selector_prompter.selector_prompt(question, config.num_selected) for question in questions]
        with self.open_engine() as engine:
            groups = engine.generate([prompt.ids for prompt in prompts], m, config.sampling, seeds)
            on_policy = engine.samples_policy(config.sampling)
        texts = [[self.selector_prompter.decode(sample.ids) for sample in group] for group in groups]
        selections = [
            [parse_selection(text, len(question.documents), config.num_selected) for text in group]
            for question, group in zip(questions, texts, strict=True)
        ]
        proposal = _matrix([[sum(sample.logps) for sample in group] for group in groups], m)
        prompt_ids = [prompt.ids for prompt in prompts]
        policy = proposal if on_policy else self._selection_logps(self.open_selector, prompt_ids, groups)
        reference = None
        if self.open_reference is not None:
            reference = self._selection_logps(self.open_reference, prompt_ids, groups)
        answers = self._answer_logps(questions, selections)
        mask = _matrix([[float(selection.valid) for selection in group] for group in selections], m).bool()

        log_ratio = None if on_policy else policy - proposal
        options: dict[str, Any] = {"proposal_log_ratio": log_ratio, "mask": mask, "max_log_ratio": config.max_log_ratio}
        if config.target_ess is None:
            temperature = torch.full((len(questions),), config.weight_temperature, dtype=torch.float64)
        else:
            temperature = temperature_for_ess(answers, config.target_ess, **options)
        weights = importance_weights(answers, temperature=temperature, **options)
        coefficients = selector_coefficients(
            weights,
            baseline=config.selector_baseline,
            proposal_weights=importance_weights(
                torch.zeros_like(answers), proposal_log_ratio=log_ratio, max_log_ratio=config.max_log_ratio
            ),
            selection_logps=policy,
            reference_logps=reference,
            beta=config.beta,
            entropy_coef=config.entropy_coef,
        )
        ess = effective_sample_size(weights)
        return [
            Rollout(
                question=indices[i],
                sample=j,
                token_ids=groups[i][j].ids,
                proposal_logps=groups[i][j].logps,
                text=texts[i][j],
                selection=selections[i][j],
                selection_logp=policy[i, j].item(),
                reference_logp=math.nan if reference is None else reference[i, j].item(),
                answer_logp=answers[i, j].item(),
                weight=weights[i, j].item(),
                selector_coefficient=coefficients[i, j].item(),
                ess=ess[i].item(),
                weight_temperature=temperature[i].item(),
                prompt_cut=prompts[i].cut,
            )
            for i in range(len(questions))
            for j in range(m)
        ]

    def _selection_logps(
        self, open_model: OpenModel, prompts: Sequence[tuple[int, ...]], groups: Sequence[Sequence[Completion]]
    ) -> torch.Tensor:
        """(questions, m) log p of the sampled tokens at temperature 1."""
        distinct = [list(dict.fromkeys(sample.ids for sample in group)) for group in groups]
        rows = [Row(prompt, samples) for prompt, samples in zip(prompts, distinct, strict=True)]
        with open_model() as model:
            scored = score_rows(model, rows, shared_prefix=self.config.shared_prefix != "off")
        logps = [
            dict(zip(samples, (logps.sum().item() for logps in row), strict=True))
            for samples, row in zip(distinct, scored, strict=True)
        ]
        rows_of_logps = [[known[sample.ids] for sample in group] for known, group in zip(logps, groups, strict=True)]
        return _matrix(rows_of_logps, self.config.num_generations)

    def _answer_logps(self, questions: Sequence[Question], selections: Sequence[Sequence[Selection]]) -> torch.Tensor:
        """(questions, m) log p(y|x, d_z), each distinct selection scored once; NaN for the invalid."""
        keys = list(
            dict.fromkeys(
                (i, selection.numbers) for i, group in enumerate(selections) for selection in group if selection.valid
            )
        )
        rows = [
            answer_row(self.generator_prompter, questions[i], numbers, self.config.answer_aliases)
            for i, numbers in keys
        ]
        with self.open_generator() as model:
            scored = score_rows(model, rows, shared_prefix=self.config.shared_prefix != "off")
        logps = {
            key: answer_logp(row, self.config.answer_likelihood, self.config.answer_aliases).item()
            for key, row in zip(keys, scored, strict=True)
        }
        table = [
            [logps.get((i, selection.numbers), math.nan) for selection in group] for i, group in enumerate(selections)
        ]
        return _matrix(table, self.config.num_generations)


def _matrix(rows: Sequence[Sequence[float]], m: int) -> torch.Tensor:
    """(questions, m) float64, also of no questions: a process may have none in the last part of an E-step."""
    return torch.tensor(rows, dtype=torch.float64).reshape(-1, m)


def answer_row(prompter: Prompter, question: Question, numbers: Sequence[int], aliases: str) -> Row:
    """The generator's prompt over the selected documents, with the accepted answers that count as its completions."""
    answers = question.answers[:1] if aliases == "first" else dict.fromkeys(question.answers)
    return Row(prompter.generator_prompt(question, numbers).ids, [prompter.completion(answer) for answer in answers])
