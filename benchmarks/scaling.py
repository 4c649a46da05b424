"""What a step of `DROTrainer` costs against N, m, K, the model's width and the questions of a step, and why.

    python -m benchmarks.scaling

One setting changes at a time. Each point is a run of the trainer, online: every step has an E-step of its own. Beside
the seconds stands the count of operations that the method cannot avoid, with P the tokens of the selector's prompt and
R those of a selection:

    rollouts     forward               P + m R tokens
    selector     forward and backward  P + m' R tokens, m' of the m selections being distinct
    generator    forward and backward  the tokens of the distinct prompts, equal beginnings once, and their answers

    forward(T tokens) = layers · (2 · weights of a layer · T + 4 · width · pairs of tokens that attend)
                        + 2 · width · vocabulary · tokens predicted
    backward          = 2 · forward

counted from the tokens of the rollouts that were drawn (`operations.step`). Where seconds follow the count, nothing is
done twice and nothing else weighs. The plot is `scaling.png`: seconds, and the seconds that the operations would take
at the rate of the base point. Selectors' policies are fresh (`world.write_policy`, uniform).

The share "own" is the step's time outside the phases in which models, engines and the optimizer run. The last line is
the base point with a model of next to no size (128x1): all that stays is overhead, the framework's included.
"""

from __future__ import annotations

import statistics
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import typer

from benchmarks import harness, operations, world
from benchmarks.harness import OUTPUT, DeviceOption, DtypeOption, OutputOption, cell, median, model_size
from benchmarks.steps import Setting, dro_step
from dro_rl.prompts import Prompter

SWEEPS = {"documents": "documents N", "m": "rollouts m", "k": "selected K", "width": "width", "questions": "questions"}
DOCUMENTS, ROLLOUTS, SELECTED, WIDTHS, QUESTIONS = (
    [20, 5, 10, 40],
    [8, 1, 2, 4, 16],
    [5, 1, 3, 10],
    [256, 128, 512],
    [1, 2, 4],
)
NEXT_TO_NOTHING = "128x1"
OWN = ("inputs", "other")
"""Phases in which no model, engine or optimizer runs."""


def step(setting: Setting) -> dict[str, Any]:
    """Measure one point, with the operations of each of its steps."""
    with TemporaryDirectory() as folder:
        measured = dro_step(setting, folder)
    questions = setting.train_questions()
    tokenizer, size = world.tokenizer(), model_size(setting.model)
    selector, generator = Prompter(tokenizer, "selector"), Prompter(tokenizer, "generator")
    counts = []
    for drawn in measured.pop("selections"):
        total = 0.0
        for index in {index for index, _ in drawn}:
            numbers = [tuple(each) for i, each in drawn if i == index]
            question = questions[index]
            total += operations.step(
                selector.selector_prompt(question, setting.k).ids,
                [world.selection_tokens(each) for each in numbers],
                [generator.generator_prompt(question, each).ids for each in numbers],
                generator.completion(question.answers[0]),
                size,
            )
        counts.append(total)
    elapsed = sum(measured["seconds"])
    own = sum(sum(measured["phases"].get(name, [])) for name in OWN)
    return {**measured, "operations": counts, "own_share": own / elapsed}


