"""Pre-trains the toy world's base model: `python -m dro_rl.toy.pretrain --output DIR`.

The base learns to *read*: to copy, then to answer from a page of documents and to name those that bear on a question,
in the words of the toy prompts, over one relation or two. Where sources contradict each other, what any of them says is
right, all alike: the base ends torn between them, and nothing here knows which of them tell the truth. No training run
needs this file.

The shipped `TOY_BASE` went through these stages while they were being found: in parts, about 4,700 steps, with twice as
many names until it could read twelve documents. This command gives another of its kind; it has not been run from end to
end since the last stages were changed, and a seed may come to rest in one of them.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from random import Random

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from dro_rl.toy.world import (
    CLAIMS,
    FIRST_CLAIMS,
    NUMBERED,
    PEOPLE,
    PLACES,
    RELATIONS,
    SOURCES,
    TO_PERSON,
    TO_PLACE,
    Claim,
    draw_claims,
)

SPECIAL = ("<pad>", "<eos>", "<unk>")
PROMPT_WORDS = ("answer", "select", "in", "?", "=", ":", ">")
NUMBERS = tuple(f"[{n}]" for n in range(1, NUMBERED + 1))
COPIED = (*chain.from_iterable(zip(PEOPLE, PLACES, strict=True)), *RELATIONS, *SOURCES, *NUMBERS)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token a word, `[3]` included, so that decoding a selection gives exactly `[3] > [1] > [2]`."""
    counts = [str(n) for n in range(1, NUMBERED + 1)]
    words = [*SPECIAL, *PROMPT_WORDS, *counts, *NUMBERS, *SOURCES, *RELATIONS, *PEOPLE, *PLACES]
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        padding_side="left",
        model_max_length=512,
    )


