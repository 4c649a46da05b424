"""`solvable`: training questions by how often the first models answer them. Those in a range are kept.

A question's share is that of its m rollouts after which the generator writes an accepted answer (EM), drawn and
answered as in a first E-step; a rollout that names no document answers nothing. Shares are kept by the hash of what
they depend on, so that another range, or another run, asks no model.
"""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import cast

import transformers
from accelerate import PartialState
from accelerate.utils import gather_object

from dro_rl import __version__, engines
from dro_rl.em.e_step import Asked, EStep
from dro_rl.em.method import Method
from dro_rl.em.schedule import Schedule
from dro_rl.engines.answers import ModelAnswerer
from dro_rl.engines.decoding import Decoder
from dro_rl.engines.protocol import RolloutEngine
from dro_rl.errors import InputError
from dro_rl.files import write_json_lines
from dro_rl.job.assembly import one_role_at_a_time
from dro_rl.job.identity import model_hashes, question_hashes
from dro_rl.job.preflight import check_steps
from dro_rl.metrics import exact_match
from dro_rl.processes import told_by_main
from dro_rl.progress import Progress
from dro_rl.prompts import Prompter
from dro_rl.proposal import rollout_seed
from dro_rl.recipe import Recipe
from dro_rl.records import Question
from dro_rl.roles import Role
from dro_rl.rows.strict_json import json_lines

logger = logging.getLogger(__name__)

TOGETHER = 32
"""Questions of a process between two looks at the progress."""


def keep_solvable(
    recipe: Recipe, sources: Mapping[Role, str], train: Sequence[Question], prompters: Mapping[Role, Prompter]
) -> Sequence[Question]:
    """The training questions that the recipe keeps: all of them without `solvable`.

    Args:
        recipe: the run's.
        sources: where each role starts from.
        train: all training questions.
        prompters: the prompts of each role.

    Raises:
        InputError: none is kept, or too few for the recipe's steps.
    """
    run, training = recipe.run, recipe.training
    if run.solvable is None:
        return train
    low, high = map(float, run.solvable)
    name = f"solvable-{fingerprint(recipe, sources, train, prompters)}.jsonl"
    path = Path(run.warmup_cache_dir).expanduser() / name
    shares = told_by_main(lambda: _known(path, train))
    if shares is None:
        shares = measure(recipe, sources, train, prompters)
        if PartialState().is_main_process:
            pairs = zip(train, shares, strict=True)
            write_json_lines(path, ({"id": question.id, "share": share} for question, share in pairs))
    kept = [question for question, share in zip(train, shares, strict=True) if low <= share <= high]
    below, above = sum(share < low for share in shares), sum(share > high for share in shares)
    if not kept:
        raise InputError(
            "solvable",
            run.solvable,
            f"some training question is answered by such a share of the first models' {training.num_generations} "
            f"rollouts, and of {len(train)} {below} are answered less often and {above} more often",
            "Widen it, or warm the models up.",
        )
    logger.info(
        f"solvable: {list(map(float, run.solvable))} keeps {len(kept)} of {len(train)} training questions; {below} are "
        f"answered less often by the first models' {training.num_generations} rollouts and {above} more often"
    )
    training.check_batch(training.world_size, len(kept))
    check_steps(training, Schedule.of(training, training.world_size, len(kept)))
    return kept


def measure(
    recipe: Recipe, sources: Mapping[Role, str], train: Sequence[Question], prompters: Mapping[Role, Prompter]
) -> list[float]:
    """The share of each question, 0..1, on every process: each measures its part, with one model at a time."""
    state, training = PartialState(), recipe.training
    method, open_role, prompter = Method.of(training), one_role_at_a_time(recipe, sources), prompters["generator"]
    own = range(state.process_index, len(train), state.num_processes)
    parts = [own[first : first + TOGETHER] for first in range(0, len(own), TOGETHER)]
    bars, quiet = not training.disable_tqdm, not state.is_main_process
    drawn: dict[int, list[tuple[int, ...]]] = {}
    answerer = engines.elsewhere(training, prompter) or ModelAnswerer(
        lambda: open_role("generator"), prompter, method.scoring, training.per_device_eval_batch_size
    )
    nowhere = cast(RolloutEngine, None)  # the E-step asks and reads; the decoder here is the engine
    e_step, m = EStep(nowhere, open_role, None, prompters, method, answerer=answerer), method.num_generations
    with open_role("selector") as model, Progress(len(own), "solvable, selections", bars=bars, quiet=quiet) as progress:
        stops = prompters["selector"].ends.stops
        decoder = Decoder(model, stops, training.per_device_eval_batch_size, method.scoring.shared_prefix)
        for part in parts:
            seeds = [rollout_seed(training.seed, "solvable", i) for i in part]
            asked = Asked(part, [train[i] for i in part], seeds, method.sampling.temperature)
            samples = e_step.read(asked, e_step.selecting(asked).run(decoder.generate), on_policy=False).samples
            for place, i in enumerate(part):
                drawn[i] = [sample.selection.numbers for sample in samples[place * m : (place + 1) * m]]
            progress.update(len(part))
    shares: list[tuple[int, float]] = []
    with Progress(len(own), "solvable, answers", bars=bars, quiet=quiet) as progress:
        for part in parts:
            pairs = [(i, numbers) for i in part for numbers in dict.fromkeys(drawn[i]) if numbers]
            written = answerer.write(
                [prompter.generator_prompt(train[i], numbers).ids for i, numbers in pairs],
                method.answering,
                [rollout_seed(training.seed, "solvable", i, *numbers) for i, numbers in pairs],
            )
            right = {
                (i, numbers): exact_match(answer.text, train[i].answers)
                for (i, numbers), answer in zip(pairs, written, strict=True)
            }
            for i in part:
                answered = [right.get((i, numbers), 0.0) for numbers in drawn[i]]
                shares.append((i, math.fsum(answered) / len(answered)))
            progress.update(len(part))
    return [share for _, share in sorted(gather_object(shares))]


def fingerprint(
    recipe: Recipe, sources: Mapping[Role, str], train: Sequence[Question], prompters: Mapping[Role, Prompter]
) -> str:
    """A hash of all that the shares depend on: questions, prompts, weights, how is drawn and answered, versions."""
    run, training, method = recipe.run, recipe.training, Method.of(recipe.training)
    parts: list[object] = [sorted(question_hashes(train).items())]
    for role, prompter in prompters.items():
        if role in training.roles:
            revision = run.of(role).revision if sources[role] == run.of(role).model else None
            parts.append(sorted(model_hashes(sources[role], revision).items()))
        parts.append((prompter.source, prompter.max_prompt_length, sorted(prompter.chat_template_kwargs.items())))
    parts += [method.spec, method.num_generations, method.sampling, method.answering, training.seed, run.share_base]
    parts += [training.generator_endpoint, training.generator_endpoint_model, run.dtype, training.bf16, training.fp16]
    parts += [run.quantization, [run.of(role).lora_r > 0 for role in training.roles], run.attn_implementation]
    parts += [method.candidate_orders, method.windows, transformers.__version__, __version__]
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def _known(path: Path, train: Sequence[Question]) -> list[float] | None:
    """The shares in the cache; None where there are none, or of other questions."""
    if not path.is_file():
        return None
    rows = [row for _, row in json_lines(path)]
    if not all(isinstance(row, dict) and isinstance(row.get("share"), float) for row in rows):
        return None
    return [row["share"] for row in rows] if [row.get("id") for row in rows] == [each.id for each in train] else None
