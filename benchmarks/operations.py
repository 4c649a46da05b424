"""How many operations a step of the method cannot avoid, counted from its tokens.

Sequences that begin alike need their common beginning once: the count is over the tree of all beginnings, so the m
selections of a prompt and generator prompts with the same first documents are counted as sharing can have them at best.
A token costs 2 operations a weight of the layers' matrices and 4 · width a layer for each token it attends to; a token
that predicts costs 2 · width · vocabulary more. Norms, the optimizer and sampling are left out.
"""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.harness import ModelSize


def forward(sequences: Sequence[tuple[int, ...]], predicting: int, size: ModelSize) -> float:
    """Of one forward pass over some sequences, `predicting` of whose tokens go through the head."""
    tokens = pairs = shared = 0
    previous: tuple[int, ...] = ()
    for sequence in sorted(set(sequences)):
        # Sorted, the beginning that is known already is the one in common with the sequence before.
        shared = next(
            (i for i, (one, other) in enumerate(zip(previous, sequence, strict=False)) if one != other),
            min(len(previous), len(sequence)),
        )
        tokens += len(sequence) - shared
        pairs += _causal_pairs(len(sequence)) - _causal_pairs(shared)
        previous = sequence
    layers = 2 * size.layer_parameters * tokens + 4 * size.width * pairs
    return float(size.layers * layers + 2 * size.width * size.vocabulary * predicting)


def step(
    selector_prompt: tuple[int, ...],
    selections: Sequence[tuple[int, ...]],
    generator_prompts: Sequence[tuple[int, ...]],
    answer: tuple[int, ...],
    size: ModelSize,
) -> float:
    """Of one question in one step: rollouts, then forward and backward (twice the forward) of both models.

    The rollouts read the prompt once and each of their tokens; the selector's update the prompt and each distinct
    selection; the generator's each distinct prompt and the answer after it.
    """
    predicting = sum(map(len, selections))
    drawn = [
        tuple(-1 - i * size.vocabulary - token for token in each) for i, each in enumerate(selections)
    ]  # no two alike
    rollouts = forward([selector_prompt + each for each in drawn], predicting, size)
    distinct = set(selections)
    selector = forward([selector_prompt + each for each in distinct], sum(map(len, distinct)), size)
    prompts = set(generator_prompts)
    generator = forward([prompt + answer for prompt in prompts], len(prompts) * len(answer), size)
    return rollouts + 3 * (selector + generator)


def _causal_pairs(length: int) -> int:
    return length * (length + 1) // 2
