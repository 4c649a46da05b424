"""The E-step: sample selections, score the answers they lead to, and weigh them. From questions to rollouts."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace

import torch

from dro_rl.em.method import Method
from dro_rl.em.timing import PhaseClock
from dro_rl.em.weighing import weigh
from dro_rl.engines.answers import Answerer, ModelAnswerer
from dro_rl.engines.protocol import RolloutEngine
from dro_rl.engines.selecting import Selecting
from dro_rl.likelihood import Model, answer_logps
from dro_rl.likelihood.packing import Row
from dro_rl.likelihood.room import Room
from dro_rl.prompts import Prompter
from dro_rl.prompts.rows import answer_row, selector_rows
from dro_rl.proposal import candidate_orders, rollout_seed
from dro_rl.records import Question, Rollout, Sample
from dro_rl.rewards import Read, score
from dro_rl.roles import Role

OpenRole = Callable[[Role], AbstractContextManager[Model]]
"""Opens a role for scoring, without gradient."""


@dataclass(frozen=True, slots=True)
class Asked:
    """What an E-step, or a part of one, covers.

    Args:
        indices: of the questions in the training set.
        questions: the questions themselves.
        seeds: one a question.
        temperature: of the sampling.
    """

    indices: Sequence[int]
    questions: Sequence[Question]
    seeds: Sequence[int]
    temperature: float


@dataclass(frozen=True, slots=True)
class Sampled:
    """m samples of each question, in order, and whether they were drawn from the policy itself."""

    samples: Sequence[Sample]
    on_policy: bool


class EStep:
    """Turns questions into weighted rollouts with the current models.

    Args:
        engine: samples selections.
        open_role: opens the models that score.
        open_reference: opens the initial selector, for `beta`; None without.
        prompters: the prompts of each role.
        method: what is asked, sampled, scored and weighed.
        clock: told when sampling (`rollout`) and scoring begin and end, and how many tokens went through.
        flops: operations a token of a forward pass, by role.
        answerer: the generator, where it is another than the one that `open_role` opens.
        room: for how many tokens a pass has room, where that is found out on the way.
    """

    def __init__(
        self,
        engine: RolloutEngine,
        open_role: OpenRole,
        open_reference: Callable[[], AbstractContextManager[Model]] | None,
        prompters: Mapping[Role, Prompter],
        method: Method,
        clock: PhaseClock | None = None,
        flops: Mapping[Role, float] | None = None,
        answerer: Answerer | None = None,
        room: Room | None = None,
    ) -> None:
        self.engine, self.open_role, self.open_reference = engine, open_role, open_reference
        self.prompters, self.method = prompters, method
        self.clock, self.flops = clock or PhaseClock(), flops or {}
        self.room = room or Room(method.scoring.tokens)
        self.answerer = answerer or ModelAnswerer(
            lambda: open_role("generator"), prompters["generator"], method.scoring, room=self.room
        )

    def selecting(self, asked: Asked) -> Selecting:
        """The rollouts of some questions, to be drawn. Each question has a list for each order of its candidates."""
        method, count = self.method, self.method.candidate_orders
        lists = [
            (question, order)
            for question, seed in zip(asked.questions, asked.seeds, strict=True)
            for order in candidate_orders(seed, len(question.documents), count)
        ]
        sampling = replace(method.sampling, temperature=asked.temperature)
        seeds = asked.seeds if count == 1 else [rollout_seed(seed, n) for seed in asked.seeds for n in range(count)]
        prompter, m = self.prompters["selector"], method.num_generations // count
        return Selecting(prompter, lists, method.spec, method.windows, m, sampling, seeds)

    def sample(self, asked: Asked, step: int) -> Sampled:
        """Samples of the weights after `step` updates."""
        with self.clock.phase("inputs"):
            selecting = self.selecting(asked)
        with self.clock.phase("sync"), self.engine.at(step) as engine, self.clock.phase("rollout"):
            selecting.run(engine.generate)
            on_policy = engine.samples_policy(selecting.sampling)
        return self.read(asked, selecting, on_policy)

    def read(self, asked: Asked, selecting: Selecting, on_policy: bool) -> Sampled:
        """What was drawn, as samples.

        Args:
            asked: the questions.
            selecting: their rollouts, drawn with these weights or, ahead of time, with older ones.
            on_policy: whether log q is log p.
        """
        tokens, m = selecting.tokens, self.method.num_generations
        self.clock.count("rollout", tokens, tokens * self.flops.get("selector", 0.0))
        samples = []
        for i, drawn in enumerate(selecting.drawn):
            *earlier, last = drawn.windows
            samples.append(
                Sample(
                    asked.indices[i // m],
                    i % m,
                    last.token_ids,
                    last.proposal_logps,
                    last.text,
                    drawn.selection,
                    last.order,
                    tuple(earlier),
                    prompt_cut=drawn.cut,
                    temperature=selecting.sampling.temperature,
                )
            )
        if self.open_reference is not None:
            logps = self._selection_logps(self.open_reference, asked.questions, samples).flatten().tolist()
            samples = [replace(each, reference_logp=logp) for each, logp in zip(samples, logps, strict=True)]
        return Sampled(samples, on_policy)

    def weigh(self, asked: Asked, sampled: Sampled) -> list[Rollout]:
        """The samples, scored by both models and weighed."""
        samples, questions = sampled.samples, asked.questions
        if sampled.on_policy:
            policy = self._matrix([sample.proposal_logp for sample in samples])
        else:
            policy = self._selection_logps(lambda: self.open_role("selector"), questions, samples)
        samples = self._scored(questions, samples)
        if self.method.reward.others:
            samples = self._rewarded(asked, samples)
        return weigh(
            samples,
            policy,
            self.method.weighting,
            self.method.reward,
            likelihood=self.method.scoring.answer_likelihood,
            on_policy=sampled.on_policy,
        )

    def _rewarded(self, asked: Asked, samples: Sequence[Sample]) -> list[Sample]:
        """The samples with the generator's answers and their rewards. Each distinct selection is answered once."""
        m, prompter = self.method.num_generations, self.prompters["generator"]
        keys = [(i // m, sample.selection.numbers) for i, sample in enumerate(samples)]
        distinct: dict[tuple[int, tuple[int, ...]], int] = {}  # with the place of its first sample
        for i, sample in enumerate(samples):
            if sample.selection.valid:
                distinct.setdefault(keys[i], i)
        prompts = [prompter.generator_prompt(asked.questions[q], z).ids for q, z in distinct]
        seeds = [rollout_seed(asked.seeds[q], "answer", *z) for q, z in distinct]
        with self.clock.phase("answers"):
            written = self.answerer.write(prompts, self.method.answering, seeds)
        read = [
            Read(
                asked.questions[q],
                tuple(asked.questions[q].documents[number - 1] for number in z),
                answer.text,
                samples[place].answer_logp_as(self.method.scoring.answer_likelihood),
            )
            for ((q, z), place), answer in zip(distinct.items(), written, strict=True)
        ]
        rewards = dict(zip(distinct, zip(read, score(self.method.reward.others, read), strict=True), strict=True))
        return [
            replace(sample, answer=rewards[key][0].answer, rewards=rewards[key][1]) if key in rewards else sample
            for sample, key in zip(samples, keys, strict=True)
        ]

    def _selection_logps(
        self,
        open_model: Callable[[], AbstractContextManager[Model]],
        questions: Sequence[Question],
        samples: Sequence[Sample],
    ) -> torch.Tensor:
        """(questions, m) log p of the sampled tokens at temperature 1, under the constraint where there is one: the sum
        over a sample's windows."""
        m, prompter = self.method.num_generations, self.prompters["selector"]
        rows, keys = [], []
        for i, question in enumerate(questions):
            own, written = selector_rows(prompter, question, samples[i * m : (i + 1) * m], self.method.spec)
            rows += own
            keys += [(i, each) for each in written]
        scored = [logp.sum().item() for row in self._score_selections(open_model, rows) for logp in row]
        logps = dict(zip(keys, scored, strict=True))
        return self._matrix(
            [sum(logps[i // m, window.written] for window in each.all_windows) for i, each in enumerate(samples)]
        )

    def _scored(self, questions: Sequence[Question], samples: Sequence[Sample]) -> list[Sample]:
        """The samples with log p(y|x, d_z), each distinct selection scored once; the invalid have none."""
        m, scoring, prompter = self.method.num_generations, self.method.scoring, self.prompters["generator"]
        numbers = [sample.selection.numbers for sample in samples]
        keys = list(dict.fromkeys((i // m, numbers[i]) for i, each in enumerate(samples) if each.selection.valid))
        rows = [answer_row(prompter, questions[i], z, scoring.answer_aliases) for i, z in keys]
        self._count("generator", rows)
        with self.clock.phase("scoring"):
            scored = self.answerer.score(rows)
        logps = {
            key: answer_logps(logps, scoring.answer_aliases).tolist() for key, logps in zip(keys, scored, strict=True)
        }
        nothing = (math.nan, math.nan)
        both = [logps.get((i // m, z), nothing) for i, z in enumerate(numbers)]
        return [
            replace(sample, answer_logp_sum=total, answer_logp_mean=mean)
            for sample, (total, mean) in zip(samples, both, strict=True)
        ]

    def _count(self, role: Role, rows: Sequence[Row]) -> None:
        tokens = sum(map(len, rows))
        self.clock.count("scoring", tokens, tokens * self.flops.get(role, 0.0))

    def _score_selections(
        self, open_model: Callable[[], AbstractContextManager[Model]], rows: Sequence[Row]
    ) -> list[list[torch.Tensor]]:
        self._count("selector", rows)
        with self.clock.phase("scoring"):
            selector = ModelAnswerer(open_model, self.prompters["selector"], self.method.scoring, room=self.room)
            return selector.score(rows)

    def _matrix(self, values: Sequence[float]) -> torch.Tensor:
        """(questions, m) float64, also of no questions: a process may have none in the last part of an E-step."""
        return torch.tensor(values, dtype=torch.float64).reshape(-1, self.method.num_generations)
