"""A whole optimisation step: `DROTrainer` against what one can write today on TRL.

    python -m benchmarks.trl_step
    python -m benchmarks.trl_step --device cuda --dtype bfloat16 --model llama-1b --questions 4 --checkpointing

The baseline is TRL's `GRPOTrainer` for the selector, with a reward function that scores the generator: w = softmax over
the group of log p(answer | question, selected documents). After each of its optimizer steps the generator takes one of
its own on −Σ w log p(answer), in a plain loop, for `SFTTrainer` knows no weights. With `scale_rewards="none"` and
`loss_type="dr_grpo"` the selector's gradient is in proportion to Σ (w − 1/m) ∇ log p(z), which is ours with
`selector_baseline: mean`. So both sides compute the same step.

The same on both sides: random Llamas, prompts, m, K, sampling at temperature 1, optimizer, precision, gradient
checkpointing, one question's rollouts in a micro-batch, and rollouts by transformers (no vLLM). The baseline's
settings: `num_iterations=1` and generation aligned with the optimizer steps (no second pass for old log-probabilities),
`beta=0` (no reference model), its own fused head, no logging of completions; the generator's logits over the answer
only. `--trl-batch 1` gives the baseline one rollout a micro-batch: its least memory. Ours: the defaults, without the
comparison with the plain path on the first step (`verify_fast_path`).

The selector's policy is written into it (`world.write_policy`), so that rollouts are selections from the first step
on: fresh (uniform), and sharpened to about five distinct selections of eight. The learning rate is so small that it
stays as it is.

On a CPU TRL's fused head makes the logits of the prompt too. `--trl-head completions`, the default, has it skip them as
it does on a GPU, which is faster than what TRL does here; `--trl-head as-is` leaves it alone. Generation is `generate`;
`--continuous-batching` is TRL's other engine without vLLM, on a CPU several times slower.

Time is from the end of one step to the end of the next. Memory is above what both models take: gradients, optimizer
state, activations, caches.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from itertools import product
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import torch
import typer
from datasets import Dataset
from torch import Tensor
from transformers import LlamaForCausalLM, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from benchmarks import harness, world
from benchmarks.harness import OUTPUT, DeviceOption, DtypeOption, ModelOption, OutputOption, cell, median
from benchmarks.steps import LEARNING_RATE, Setting, StepTimer, distinct, dro_step
from dro_rl.prompts import Prompter
from dro_rl.records import Question
from dro_rl.selection import parse_selection

FRESH, SHARPENED = 0.0, 1.85
HEADS = ["completions"]


class GeneratorSide(TrainerCallback):
    """The generator's part of the baseline: the reward function, and a weighted SFT step after each of the selector's.

    Args:
        generator: trains.
        questions: by the dataset's `index` column.
        setting: as on the other side.
        batch: rollouts that go through the generator at once.
    """

    def __init__(
        self, generator: LlamaForCausalLM, questions: Sequence[Question], setting: Setting, batch: int
    ) -> None:
        self.generator, self.questions, self.setting, self.batch = generator, questions, setting, batch
        self.prompter = Prompter(world.tokenizer(), "generator")
        self.optimizer = torch.optim.AdamW(generator.parameters(), lr=LEARNING_RATE, weight_decay=0.01, fused=True)
        self.selections: list[list[tuple[int, list[int]]]] = []
        if setting.checkpointing:
            generator.gradient_checkpointing_enable({"use_reentrant": False})

    def reward(self, completions: list[str], index: list[int], **columns: Any) -> list[float | None]:
        """Importance weights of the rollouts, which GRPO centres."""
        documents, k = self.setting.documents, self.setting.k
        selections = [parse_selection(text, documents, k).numbers for text in completions]
        self.selections.append([(i, list(numbers)) for i, numbers in zip(index, selections, strict=True)])
        self.rollouts = [
            (self.prompter.generator_prompt(question, numbers).ids, self.prompter.completion(question.answers[0]))
            for question, numbers in zip((self.questions[i] for i in index), selections, strict=True)
        ]
        with torch.no_grad():
            logps = torch.cat([self._answer_logps(start) for start in range(0, len(self.rollouts), self.batch)])
        self.weights = logps.view(-1, self.setting.m).softmax(dim=-1).flatten()
        return self.weights.tolist()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        for start in range(0, len(self.rollouts), self.batch):
            loss = -(self.weights[start : start + self.batch] * self._answer_logps(start)).sum()
            (loss / self.setting.questions).backward()
        torch.nn.utils.clip_grad_norm_(self.generator.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def _answer_logps(self, start: int) -> Tensor:
        """log p(answer) of a batch of rollouts, padded on the left; logits over the answers only."""
        batch = self.rollouts[start : start + self.batch]
        width, keep = max(len(p) + len(a) for p, a in batch), max(len(a) for _, a in batch)
        ids = torch.tensor([[0] * (width - len(p) - len(a)) + [*p, *a] for p, a in batch])
        mask = torch.tensor([[0] * (width - len(p) - len(a)) + [1] * (len(p) + len(a)) for p, a in batch])
        answer = torch.tensor([[0] * (keep - len(a)) + [1] * len(a) for _, a in batch])
        device = self.generator.device
        with torch.autocast(device.type, torch.bfloat16, enabled=self.setting.dtype == "bfloat16"):
            logits = self.generator(
                input_ids=ids.to(device), attention_mask=mask.to(device), logits_to_keep=keep + 1, use_cache=False
            ).logits
        logps = logits[:, :-1].float().log_softmax(dim=-1).gather(-1, ids[:, -keep:, None].to(device)).squeeze(-1)
        return (logps * answer.to(device)).sum(dim=-1)


def trl_step(setting: Setting, batch: int, head: str, continuous: bool, folder: str) -> dict[str, Any]:
    """Measure steps of the baseline.

    Returns:
        what `steps.dro_step` does, with the phases `rollout` (generation), `reward` and `generator_step`.
    """
    import trl.trainer.utils
    from trl import GRPOConfig, GRPOTrainer

    if head == "completions":
        trl.trainer.utils._use_triton = lambda device: True  # read there only to choose which tokens the head is given
    torch.manual_seed(0)
    selector, generator = setting.models()
    questions = setting.train_questions()
    prompter = Prompter(world.tokenizer(), "selector")
    timer = StepTimer(setting.device)
    side = GeneratorSide(generator, questions, setting, batch)
    seconds: dict[str, list[float]] = {"rollout": [], "reward": [], "generator_step": []}
    engine = "generate_batch" if continuous else "generate"
    setattr(selector, engine, _timed(getattr(selector, engine), seconds["rollout"], setting.device))
    side.reward = _timed(side.reward, seconds["reward"], setting.device)  # type: ignore[method-assign]
    side.on_step_end = _timed(side.on_step_end, seconds["generator_step"], setting.device)  # type: ignore[method-assign]

    def generator_reward(**columns: Any) -> list[float | None]:
        return side.reward(**columns)

    config = GRPOConfig(
        **setting.common(folder),
        max_steps=setting.steps + 1,
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=setting.questions * setting.m // batch,
        num_iterations=1,
        temperature=1.0,
        top_p=1.0,
        top_k=0,
        loss_type="dr_grpo",
        scale_rewards="none",
        use_transformers_continuous_batching=continuous,
        max_grad_norm=1.0,
        save_strategy="no",
    )
    trainer = GRPOTrainer(
        model=selector,
        reward_funcs=generator_reward,
        args=config,
        train_dataset=Dataset.from_list(
            [{"prompt": _prompt(prompter, question, setting.k), "index": i} for i, question in enumerate(questions)]
        ),
        processing_class=prompter.tokenizer,
        callbacks=[side, timer],
    )
    trainer.train()
    phases = {name: list(each[1:]) for name, each in seconds.items()}
    return {**timer.measured(), "phases": phases, "selections": side.selections[1:]}


def _prompt(prompter: Prompter, question: Question, k: int) -> str:
    """The selector's prompt as text: every word of it is a token, so tokens and text say the same."""
    return str(prompter.tokenizer.decode(list(prompter.selector_prompt(question, k).ids)))