def main(
    context: typer.Context,
    documents: Annotated[list[int], typer.Option(help="Candidates (N); the first is the base.")] = DOCUMENTS,
    m: Annotated[list[int], typer.Option(help="Rollouts of a question; the first is the base.")] = ROLLOUTS,
    k: Annotated[list[int], typer.Option(help="Documents of a selection; the first is the base.")] = SELECTED,
    width: Annotated[list[int], typer.Option(help="Of both models; the first is the base.")] = WIDTHS,
    questions: Annotated[list[int], typer.Option(help="Of a step; the first is the base.")] = QUESTIONS,
    layers: Annotated[int, typer.Option(help="Of both models.")] = 4,
    tokens: Annotated[int, typer.Option(help="Tokens of a document.")] = 140,
    checkpointing: Annotated[bool, typer.Option(help="Gradient checkpointing.")] = False,
    steps: Annotated[int, typer.Option(help="Steps timed, after one that is not.")] = 5,
    device: DeviceOption = "cpu",
    dtype: DtypeOption = "float32",
    output: OutputOption = OUTPUT,
) -> None:
    """Time a step at each point, with the operations it needs."""
    values = {"documents": documents, "m": m, "k": k, "width": width, "questions": questions}
    base = Setting(
        model=f"{width[0]}x{layers}",
        questions=questions[0],
        m=m[0],
        documents=documents[0],
        k=k[0],
        tokens=tokens,
        sharpness=0.0,
        checkpointing=checkpointing,
        steps=steps,
        device=device,
        dtype=dtype,
        trainer={},
    )
    harness.check(base.model, device)
    at_base = harness.apart(step, setting=base)
    rate = median(at_base, "operations") / median(at_base)
    rows: list[dict[str, Any]] = []
    for name, sizes in values.items():
        for value in sorted(sizes):
            change = {"model": f"{value}x{layers}"} if name == "width" else {name: value}
            point = replace(base, **change)
            if point.k > point.documents:
                continue
            measured = at_base if point == base else harness.apart(step, setting=point)
            rows.append({"varied": name, "value": value, **measured})
    nothing = harness.apart(step, setting=replace(base, model=NEXT_TO_NOTHING))
    lines = [_line(f"{SWEEPS[row['varied']]} = {row['value']}", row, rate) for row in rows]
    lines.append(_line(f"the base with a {NEXT_TO_NOTHING} model", nothing, rate))
    harness.report(
        "scaling",
        context,
        f"A step against its sizes; base: N = {base.documents}, m = {base.m}, K = {base.k}, both models {base.model}, "
        f"{base.questions} questions, {tokens} tokens a document, {dtype}",
        ["point", "s", "GFLOP", "GFLOP/s", "s by the count", "own share", "MiB"],
        lines,
        [*rows, {"varied": "model", "value": NEXT_TO_NOTHING, **nothing}],
        [
            f"Medians of {steps} steps. With a {NEXT_TO_NOTHING} model a step takes "
            f"{100 * median(nothing) / median(at_base):.1f} % of the base's time."
        ],
    )
    plot(rows, rate, output / "scaling.png")


def _line(point: str, row: dict[str, Any], rate: float) -> list[str]:
    count = median(row, "operations")
    return [
        point,
        cell(median(row)),
        cell(count / 1e9, 0),
        cell(count / median(row) / 1e9, 1),
        cell(count / rate),
        cell(100 * row["own_share"], 1, " %"),
        cell(row["mib"], 0),
    ]


def plot(rows: list[dict[str, Any]], rate: float, path: Path) -> None:
    """A panel for each setting that was varied: seconds, least to most, and what the operations would take."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import NullLocator, ScalarFormatter

    figure, panels = pyplot.subplots(1, len(SWEEPS), figsize=(3 * len(SWEEPS), 3), sharey=True, layout="constrained")
    for panel, (name, label) in zip(panels, SWEEPS.items(), strict=True):
        points = [row for row in rows if row["varied"] == name]
        at = [row["value"] for row in points]
        seconds = [median(row) for row in points]
        spread = [
            [middle - min(row["seconds"]) for middle, row in zip(seconds, points, strict=True)],
            [max(row["seconds"]) - middle for middle, row in zip(seconds, points, strict=True)],
        ]
        panel.errorbar(at, seconds, spread, fmt="o", capsize=3, label="measured")
        panel.plot(at, [statistics.median(row["operations"]) / rate for row in points], "--", label="operations needed")
        panel.set(xscale="log", yscale="log", xlabel=label)
        panel.set_xticks(at, [str(value) for value in at])
        panel.xaxis.set_minor_locator(NullLocator())
        panel.yaxis.set_major_formatter(ScalarFormatter())
        panel.yaxis.set_minor_formatter(ScalarFormatter())
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("seconds a step")
    panels[0].legend(frameon=False)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


if __name__ == "__main__":
    typer.run(main)
