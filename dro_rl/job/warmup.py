"""The paper's initialisation: supervised training of either model before the first iteration, by TRL's SFT trainer.

The prompts are those of sampling and scoring. What a warm-up depends on is hashed, and its result is kept: the next run
with the same hash starts from it.
"""

from __future__ import annotations

import gc
import hashlib
import itertools
import logging
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import pyarrow as pa
import transformers
import trl
from accelerate import PartialState
from accelerate.state import AcceleratorState
from datasets import Dataset
from transformers import AutoConfig
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from trl.trainer import utils

from dro_rl import __version__
from dro_rl.config import DROConfig
from dro_rl.em.memory import GiveBack, give_back
from dro_rl.em.progress import SupervisedProgress
from dro_rl.errors import InputError, Phrase
from dro_rl.files import damage, file_sha256, written_whole
from dro_rl.job.examples import Pair, generator_examples, selector_examples
from dro_rl.job.quotes import quoted_examples
from dro_rl.keys.run import RunConfig
from dro_rl.locks import owned
from dro_rl.models.loading import LoraSettings, add_adapter, load_model
from dro_rl.models.positions import positions_of
from dro_rl.models.saving import export_role
from dro_rl.processes import told_by_main
from dro_rl.prompts import Prompter
from dro_rl.records import Question
from dro_rl.roles import Role

logger = logging.getLogger(__name__)

SECONDS_BETWEEN_TRIES = 2
"""While another run makes the warm-up that this one wants too."""


@dataclass(frozen=True)
class WarmUp:
    """One role's warm-up.

    Args:
        role: which model.
        model: where it starts from: a folder or a hub name.
        model_kwargs: how it is loaded.
        lora: adapters to train in place of all weights.
        prompter: the role's prompts.
        steps: optimizer steps, or -1 for an epoch.
        learning_rate: its own.
        merged: whether adapters are merged at the end; else they are kept alone.
    """

    role: Role
    model: str
    model_kwargs: Mapping[str, Any]
    lora: LoraSettings | None
    prompter: Prompter
    steps: int
    learning_rate: float
    merged: bool = True


def warm_up(job: WarmUp, questions: Sequence[Question], run: RunConfig, training: DROConfig) -> str:
    """Warm one role up, or find it done.

    Returns:
        The folder of the warmed-up model.
    """
    if not questions:
        raise InputError("warmup", Phrase("no examples"), "a warm-up has questions to learn from", "Give it some.")
    name = fingerprint(job, questions, examples_of(job, questions[:CANARIES], run, training), run, training)
    folder = Path(run.warmup_cache_dir).expanduser() / f"{job.role}-{name}"
    with _owned_by_main(folder) as found:
        if found:
            logger.info(f"warm-up of the {job.role}: found in {folder}")
            return str(folder)
        logger.info(f"warm-up of the {job.role}: {len(questions)} questions")
        scratch = Path(training.output_dir or ".") / "warmup" / job.role
        state = PartialState()
        with state.main_process_first():
            if state.is_main_process:
                write_examples(examples_of(job, questions, run, training), scratch / EXAMPLES)
        train_supervised(job, scratch, run, training, folder)
        state.wait_for_everyone()
    return str(folder)


@contextmanager
def _owned_by_main(folder: Path) -> Iterator[bool]:
    """Own a place in the cache, and tell whether a whole model is in it. Runs that share the cache wait for each other.

    Every process enters; the main one owns, and tells the others while it waits, so that no collective call times out.
    """

    def told(found: bool | None) -> bool | None:
        return told_by_main(lambda: found)

    if not PartialState().is_main_process:
        while (found := told(None)) is None:
            time.sleep(SECONDS_BETWEEN_TRIES)
        yield found
        return

    def wait() -> None:
        told(None)
        time.sleep(SECONDS_BETWEEN_TRIES)

    with owned(folder.with_name(f".{folder.name}.lock"), "warmup_cache_dir", wait):
        what = damage(folder)
        if what is not None and folder.exists():
            logger.warning(f"{folder} is damaged ({what}) and is made again")
        told(what is None)
        yield what is None


EXAMPLES = "examples.arrow"
CANARIES = 16
"""Questions whose tokens are hashed too, so that a change of the code that makes prompts is not overlooked."""


def examples_of(
    job: WarmUp, questions: Sequence[Question], run: RunConfig, training: DROConfig
) -> Iterator[Sequence[Pair]]:
    """What the model is to imitate: conversations of one turn, or of several."""
    if job.role == "selector" and run.warmup_selector_order == "quotes":
        named = {key: value for key, value in job.model_kwargs.items() if key in ("revision", "trust_remote_code")}
        positions, _ = positions_of(AutoConfig.from_pretrained(job.model, **named))
        wanted = job.steps * run.warmup_questions * PartialState().num_processes
        if wanted < 0:
            return quoted_examples(questions, job.prompter, training, positions)
        # A conversation takes a while to make: no more of them than the steps take.
        some = Random(training.seed).sample(list(questions), len(questions))
        return itertools.islice(quoted_examples(some, job.prompter, training, positions), wanted)
    examples = selector_examples if job.role == "selector" else generator_examples
    return ((pair,) for pair in examples(questions, job.prompter, run, training))