def _timed(function: Callable[..., Any], seconds: list[float], device: str) -> Callable[..., Any]:
    """The function, noting how long each call took."""

    def timed(*args: Any, **kwargs: Any) -> Any:
        harness.synchronize(device)
        started = time.perf_counter()
        result = function(*args, **kwargs)
        harness.synchronize(device)
        seconds.append(time.perf_counter() - started)
        return result

    return timed


def ours(setting: Setting) -> dict[str, Any]:
    """`dro_step` in a folder that goes away."""
    with TemporaryDirectory() as folder:
        return dro_step(setting, folder)


def baseline(setting: Setting, batch: int, head: str, continuous: bool) -> dict[str, Any]:
    """`trl_step` in a folder that goes away."""
    with TemporaryDirectory() as folder:
        return trl_step(setting, batch, head, continuous, folder)


def main(
    context: typer.Context,
    questions: Annotated[int, typer.Option(help="Of a step.")] = 1,
    m: Annotated[int, typer.Option(help="Rollouts of a question.")] = 8,
    documents: Annotated[int, typer.Option(help="Candidates (N).")] = 20,
    k: Annotated[int, typer.Option(help="Documents of a selection (K).")] = 5,
    tokens: Annotated[int, typer.Option(help="Tokens of a document.")] = 140,
    trl_batch: Annotated[
        list[int] | None, typer.Option(help="Rollouts in a micro-batch of the baseline; m unless told.")
    ] = None,
    trl_head: Annotated[
        list[str], typer.Option(help="Logits its head makes: completions, as on a GPU, or as-is.")
    ] = HEADS,
    continuous_batching: Annotated[
        bool, typer.Option(help="Of the baseline's rollouts, in place of generate.")
    ] = False,
    checkpointing: Annotated[bool, typer.Option(help="Gradient checkpointing, on both sides.")] = False,
    prefix_tree: Annotated[bool, typer.Option(help="Generator prompts share first documents (ours).")] = True,
    steps: Annotated[int, typer.Option(help="Steps timed, after one that is not.")] = 5,
    model: ModelOption = "256x4",
    device: DeviceOption = "cpu",
    dtype: DtypeOption = "float32",
    output: OutputOption = OUTPUT,
) -> None:
    """Time a whole step on both sides, on a fresh and on a sharpened policy."""
    harness.check(model, device)
    if unknown := set(trl_head) - {"completions", "as-is"}:
        raise typer.BadParameter(f"--trl-head {min(unknown)}: this is completions or as-is")
    if odd := [batch for batch in trl_batch or [] if batch < 1 or questions * m % batch]:
        raise typer.BadParameter(f"--trl-batch {odd[0]}: this divides the step's {questions * m} rollouts")
    rows: list[dict[str, Any]] = []
    lines = []
    for policy, sharpness in (("fresh", FRESH), ("sharpened", SHARPENED)):
        setting = Setting(
            model=model,
            questions=questions,
            m=m,
            documents=documents,
            k=k,
            tokens=tokens,
            sharpness=sharpness,
            checkpointing=checkpointing,
            steps=steps,
            device=device,
            dtype=dtype,
            trainer={"prefix_tree": prefix_tree},
        )
        own = harness.apart(ours, setting=setting)
        measured = [("dro_rl", own)]
        for batch, head in product(trl_batch or [m], trl_head):
            told = f"TRL, batch {batch}" + (", head as is" if head == "as-is" else "")
            options = {"setting": setting, "batch": batch, "head": head, "continuous": continuous_batching}
            measured.append((told, harness.apart(baseline, **options)))
        for name, each in measured:
            rows.append({"policy": policy, "side": name, **each})
            lines.append(
                [
                    f"{policy}: {name}",
                    cell(median(each)),
                    cell(median(each) / median(own), 1, "x"),
                    cell(median(each["phases"], "rollout")),
                    cell(median(each) - median(each["phases"], "rollout")),
                    cell(distinct(each["selections"]), 1),
                    cell(each["mib"], 0),
                    cell(own["mib"] / each["mib"], 2),
                ]
            )
    harness.report(
        "trl_step",
        context,
        f"A whole step, {questions} questions, m = {m}, {documents} documents of {tokens} tokens, K = {k}, "
        f"both models {model}, {dtype}",
        ["policy: side", "s a step", "over ours", "rollouts s", "rest s", f"distinct of {m}", "MiB", "ours over it"],
        lines,
        rows,
        [
            f"Medians of {steps} steps. Rollouts by transformers on both sides; TRL: num_iterations=1, beta=0, "
            "scale_rewards=none, loss_type=dr_grpo, its fused head"
            + (" on the completions only, as on a GPU." if device == "cpu" and trl_head == ["completions"] else "."),
        ],
    )


if __name__ == "__main__":
    typer.run(main)
