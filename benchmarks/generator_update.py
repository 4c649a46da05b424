"""One generator update over the m rollouts of a question: scored then trained, against fused.

    python -m benchmarks.generator_update
    python -m benchmarks.generator_update --device cuda --dtype bfloat16 --model llama-1b

Ways, each adding to the one before:

- `score-then-train`: a pass without gradient gives the likelihoods and so the weights, a second one trains; one padded
  sequence a rollout, all m in one batch, logits over the answer only. What one would write plainly.
- `fused`: one pass gives likelihoods, weights and loss; packed rows, no padding.
- `+ duplicates once`: equal selections are one row.
- `+ prefix tree`: prompts that begin with the same documents share them.

Selections are Plackett-Luce draws of K of N documents. On a fresh policy all m differ; on a sharpened one `--distinct`
do, and their first documents are shared as such a policy shares them (`world.selections_with`, seed 0). Memory is that
of activations, above the model and its gradients.
"""

from __future__ import annotations

from collections import Counter
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

from benchmarks import harness, world
from benchmarks.harness import OUTPUT, DeviceOption, DtypeOption, ModelOption, OutputOption, RepeatsOption, cell, median
from dro_rl.likelihood import row_logps
from dro_rl.likelihood.packing import Row, lay_out
from dro_rl.objective import generator_loss, importance_weights
from dro_rl.prompts import Prompter
from dro_rl.prompts.rows import answer_row

WAYS = ("score-then-train", "fused", "+ duplicates once", "+ prefix tree")


def update(
    way: str, distinct: int, m: int, documents: int, k: int, tokens: int, answer: int, model: str, device: str,
    dtype: str, repeats: int,
) -> dict[str, Any]:  # fmt: skip
    """Measure one way."""
    generator = harness.build_model(model, device, dtype)
    [question] = world.questions(1, documents, tokens, answer)
    prompter = Prompter(world.tokenizer(), "generator")
    drawn = world.selections_with(distinct, documents, k, m)
    once = WAYS.index(way) >= WAYS.index("+ duplicates once")
    counted = list(Counter(drawn).items()) if once else [(numbers, 1) for numbers in drawn]
    rows = [answer_row(prompter, question, numbers, "first") for numbers, _ in counted]
    multiplicity = torch.tensor([float(count) for _, count in counted], device=device)
    tree = way == "+ prefix tree"

    def likelihoods(packed: bool) -> Tensor:
        scored = row_logps(generator, rows, shared_prefix=packed, prefix_tree=tree)
        return torch.stack([logps.sum() for [logps] in scored])

    def weights(logps: Tensor) -> Tensor:
        return importance_weights(logps.detach() + multiplicity.log())

    def score_then_train() -> None:
        with torch.no_grad():
            fixed = weights(likelihoods(packed=False))
        generator_loss(likelihoods(packed=False), fixed).backward()

    def fused() -> None:
        logps = likelihoods(packed=True)
        generator_loss(logps, weights(logps)).backward()

    tokens = _tokens(rows, way)
    if way == WAYS[0]:  # half of them go forward alone, which is a third of a step
        measured = harness.time_update(score_then_train, generator, repeats, device, round(tokens * 2 / 3))
    else:
        measured = harness.time_update(fused, generator, repeats, device, tokens)
    return {**measured, "distinct": distinct, "tokens": tokens}


def _tokens(rows: list[Row], way: str) -> int:
    """That go through the model forward, padding and the scoring pass included."""
    if way == "score-then-train":
        return 2 * len(rows) * max(len(row) for row in rows)
    return len(lay_out(rows, prefix_tree=way == "+ prefix tree").ids)


def main(
    context: typer.Context,
    m: Annotated[int, typer.Option(help="Rollouts of the question.")] = 8,
    distinct: Annotated[int, typer.Option(help="Of them that differ under the sharpened policy.")] = 5,
    documents: Annotated[int, typer.Option(help="Candidates (N).")] = 20,
    k: Annotated[int, typer.Option(help="Documents of a selection (K).")] = 5,
    tokens: Annotated[int, typer.Option(help="Tokens of a document.")] = 140,
    answer: Annotated[int, typer.Option(help="Tokens of the answer.")] = 4,
    model: ModelOption = "512x4",
    device: DeviceOption = "cpu",
    dtype: DtypeOption = "float32",
    repeats: RepeatsOption = 5,
    output: OutputOption = OUTPUT,
) -> None:
    """Time the generator's update on a fresh and on a sharpened policy."""
    harness.check(model, device)
    options: dict[str, Any] = {"m": m, "documents": documents, "k": k, "tokens": tokens, "answer": answer}
    options |= {"model": model, "device": device, "dtype": dtype, "repeats": repeats}
    rows: list[dict[str, Any]] = []
    lines = []
    for policy, number in (("fresh", m), ("sharpened", distinct)):
        plain: dict[str, Any] = {}
        for way in WAYS:
            measured = harness.apart(update, way=way, distinct=number, **options)
            plain = plain or measured
            rows.append({"policy": policy, "way": way, **measured})
            lines.append(
                [
                    f"{policy}, {number} of {m} distinct: {way}",
                    cell(median(measured)),
                    cell(median(plain) / median(measured), 2, "x"),
                    str(measured["tokens"]),
                    cell(measured["mib"], 0),
                    cell(measured["mib"] / plain["mib"], 2),
                ]
            )
    harness.report(
        "generator_update",
        context,
        f"Generator update, m = {m}, {k} documents of {tokens} tokens, {model}, {dtype}",
        ["policy: way", "s", "faster", "tokens forward", "MiB", "memory"],
        lines,
        rows,
        [f"Medians of {repeats}. The last line: {harness.utilisation(rows[-1], device)}."],
    )


if __name__ == "__main__":
    typer.run(main)