def fingerprint(
    job: WarmUp, questions: Iterable[Question], canaries: Iterable[Sequence[Pair]], run: RunConfig, training: DROConfig
) -> str:
    """A hash of everything the result depends on: questions, prompts, weights, settings and versions.

    `canaries` are the first examples; the others are not made for the hash, which would take minutes of a large set.
    """
    digest = hashlib.sha256()
    for part in (*canaries, *questions):
        digest.update(repr(part).encode())
    order = run.warmup_selector_order
    if job.role == "selector" and order == "ranking":
        digest.update(Path(str(run.warmup_selector_ranking)).read_bytes())
    folder = Path(job.model)
    if folder.is_dir():
        for path in sorted(path for path in folder.iterdir() if path.is_file()):
            digest.update(f"{path.name}/{file_sha256(path)}".encode())
    settings = (
        job.role,
        "" if folder.is_dir() else job.model,
        sorted(job.model_kwargs.items(), key=str),
        (job.lora, job.merged),
        (job.prompter.source, job.prompter.max_prompt_length, job.prompter.chat_template_kwargs),
        (training.num_selected, training.windows, order if job.role == "selector" else run.warmup_generator_documents),
        (job.steps, job.learning_rate, run.warmup_batch_size, run.warmup_gradient_accumulation_steps),
        (training.weight_decay, training.max_grad_norm),
        (training.seed, training.bf16, training.fp16, PartialState().num_processes),
        (transformers.__version__, trl.__version__, __version__),
    )
    digest.update(repr(settings).encode())
    return digest.hexdigest()[:16]


def train_supervised(job: WarmUp, scratch: Path, run: RunConfig, training: DROConfig, folder: Path) -> None:
    """Train one model on the examples in `scratch`, loss on the completion alone, and export it to `folder`."""
    model = load_model(job.model, **job.model_kwargs)
    if job.lora is not None:
        model = add_adapter(model, job.lora)
    arguments = trl.SFTConfig(
        output_dir=str(scratch),
        per_device_train_batch_size=run.warmup_batch_size,
        gradient_accumulation_steps=run.warmup_gradient_accumulation_steps,
        max_steps=job.steps,
        num_train_epochs=1,
        learning_rate=job.learning_rate,
        weight_decay=training.weight_decay,
        warmup_steps=0.1,
        lr_scheduler_type="linear",
        max_grad_norm=training.max_grad_norm,
        max_length=None,
        bf16=training.bf16,
        fp16=training.fp16,
        use_cpu=training.use_cpu,
        gradient_checkpointing=training.gradient_checkpointing,
        gradient_checkpointing_kwargs={**(training.gradient_checkpointing_kwargs or {})},  # TRL adds to it
        activation_offloading=training.activation_offloading,
        seed=training.seed,
        save_strategy="no",
        report_to="none",
        logging_steps=max(1, job.steps // 10) if job.steps > 0 else 10,
        disable_tqdm=training.disable_tqdm,
        dataset_kwargs={"skip_prepare_dataset": True},
    )
    examples = Dataset.from_file(str(scratch / EXAMPLES))
    trainer = trl.SFTTrainer(
        model=model,
        args=arguments,
        train_dataset=examples,
        processing_class=job.prompter.tokenizer,
        callbacks=[SupervisedProgress(f"warm-up of the {job.role}"), GiveBack()],
    )
    trainer.remove_callback(ProgressCallback)
    trainer.remove_callback(PrinterCallback)
    with _logits_of_what_is_learned():
        trainer.train()
    state = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    if trainer.accelerator.is_main_process:
        trained = trainer.accelerator.unwrap_model(trainer.model)
        export_role(trained, job.prompter.tokenizer, folder, state, merged=job.merged, sealed=True)
        shutil.rmtree(scratch.parent, ignore_errors=True)
    trainer.accelerator.wait_for_everyone()
    trainer.accelerator.free_memory()
    if trainer.is_deepspeed_enabled:
        # accelerate keeps one DeepSpeed set-up a process; the joint training brings its own.
        AcceleratorState._reset_state()
    del trainer, model, examples
    gc.collect()
    give_back()


@contextmanager
def _logits_of_what_is_learned() -> Iterator[None]:
    """Have TRL make no logits of prompts on a CPU either.

    Where Triton is, its head is given the labelled tokens alone; elsewhere all of them, since some devices compile
    anew for each number. A CPU does not, and the head is a large part of a small model.
    """
    given = utils._use_triton
    utils._use_triton = lambda device: device.type == "cpu" or given(device)
    try:
        yield
    finally:
        utils._use_triton = given


def write_examples(conversations: Iterable[Sequence[Pair]], path: Path) -> None:
    """Token ids and labels as an Arrow file, which is then read where it lies: a large set never stands in memory.

    What is learned are the completions of all turns.
    """
    kind = pa.list_(pa.int32())
    schema = pa.schema([("input_ids", kind), ("labels", kind)])
    stream = iter(conversations)
    with written_whole(path) as beside, pa.OSFile(str(beside), "wb") as sink, pa.ipc.new_stream(sink, schema) as writer:
        while chunk := list(itertools.islice(stream, 1000)):
            ids = pa.array([sum((turn[0] + turn[1] for turn in turns), ()) for turns in chunk], kind)
            learned = [sum(((-100,) * len(prompt) + completion for prompt, completion in turns), ()) for turns in chunk]
            writer.write_batch(pa.record_batch([ids, pa.array(learned, kind)], schema=schema))
