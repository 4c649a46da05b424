"""Selections on their way: what the selector is asked next, and what it has said. Here sampling and serving are one.

A list that is shown whole takes one request. A longer one takes a request a window (`selection.windows`), and all
rollouts of all questions take each window together. They share their first window's prompt; from the second on each has
a prompt of its own, made of what it picked.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from dro_rl.engines.protocol import GenerationRequest
from dro_rl.prompts import Prompter
from dro_rl.prompts.rows import constraint_of
from dro_rl.proposal import Completion, SamplingParams, rollout_seed
from dro_rl.records import Question, Selection, Window
from dro_rl.selection import SelectionSpec, parse_selection
from dro_rl.selection.windows import Slide, Windows


@dataclass(slots=True)
class Drawn:
    """One selection, as far as it has come.

    Args:
        question: with all its candidates.
        seed, number: of its list, and its place among the selections of that.
        slide: the window that is asked for next; None when it has come to its end.
        windows: those that it has been through.
        selection: what the last of them says, in the question's own numbers, with the problems of all.
        cut: whether any of its prompts was cut to fit.
    """

    question: Question
    seed: int
    number: int
    slide: Slide | None
    windows: list[Window] = field(default_factory=list)
    selection: Selection = Selection((), False)
    cut: bool = False


class Selecting:
    """The selections of some lists of candidates, while they are drawn.

    Args:
        prompter: the selector's.
        lists: the questions, each with the order that its candidates are listed in; empty for their own.
        spec: what the selector is asked for.
        windows: how long lists are shown; None for whole.
        num_generations: selections of each list.
        sampling: the proposal.
        seeds: one a list.
    """

    def __init__(
        self,
        prompter: Prompter,
        lists: Sequence[tuple[Question, Sequence[int]]],
        spec: SelectionSpec,
        windows: Windows | None,
        num_generations: int,
        sampling: SamplingParams,
        seeds: Sequence[int],
    ) -> None:
        self.prompter, self.spec, self.sampling = prompter, spec, sampling
        self.tokens = 0
        """Of the prompts that were asked, each once, and of what was written."""
        self.drawn = [
            Drawn(question, seed, number, Slide.begin(windows, len(question.documents), order))
            for (question, order), seed in zip(lists, seeds, strict=True)
            for number in range(num_generations)
        ]
        """`num_generations` of each list, list after list."""
        self._asked = self.drawn
        self.request: GenerationRequest | None = self._ask(self.drawn[::num_generations], num_generations, seeds)
        """What the engine is asked next; None when all is drawn."""

    def run(self, generate: Callable[[GenerationRequest], list[list[Completion]]]) -> Selecting:
        """Draw all of them. Returns itself."""
        while self.request is not None:
            self.take(generate(self.request))
        return self

    def take(self, groups: Sequence[Sequence[Completion]]) -> None:
        """Read what the engine answered to `request`, and make the next one.

        A window that names no document ends its selection there, which is invalid.
        """
        completions = [completion for group in groups for completion in group]
        for drawn, completion in zip(self._asked, completions, strict=True):
            self._read(drawn, completion)
        self._asked = [drawn for drawn in self._asked if drawn.slide is not None]
        seeds = [rollout_seed(drawn.seed, "window", len(drawn.windows), drawn.number) for drawn in self._asked]
        self.request = self._ask(self._asked, 1, seeds) if self._asked else None

    def _read(self, drawn: Drawn, completion: Completion) -> None:
        slide = drawn.slide
        assert slide is not None, "it was asked for"
        text, order = self.prompter.decode(completion.ids), slide.shown
        read = parse_selection(text, len(order) or len(drawn.question.documents), self.spec.most, self.spec.least)
        numbers = tuple(order[place - 1] for place in read.numbers) if order else read.numbers
        problems = tuple(dict.fromkeys((*drawn.selection.problems, *read.problems)))
        drawn.windows.append(Window(order, completion.ids, completion.logps, text, numbers))
        drawn.selection = replace(read, numbers=numbers, problems=problems)
        drawn.slide = slide.after(numbers) if read.valid and not slide.last else None
        self.tokens += len(completion.ids)

    def _ask(self, asked: Sequence[Drawn], num_generations: int, seeds: Sequence[int]) -> GenerationRequest:
        """A request for the next window of each, `num_generations` times: those that follow each other share it."""
        shown = [drawn.question.shown(drawn.slide.shown) for drawn in asked if drawn.slide is not None]
        prompts = [self.prompter.selector_prompt(question, self.spec.most, self.spec.least) for question in shown]
        constraints = [constraint_of(self.prompter, question, self.spec) for question in shown]
        for i, prompt in enumerate(prompts):
            self.tokens += len(prompt.ids)
            for drawn in self._asked[i * num_generations : (i + 1) * num_generations]:
                drawn.cut = drawn.cut or prompt.cut
        return GenerationRequest(
            [prompt.ids for prompt in prompts],
            num_generations,
            self.sampling,
            seeds,
            [each for each in constraints if each is not None] if self.spec.constrained else None,
        )
