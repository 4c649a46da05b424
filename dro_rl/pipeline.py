"""The trained pair at work: a question and its documents in, an answer out. Evaluation runs through the same code."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import GenerationConfig

from dro_rl import engines
from dro_rl.engines.answers import Answerer, ModelAnswerer
from dro_rl.engines.decoding import Decoder
from dro_rl.engines.selecting import Selecting
from dro_rl.errors import InputError, Phrase
from dro_rl.files import folder_written_whole, written_whole
from dro_rl.keys.reference import KEYS
from dro_rl.likelihood import Model, Scoring
from dro_rl.models.loading import declared_ends, load_tokenizer
from dro_rl.models.positions import positions_of
from dro_rl.models.serving import load_role_to_serve
from dro_rl.prompts import Prompter
from dro_rl.prompts.lengths import check_answers
from dro_rl.proposal import SamplingParams
from dro_rl.records import Document, Question, Selection
from dro_rl.roles import ROLES, Role
from dro_rl.rows.small import read_object, record
from dro_rl.selection import SelectionSpec
from dro_rl.selection.windows import Windows

if TYPE_CHECKING:
    from dro_rl.config import DROConfig

logger = logging.getLogger(__name__)

SETTINGS = "pipeline.json"
PROMPT = "prompt.jinja"


@dataclass(frozen=True, slots=True)
class Answer:
    """An answer.

    Args:
        text: what the generator wrote, outside a thinking block.
        selection: what it read. Invalid when the selector named no document: then it read the first K candidates.
        logp: log-probability of all that it wrote, its end included, nats.
    """

    text: str
    selection: Selection
    logp: float


@dataclass(frozen=True, slots=True)
class PipelineSettings:
    """What serving needs to know of training.

    Args:
        num_selected: K, or {min: 1, max: 5}, as in the recipe.
        constrain_selection: the selector writes K distinct valid numbers and nothing else, as it was trained to.
        window_size, window_stride: how candidates are shown where there are more than a window holds, as in the recipe.
        generator_endpoint, generator_endpoint_model: where the generator is served; None where its weights are here.
        max_prompt_length, max_completion_length, max_answer_length: in tokens.
        chat_template_kwargs: as in the recipe.
    """

    num_selected: int | dict[str, int]
    max_prompt_length: int | None
    max_completion_length: int
    max_answer_length: int
    chat_template_kwargs: dict[str, Any]
    constrain_selection: bool = False
    generator_endpoint: str | None = None
    generator_endpoint_model: str | None = None
    window_size: int | None = None
    window_stride: int | None = None

    @property
    def windows(self) -> Windows | None:
        """How long lists of candidates are shown. Raises `InputError` for windows that do not fit K."""
        return Windows.of(self.window_size, self.window_stride, self.spec.most)

    def slid(self, window_size: int | None, window_stride: int | None) -> PipelineSettings:
        """With other windows, where any are given: a size comes with its own stride.

        Raises:
            InputError: windows do not fit K.
        """
        settings = self
        if window_size is not None or window_stride is not None:
            settings = replace(self, window_size=window_size or self.window_size, window_stride=window_stride)
        Windows.of(settings.window_size, settings.window_stride, settings.spec.most)
        return settings

    @property
    def spec(self) -> SelectionSpec:
        """What the selector is asked for."""
        return SelectionSpec.of(self.num_selected, self.constrain_selection)

    @classmethod
    def of(cls, config: DROConfig, chat_template_kwargs: Mapping[str, Any]) -> PipelineSettings:
        """What a training would leave behind."""
        return cls(
            config.num_selected,
            config.max_prompt_length,
            config.max_completion_length,
            config.max_answer_length,
            dict(chat_template_kwargs),
            config.constrain_selection,
            config.generator_endpoint,
            config.generator_endpoint_model,
            config.window_size,
            config.window_stride,
        )


class RAGPipeline:
    """Selects K of a question's documents and answers from them, both greedily.

    Args:
        open_role: opens the selector or the generator for calls without gradient.
        prompters: the prompts of each role.
        settings: lengths and K.
        batch_size: questions answered at once.
        shared_prefix: pack prompts without padding, where that is exact.
        answerer: the generator, where it is another than the one that `open_role` opens.
    """

    def __init__(
        self,
        open_role: Callable[[Role], AbstractContextManager[Model]],
        prompters: dict[Role, Prompter],
        settings: PipelineSettings,
        batch_size: int = 8,
        shared_prefix: bool = True,
        answerer: Answerer | None = None,
    ) -> None:
        self.open_role, self.prompters, self.settings = open_role, prompters, settings
        self.batch_size, self.shared_prefix = batch_size, shared_prefix
        self._answerer = answerer

    @cached_property
    def answerer(self) -> Answerer:
        """The generator."""
        if self._answerer is not None:
            return self._answerer
        scoring = Scoring(shared_prefix=self.shared_prefix, prefix_tree=False)
        open_generator = partial(self.open_role, "generator")
        return ModelAnswerer(open_generator, self.prompters["generator"], scoring, self.batch_size)

    @classmethod
    def from_pretrained(
        cls,
        directory: str | Path,
        *,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
        settings: PipelineSettings | None = None,
        templates: Mapping[Role, str] | None = None,
        roles: Sequence[Role] = ROLES,
        batch_size: int = 8,
    ) -> RAGPipeline:
        """Load what a run left behind. Where nothing else says how long a prompt may be, the model's positions do.

        Args:
            directory: a run's `output_dir`, with `selector/`, `generator/` and `pipeline.json`.
            device: CUDA when there is one, unless told.
            dtype: that of the saved weights, unless told.
            settings: those of `pipeline.json`, unless told.
            templates: of the prompts; those that were saved with the models, unless told.
            roles: the models to load; the generator alone answers from given selections, the selector alone selects.
            batch_size: questions answered at once.

        Raises:
            InputError: for a folder that does not hold a finished run.
        """
        directory = Path(directory)
        settings = settings or read_settings(directory)
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        models, prompters = {}, {}
        for role in roles:
            folder, positions = directory / role, None
            if role == "selector" or settings.generator_endpoint is None:
                models[role] = load_role_to_serve(folder, torch.device(device), dtype)
                positions, _ = positions_of(models[role].config)
            written = settings.max_completion_length if role == "selector" else settings.max_answer_length
            prompters[role] = Prompter(
                load_tokenizer(str(folder)),
                templates[role] if templates else str(folder / PROMPT),
                settings.max_prompt_length or (positions and positions - written),
                settings.chat_template_kwargs,
                declared_ends(str(folder)),
            )
        answerer = None
        if settings.generator_endpoint is not None and "generator" in roles:
            name = settings.generator_endpoint_model
            answerer = engines.served(settings.generator_endpoint, name, prompters["generator"])
        return cls(lambda role: nullcontext(models[role]), prompters, settings, batch_size, answerer=answerer)

    def leave_room(self, questions: Sequence[Question], aliases: str) -> None:
        """Cut the generator's prompts so that gold answers, which are scored whole, fit behind them too.

        Raises:
            InputError: `max_prompt_length` says how long prompts are, and leaves too little.
        """
        prompter, settings = self.prompters["generator"], self.settings
        positions, what = self.answerer.positions()
        if positions is None:
            return
        prompter.max_prompt_length = settings.max_prompt_length
        longest = check_answers(questions, prompter, aliases, positions, what)
        if settings.max_prompt_length is None:
            prompter.max_prompt_length = positions - max(longest, settings.max_answer_length)

    def answer(self, question: str, documents: Sequence[Document]) -> Answer:
        """Answer one question from its documents, of which at least one."""
        if not documents:
            raise ValueError("there is nothing to select from: give at least one document")
        return self.answer_all([Question("question", question, (), tuple(documents))])[0]

    @torch.no_grad()
    def answer_all(self, questions: Sequence[Question], selections: Sequence[Selection] | None = None) -> list[Answer]:
        """Answer many questions, all selections first; the selector is not asked where selections are given."""
        selections = self.select_all(questions) if selections is None else selections
        prompts = [
            self.prompters["generator"]
            .generator_prompt(question, read(selection, question, self.settings.spec.most))
            .ids
            for question, selection in zip(questions, selections, strict=True)
        ]
        greedy = SamplingParams(self.settings.max_answer_length, temperature=0.0)
        written = self.answerer.write(prompts, greedy, [0] * len(prompts))
        return [
            Answer(answer.text, selection, answer.logp) for selection, answer in zip(selections, written, strict=True)
        ]

    def select_all(self, questions: Sequence[Question]) -> list[Selection]:
        """The selector's greedy selection for each question; window by window where they have more candidates."""
        settings, prompter = self.settings, self.prompters["selector"]
        greedy = SamplingParams(settings.max_completion_length, temperature=0.0)
        lists, seeds = [(question, ()) for question in questions], [0] * len(questions)
        selecting = Selecting(prompter, lists, settings.spec, settings.windows, 1, greedy, seeds)
        with self.open_role("selector") as model:
            decoder = Decoder(model, prompter.ends.stops, self.batch_size, self.shared_prefix)
            return [drawn.selection for drawn in selecting.run(decoder.generate).drawn]


