"""A made-up world for benchmarks: questions of given sizes, a tokenizer, and selectors whose policy is known.

Random weights never write a selection, and a trained selector would tie a benchmark to a checkpoint. So `write_policy`
sets the embeddings and the head of a random Llama: it then writes K document numbers in about 30 tokens, as sharply as
asked for, while every layer still computes what it would in a trained model of its size.
"""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from benchmarks.harness import VOCABULARY
from dro_rl.records import Document, Question

MOST_DOCUMENTS = 64
TOKENS_PER_NUMBER = 6
"""What a document number takes in a selection: five of them are 30 tokens, as with an ordinary tokenizer."""

SPECIAL = ("<pad>", "</s>", "<unk>")
_FIRST_NUMBER = len(SPECIAL)
_FIRST_WORD = _FIRST_NUMBER + MOST_DOCUMENTS * TOKENS_PER_NUMBER


def tokenizer() -> PreTrainedTokenizerFast:
    """One token a word. `[n]` is followed in the vocabulary by its tail in a selection."""
    numbers = [
        f"[{n}]" if part == 0 else f"{n}.{part}"
        for n in range(1, MOST_DOCUMENTS + 1)
        for part in range(TOKENS_PER_NUMBER)
    ]
    words = [*SPECIAL, *numbers]
    words += [f"w{i}" for i in range(VOCABULARY - len(words))]
    model = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    model.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=model, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")


def questions(count: int, documents: int, tokens: int, answer: int = 4, seed: int = 0) -> list[Question]:
    """Questions over `documents` documents of `tokens` random words each, with an answer of `answer` words."""
    random = Random(seed)

    def words(number: int) -> str:
        return " ".join(f"w{random.randrange(VOCABULARY - _FIRST_WORD)}" for _ in range(number))

    return [
        Question(
            id=f"q{i}",
            question=words(12),
            answers=(words(answer),),
            documents=tuple(Document(f"q{i}-d{n}", words(2), words(tokens)) for n in range(documents)),
            supporting=(f"q{i}-d0",),
        )
        for i in range(count)
    ]


# A policy drawn directly


def plackett_luce(
    documents: int, k: int, m: int, sharpness: float, random: np.random.Generator
) -> list[tuple[int, ...]]:
    """m selections of k documents: at each place a document is drawn in proportion to exp(score) among those left.

    Scores are standard normal times `sharpness`; 0 draws uniformly.
    """
    scores = sharpness * random.standard_normal(documents)
    noisy = scores + random.gumbel(size=(m, documents))
    return [tuple(int(n) + 1 for n in row[:k]) for row in np.argsort(-noisy, axis=1)]


def selections_with(distinct: int, documents: int, k: int, m: int, seed: int = 0) -> list[tuple[int, ...]]:
    """m Plackett-Luce selections of which exactly `distinct` differ: the first such draw from `seed` on.

    The sharpness rises by a quarter every hundred draws, from 0, so that it is about what gives this many.
    """
    random = np.random.default_rng(seed)
    for attempt in range(10_000):
        drawn = plackett_luce(documents, k, m, sharpness=attempt // 100 / 4, random=random)
        if len(set(drawn)) == distinct:
            return drawn
    raise ValueError(f"{distinct} distinct of {m} selections of {k} of {documents} documents were not found")


# A policy written into a Llama


def write_policy(model: LlamaForCausalLM, documents: int, k: int, sharpness: float, seed: int = 0) -> None:
    """Make the model's samples selections of `k` of `documents` documents.

    The first number is any, and each further one lies up to (documents - 1) // (k - 1) places further on in a fixed
    random cycle: so no number is drawn twice, and selections share their first documents as a trained policy's do. A
    choice is exp(sharpness) times as likely as the next best; 0 draws uniformly. A number is followed by its tail.
    Nothing depends on the prompt, whose last token must be an ordinary word.

    The embedding of a token is ten times as long as the layers' additions to it, so that the last hidden state is the
    token's own direction, and the head is the least-squares solution that turns it into the wanted logits.
    """
    config = model.config
    if documents > min(MOST_DOCUMENTS, (config.hidden_size - 1) // TOKENS_PER_NUMBER):
        raise ValueError(
            f"{documents} documents: there are at most {MOST_DOCUMENTS}, "
            f"and they take a width of {documents * TOKENS_PER_NUMBER + 1} or more"
        )
    generator = torch.Generator().manual_seed(seed)
    draw = np.random.default_rng(seed)
    chain = range(_FIRST_NUMBER, _FIRST_NUMBER + documents * TOKENS_PER_NUMBER)
    size, weight = config.vocab_size, model.model.embed_tokens.weight
    scale = 10.0 * config.num_hidden_layers**0.5
    directions = torch.randn(1 + len(chain), config.hidden_size, generator=generator)
    directions = scale * directions / directions.pow(2).mean(dim=-1, keepdim=True).sqrt()
    embeddings = directions[0] + 0.1 * scale * torch.randn(size, config.hidden_size, generator=generator)
    embeddings[list(chain)] = directions[1:]

    wanted = torch.full((len(directions), size), -100.0)
    cycle = draw.permutation(documents).tolist()
    wanted[0, [_number(n) for n in cycle]] = -sharpness * torch.arange(float(documents))
    reach = max(1, (documents - 1) // max(1, k - 1))
    for place, n in enumerate(cycle):
        for part in range(TOKENS_PER_NUMBER - 1):
            wanted[1 + _number(n) + part - _FIRST_NUMBER, _number(n) + part + 1] = 0.0
        following = [_number(cycle[(place + step) % documents]) for step in range(1, reach + 1)]
        wanted[1 + _number(n) + TOKENS_PER_NUMBER - 1 - _FIRST_NUMBER, following] = -sharpness * torch.arange(
            float(reach)
        )
    head = torch.linalg.lstsq(directions / scale, wanted).solution.T
    with torch.no_grad():
        weight.copy_(embeddings.to(weight))
        model.lm_head.weight.copy_(head.to(weight))


def selection_tokens(numbers: Sequence[int]) -> tuple[int, ...]:
    """What such a model writes for 1-based document numbers."""
    return tuple(_number(n - 1) + part for n in numbers for part in range(TOKENS_PER_NUMBER))


def _number(n: int) -> int:
    """The token of the 0-based document number n."""
    return _FIRST_NUMBER + n * TOKENS_PER_NUMBER