def build_model(tokenizer: PreTrainedTokenizerFast, layers: int = 4, width: int = 128) -> LlamaForCausalLM:
    """A tiny Llama with random weights. Heads are 32 wide: vLLM refuses 16 on CPU."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=width // 32,
        num_key_value_heads=width // 32,
        max_position_embeddings=512,
        initializer_range=0.06,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        # Words must not drown in what the layers add to them: with the usual 0.02 the first steps are lost.
        model.model.embed_tokens.weight.mul_(0.1 / config.initializer_range)
    return model


class Text:
    """Words, of which some are to be predicted: at each such place all the words that are right there, and a kind."""

    def __init__(self, words: Sequence[str] = ()) -> None:
        self.words = list(words)
        self.right: list[tuple[int, Sequence[str], str]] = []

    def ask(self, word: str, right: Sequence[str], kind: str) -> None:
        """Go on with `word`, to be predicted as one of `right`."""
        self.right.append((len(self.words), right, kind))
        self.words.append(word)


def copy_text(rng: Random, length: int, words: Sequence[str], backwards: bool, span: int = 5, spans: int = 4) -> Text:
    """Words without meaning, then spans of them from anywhere: onwards after `=`, backwards after `in`."""
    drawn = rng.sample(words, length)
    text = Text(drawn)
    for _ in range(spans):
        begin = rng.randint(0, length - span)
        copied = drawn[begin : begin + span]
        first, *rest = reversed(copied) if backwards else copied
        text.words += ["in" if backwards else "=", first]  # the first word of a span cannot be known
        for word in rest:
            text.ask(word, [word], "copy")
    return text


def page(rng: Random, size: int, claims: int, chains: bool, twins: float = 0.3) -> list[Claim]:
    """So many documents, drawn as questions would need them, of one or two relations.

    Args:
        rng: draws everything.
        size: how many documents.
        claims: the most sources that speak of one relation of somebody.
        chains: whether some tell of those whom others name.
        twins: chance that another relation of the same person is told too, again and again.
    """
    told: list[Claim] = []

    def tell(subject: str, relation: str, count: int) -> list[Claim]:
        if any(claim.fact[:2] == (relation, subject) for claim in told):
            return []
        sources = rng.sample(SOURCES, min(count, size - len(told)))
        new = draw_claims(rng, "train", subject, relation, sources, ())
        told.extend(new)
        return new

    while len(told) < size:
        subject = rng.choice(PEOPLE)
        if chains and rng.random() < 0.7:
            second = rng.choice(TO_PLACE)
            for claim in tell(subject, rng.choice(TO_PERSON), rng.randint(1, min(claims, FIRST_CLAIMS))):
                tell(claim.fact.object, second, 1)
        else:
            tell(subject, rng.choice(RELATIONS), rng.randint(1, claims))
        while rng.random() < twins:
            tell(subject, rng.choice(RELATIONS), rng.randint(1, claims))
    rng.shuffle(told)
    return told


@dataclass(frozen=True, slots=True)
class Shown:
    """A page, and what it says."""

    claims: Sequence[Claim]

    def of(self, subject: str, relation: str, source: str | None = None) -> list[int]:
        """Places of the documents that speak of a relation of `subject`, of one source if wanted."""
        return [
            n
            for n, claim in enumerate(self.claims)
            if (claim.fact.subject, claim.fact.relation) == (subject, relation) and source in (None, claim.source)
        ]

    def object(self, place: int) -> str:
        return self.claims[place].fact.object

    def chains(self, subject: str, first: str, second: str) -> dict[int, list[int]]:
        """Of each document that opens a way over two relations, those that end it."""
        ways = {n: self.of(self.object(n), second) for n in self.of(subject, first)}
        return {n: ends for n, ends in ways.items() if ends}


def reading_text(rng: Random, claims: Sequence[Claim], asked: int, kinds: Sequence[str], shown: int | None) -> Text:
    """A page, numbered, and questions about it with their answers or selections.

    Args:
        rng: draws everything.
        claims: the page.
        asked: how many questions.
        kinds: which ones: `answer`, `select`, of one `source`, over a `chain`.
        shown: how many of the documents, if not all: what the generator reads.
    """
    whole = Shown(claims)
    openings = [
        (claim.fact.subject, claim.fact.relation, second)
        for claim in claims
        for second in TO_PLACE
        if whole.of(claim.fact.object, second)
    ]
    if shown is not None:
        keep = _kept(rng, whole, openings if "answer chain" in kinds else [], shown)
        whole = Shown([claims[n] for n in keep])
    text = Text()
    for n, claim in enumerate(whole.claims, start=1):
        text.words += [f"[{n}]", claim.source, *claim.fact]
    for _ in range(asked):
        kind = rng.choice(kinds)
        if kind.endswith("chain"):
            ways = [(opening, found) for opening in openings if (found := whole.chains(*opening))]
            if not ways:
                kind = kind.replace(" chain", "")
            else:
                (subject, first, second), found = rng.choice(ways)
                _chain(rng, text, whole, kind, f"{second} {first} {subject} ?".split(), found)
                continue
        claim = rng.choice(whole.claims)
        source = claim.source if kind.endswith("source") else None
        places = whole.of(claim.fact.subject, claim.fact.relation, source)
        words = [*([source] if source else []), claim.fact.relation, claim.fact.subject, "?"]
        if kind.startswith("answer"):
            _answer(rng, text, words, [whole.object(n) for n in places], kind)
        elif kind == "number":
            text.words += ["in", *words[:-1]]
            text.ask(f"[{rng.choice(places) + 1}]", [f"[{n + 1}]" for n in places], kind)
        else:
            _select(rng, text, words, [places] * min(len(places), 3), kind)
    return text


def _kept(rng: Random, whole: Shown, openings: Sequence[tuple[str, str, str]], shown: int) -> list[int]:
    """Which documents the generator reads: often a whole way over two relations, and anything beside it."""
    keep: list[int] = []
    if openings and rng.random() < 0.7:
        first, ends = rng.choice(list(whole.chains(*rng.choice(openings)).items()))
        keep = [first, rng.choice(ends)][:shown]
    rest = [n for n in range(len(whole.claims)) if n not in keep]
    near = [n for n in rest if keep and whole.claims[n].fact.relation in {whole.claims[m].fact.relation for m in keep}]
    others = near if len(near) >= shown and rng.random() < 0.5 else rest
    keep += rng.sample(others, shown - len(keep))
    rng.shuffle(keep)
    return keep


def _chain(rng: Random, text: Text, whole: Shown, kind: str, words: Sequence[str], found: dict[int, list[int]]) -> None:
    if kind.startswith("answer"):
        text.words += ["answer", *words, "="]
        first = rng.choice(list(found))
        text.ask(whole.object(first), [whole.object(n) for n in found], kind)
        text.ask(whole.object(rng.choice(found[first])), [whole.object(n) for n in found[first]], kind)
        text.ask("<eos>", ["<eos>"], "form")
        return
    ends = list(dict.fromkeys(chain.from_iterable(found.values())))
    _select(rng, text, words, [list(found), ends, ends][: rng.choice((2, 3))], kind)


def _answer(rng: Random, text: Text, words: Sequence[str], objects: Sequence[str], kind: str) -> None:
    text.words += ["answer", *words, "="]
    text.ask(rng.choice(objects), objects, kind)
    text.ask("<eos>", ["<eos>"], "form")


def _select(rng: Random, text: Text, words: Sequence[str], steps: Sequence[Sequence[int]], kind: str) -> None:
    """Numbers of documents: at each step any of those given that is not yet named."""
    text.words += ["select", str(len(steps)), "in", *words, ":"]
    named: list[int] = []
    for step, places in enumerate(steps):
        left = [n for n in places if n not in named]
        if not left:
            break
        if step:
            text.ask(">", [">"], "form")
        chosen = rng.choice(left)
        text.ask(f"[{chosen + 1}]", [f"[{n + 1}]" for n in left], kind)
        named.append(chosen)
    else:
        text.ask("<eos>", ["<eos>"], "form")


READ = ("answer", "select")
OF_SOURCE = (*READ, "answer source", "select source")
KINDS = (*OF_SOURCE, "answer chain", "select chain")
LAST = (*KINDS, "select source", "select chain")
"""What was learned least is read more often."""


@dataclass(frozen=True, slots=True)
class Stage:
    """What is read: spans copied from `size` words, or pages of `size` documents."""

    size: int
    kinds: tuple[str, ...] = ("copy",)
    words: int = len(COPIED)
    claims: int = 1
    twins: float = 0.3
    asked: int = 8
    fresh: bool = False
    mastered: float = 0.9
    most: int = 1000
    must: bool = True
    roles: bool = False

    def batch(self, rng: Random, rows: int, step: int) -> list[Text]:
        if self.kinds == ("copy",):
            return [copy_text(rng, self.size, COPIED[: self.words], row % 2 == 1) for row in range(rows)]
        chains = "select chain" in self.kinds
        kinds, asked, shown = list(self.kinds), self.asked, None
        if self.roles:  # as in training: the selector reads the whole page, the generator three documents of it
            reads = step % 3 == 0
            kinds = [kind for kind in kinds if kind.startswith("answer") == reads]
            asked, shown = (4, 3) if reads else (6, None)
        pages = [page(rng, self.size, self.claims, chains, self.twins) for _ in range(rows)]
        return [reading_text(rng, claims, asked, kinds, shown) for claims in pages]


STAGES = (
    Stage(8, words=12, fresh=True),
    *(Stage(8, words=words) for words in (24, 60)),
    *(Stage(length, mastered=0.85) for length in (8, 16, 28)),
    *(Stage(size, ("answer",), asked=12, fresh=size == 2) for size in (2, 4)),
    *(Stage(size, (*READ, "number"), asked=12, fresh=size == 2) for size in (2, 4, 7, 12)),
    Stage(4, READ, claims=2, fresh=True),
    Stage(8, READ, claims=3, mastered=0.85),
    Stage(12, READ, claims=CLAIMS, roles=True, most=300, must=False),
    Stage(12, KINDS, claims=CLAIMS, roles=True, mastered=1.0, most=300, must=False),
    Stage(12, LAST, claims=CLAIMS, roles=True, mastered=1.0, most=500, must=False),
)
"""The next one begins when a share `mastered` of every kind is right, and with an optimizer of its own if `fresh`. In
the last one the learning rate falls to zero."""


def pretrain(seed: int = 0) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """Train by curriculum: to copy, then to read a page of few documents, then of twelve that contradict and chain.

    What makes it quick is copying from few words at first, and spans that begin anywhere: a whole copy can be had
    by counting back, without looking at the words. From all the words, or from facts, at once, such a model stays at
    chance for as long as one cares to wait.

    Raises:
        RuntimeError: a stage was not mastered in the steps it has.
    """
    torch.manual_seed(seed)
    rng = Random(f"toy-pretrain/{seed}")
    tokenizer = build_tokenizer()
    model = build_model(tokenizer)
    print(f"{sum(p.numel() for p in model.parameters()):,} weights")
    start, step = time.monotonic(), 0
    for number, stage in enumerate(STAGES):
        last = number == len(STAGES) - 1
        if stage.fresh:
            # Moments of another kind of text mislead: begin anew.
            optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.01, betas=(0.9, 0.98))
            entered = step
        right = dict.fromkeys(stage.kinds, 0.0)
        for taken in range(1, stage.most + 1):
            step += 1
            rate = min(1.0, (step - entered) / 50) * (1 - (taken - 1) / stage.most if last else 1.0)
            for group in optimizer.param_groups:
                group["lr"] = (3e-3 if stage.kinds == ("copy",) else 2e-3) * rate
            loss, hits = reading_loss(model, tokenizer, stage.batch(rng, 32 if stage.kinds == ("copy",) else 16, step))
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            for kind, share in hits.items():
                if kind in right:
                    right[kind] = 0.8 * right[kind] + 0.2 * share
            mastered = min(right.values()) > stage.mastered
            if step % 50 == 0 or mastered or taken == stage.most:
                accuracy = ", ".join(f"{kind} {value:.2f}" for kind, value in right.items())
                print(f"stage {number}, step {step}, {time.monotonic() - start:.0f} s: {accuracy}", flush=True)
            if mastered:
                break
        else:
            if stage.must:
                raise RuntimeError(f"stage {number} was not mastered in {stage.most} steps: try another seed")
    return model, tokenizer


def reading_loss(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, texts: Sequence[Text]
) -> tuple[torch.Tensor, dict[str, float]]:
    """Cross-entropy to the right words, all alike, where several are; and of each kind the share predicted rightly."""
    vocabulary = tokenizer.get_vocab()
    longest = max(len(text.words) for text in texts)
    rows = [[*text.words, *["<pad>"] * (longest - len(text.words))] for text in texts]
    ids = torch.tensor([[vocabulary[word] for word in row] for row in rows])
    places = [(row, place, right, kind) for row, text in enumerate(texts) for place, right, kind in text.right]
    goal = torch.zeros(len(places), len(vocabulary))
    for n, (_, _, right, _) in enumerate(places):
        goal[n, [vocabulary[word] for word in right]] = 1
    hidden = model.model(input_ids=ids).last_hidden_state
    before = hidden[[row for row, *_ in places], [place - 1 for _, place, *_ in places]]
    logits = model.lm_head(before).float()
    goal_share = goal / goal.sum(-1, keepdim=True)
    loss = torch.nn.functional.cross_entropy(logits, goal_share)
    hit = goal.gather(1, logits.argmax(-1, keepdim=True)).squeeze(1)
    hits: dict[str, float] = {}
    for kind in {kind for *_, kind in places}:
        of_kind = torch.tensor([known == kind for *_, known in places])
        hits[kind] = hit[of_kind].mean().item()
    return loss, hits


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True, help="folder for the model and tokenizer")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    model, tokenizer = pretrain(seed=arguments.seed)
    model.save_pretrained(arguments.output)
    tokenizer.save_pretrained(arguments.output)


if __name__ == "__main__":
    main()