def read(selection: Selection, question: Question, most: int) -> tuple[int, ...]:
    """The document numbers that the generator reads: those selected, or the first K when none was."""
    return selection.numbers or tuple(range(1, min(most, len(question.documents)) + 1))


def read_settings(directory: Path) -> PipelineSettings:
    """Read `pipeline.json`. Raises `InputError` for a folder without one."""
    path = directory / SETTINGS
    if not path.is_file():
        raise InputError(
            str(directory),
            Phrase(f"no {SETTINGS}"),
            "this is the output folder of a finished run",
            "Finish the run first.",
        )
    what, fix = "what a finished run was told", "Put it back, or write it by finishing the run again."
    settings = record(PipelineSettings, read_object(path, what, fix), str(path), what, fix)
    for name, value in asdict(settings).items():
        try:
            KEYS[name].check(value)
        except InputError as error:
            raise InputError(f"{path}: {name}", value, error.rule, fix) from None
    try:
        settings.slid(None, None)
    except InputError as error:
        raise InputError(f"{path}: {error.place}", error.value, error.rule, fix) from None
    return settings


def save_settings(directory: Path, settings: PipelineSettings, generator: Prompter | None = None) -> None:
    """Write `pipeline.json`, whole, and of a generator behind an endpoint its tokenizer and its prompt."""
    if settings.generator_endpoint is not None and generator is not None:
        with folder_written_whole(directory / "generator") as beside:
            generator.tokenizer.save_pretrained(beside)
            GenerationConfig(eos_token_id=list(generator.ends.stops)).save_pretrained(beside)
            (beside / PROMPT).write_text(generator.source, encoding="utf-8")
        logger.info(f"generator/ has a tokenizer and a prompt alone: the model is at {settings.generator_endpoint}")
    with written_whole(directory / SETTINGS) as beside:
        beside.write_text(json.dumps(asdict(settings), indent=2) + "\n")
