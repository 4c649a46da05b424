"""Pre-trains the toy world's base model: `python -m dro_rl.toy.pretrain --output DIR`.

The base learns to *read*: to copy (stages 0-5), to look up an object by its subject (6, 7), and the number of a fact
too (8-11), among ten facts at the last; then among ten that are linked, over two facts as well (12), with any word
before the mark of a question (13), and what a list looks like, its numbers random (14). It never sees a question of
the toy world, nor a prompt of the selector or the generator, nor which documents help. The shipped `TOY_BASE` is what
this command gave with the default seed: 2,114 steps, five and a half minutes in one thread of a two-core virtual
machine that did the same with another seed beside it, which read nearly as well. Another machine's arithmetic gives
other weights. No training run needs this file.
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

from dro_rl.selection import format_selection
from dro_rl.toy.world import MAX_DOCUMENTS, PEOPLE, PLACES, RELATIONS, TO_PERSON, Fact, draw_fact

SPECIAL = ("<pad>", "<eos>", "<unk>")
# The words of the prompts have embeddings from the start, but no meaning: they never occur in pre-training.
PROMPT_WORDS = ("question", "answer", "select", "?")
NUMBERS = tuple(f"[{n}]" for n in range(1, MAX_DOCUMENTS + 1))
READING_WORDS = ("=", "in", ":", "list", ">")
COPIED = (*chain.from_iterable(zip(PEOPLE, PLACES, strict=True)), *RELATIONS, *NUMBERS)
LOOKUPS = ("object", "object later", "number", "number later")
KINDS = (*LOOKUPS, "chain", "chain later")
WEIGHTS = {"object": 1, "object later": 1, "number": 5, "number later": 3, "chain": 3, "chain later": 3}
LENGTH = {"object": 3, "number": 4, "object later": 4, "number later": 5, "chain": 4, "chain later": 5}
# One of them stands between a look-up and its mark, so that what is read does not hang on the place of the mark.
FILLERS = (*NUMBERS, *RELATIONS, *PEOPLE, *PLACES)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token a word, `[3]` included, so that decoding a selection gives exactly `[3] > [1] > [2]`."""
    counts = [str(n) for n in range(1, MAX_DOCUMENTS + 1)]
    words = [*SPECIAL, *PROMPT_WORDS, *READING_WORDS, *counts, *NUMBERS, *RELATIONS, *PEOPLE, *PLACES]
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


def build_model(tokenizer: PreTrainedTokenizerFast, layers: int = 3, width: int = 128) -> LlamaForCausalLM:
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


@dataclass(frozen=True, slots=True)
class Reading:
    """Texts of one shape: which of their words are to be predicted, and what kind of reading each of them is."""

    texts: list[str]
    answers: list[int]
    kinds: list[str]


def copy_batch(rng: Random, rows: int, length: int, words: Sequence[str], span: int = 5, spans: int = 4) -> Reading:
    """Words without meaning, then spans of them from anywhere: onwards after `=`, backwards after `in`."""
    texts = []
    for row in range(rows):
        text = rng.sample(words, length)
        parts = [*text]
        for _ in range(spans):
            begin = rng.randint(0, length - span)
            copied = text[begin : begin + span]
            parts += ["in", *reversed(copied)] if row % 2 else ["=", *copied]
        texts.append(" ".join(parts))
    # The first word of a span cannot be known.
    answers = [length + n * (span + 1) + place for n in range(spans) for place in range(2, span + 1)]
    return Reading(texts, answers, ["copy"] * len(answers))


def lookup_batch(
    rng: Random, rows: int, num_facts: int, kinds: list[str], linked: bool, fillers: bool, lists: bool
) -> Reading:
    """Numbered facts, look-ups in them, drawn with replacement, and if wanted a list of some of their numbers.

    The numbers in the list are random: it shows what a list looks like, and has nothing to do with what is looked up.

    Args:
        rng: draws everything.
        rows: how many texts.
        num_facts: facts in each text.
        kinds: of the look-ups, in order: `object` (home_of mira oslo), `number` of a fact (in home_of mira [3]),
            and `chain` over two facts (home_of friend_of mira oslo); `later`, a mark stands before the answer, and
            with fillers any word before the mark (home_of mira paris = oslo, in home_of mira paris : [3]).
        linked: some facts share a subject, and some tell of another's object. Otherwise all subjects differ and
            the relation is the same, so that look-ups go by the subject.
        fillers: any word stands before the mark of a `later` look-up, else nothing.
        lists: a list stands at the end.
    """
    answers, end = [], 4 * num_facts
    for kind in kinds:
        end += LENGTH[kind] + (fillers and kind.endswith("later"))
        answers.append(end - 1)
    if not lists:
        return Reading([_lookups(rng, num_facts, kinds, linked, fillers) for _ in range(rows)], answers, kinds)
    numbers = rng.randint(2, min(num_facts, 5))
    answers += range(end + 2, end + 2 + 2 * numbers)
    lookups = [_lookups(rng, num_facts, kinds, linked, fillers) for _ in range(rows)]
    texts = [f"{text} {_list(rng, numbers, num_facts)}" for text in lookups]
    return Reading(texts, answers, [*kinds, *["list"] * (2 * numbers)])


def _list(rng: Random, numbers: int, num_facts: int) -> str:
    return f"list {numbers} {format_selection(rng.sample(range(1, num_facts + 1), numbers))} <eos>"


def _lookups(rng: Random, num_facts: int, kinds: list[str], linked: bool, fillers: bool) -> str:
    people = rng.sample(PEOPLE, len(PEOPLE))
    pairs: list[tuple[Fact, Fact]] = []
    facts: list[Fact] = []
    taken: set[str] = set()
    relations = RELATIONS if linked else (rng.choice(RELATIONS),)

    def tell(subject: str, among: tuple[str, ...]) -> Fact:
        told = {fact.relation for fact in facts if fact.subject == subject}
        relation = rng.choice([relation for relation in among if relation not in told])
        facts.append(draw_fact(rng, "train", subject, relation, taken))
        return facts[-1]

    while len(facts) < num_facts:
        left = num_facts - len(facts)
        shape = "single"
        if linked:
            shape = "chain" if not pairs else rng.choice(("chain", "twins", "single", "single"))
        subject = people.pop()
        taken.add(subject)
        if shape == "chain" and left > 1:
            first = tell(subject, TO_PERSON)
            if first.object in people:
                people.remove(first.object)
            taken.add(first.object)
            pairs.append((first, tell(first.object, relations)))
        elif shape == "twins" and left > 1:
            tell(subject, relations)
            tell(subject, relations)
        else:
            tell(subject, relations)
    rng.shuffle(facts)
    parts = [f"[{n}] {fact.text}" for n, fact in enumerate(facts, start=1)]
    for kind in kinds:
        n = rng.randrange(num_facts)
        fact = facts[n]
        asked, later = f"{fact.relation} {fact.subject}", kind.endswith("later")
        before = f" {rng.choice(FILLERS)}" if fillers and later else ""
        if kind.startswith("object"):
            parts.append(f"{asked}{f'{before} =' if later else ''} {fact.object}")
        elif kind.startswith("number"):
            parts.append(f"in {asked}{f'{before} :' if later else ''} [{n + 1}]")
        else:
            first, second = rng.choice(pairs)
            asked = f"{second.relation} {first.relation} {first.subject}"
            parts.append(f"{asked}{f'{before} =' if later else ''} {second.object}")
    return " ".join(parts)


@dataclass(frozen=True, slots=True)
class Stage:
    """What is read: spans copied from `size` words, or look-ups of these kinds among `size` facts."""

    size: int
    kinds: tuple[str, ...] = ("copy",)
    words: int = len(COPIED)
    linked: bool = False
    fillers: bool = False
    lists: bool = False
    fresh: bool = False
    mastered: float = 0.9
    most: int = 1000
    must: bool = True

    def batch(self, rng: Random, rows: int) -> Reading:
        if self.kinds == ("copy",):
            return copy_batch(rng, rows, self.size, COPIED[: self.words])
        weights = [WEIGHTS[kind] for kind in self.kinds]
        kinds = [*self.kinds, *rng.choices(self.kinds, weights=weights, k=13 - len(self.kinds))]
        rng.shuffle(kinds)
        return lookup_batch(rng, rows, self.size, kinds, self.linked, self.fillers, self.lists)


STAGES = (
    Stage(8, words=12, fresh=True),
    *(Stage(8, words=words) for words in (24, 60)),
    *(Stage(length) for length in (8, 16, 28)),
    Stage(2, LOOKUPS[:2], fresh=True),
    Stage(4, LOOKUPS[:2]),
    Stage(2, LOOKUPS, fresh=True),
    *(Stage(num_facts, LOOKUPS) for num_facts in (4, 7, 10)),
    Stage(10, KINDS, linked=True, mastered=0.6),
    Stage(10, KINDS, linked=True, fillers=True, mastered=0.8, most=400, must=False),
    Stage(10, KINDS, linked=True, fillers=True, lists=True, mastered=1.0, most=200, must=False),
)
"""The next one begins when a share `mastered` of every kind is right, and with an optimizer of its own if `fresh`. In
the last one the learning rate falls to zero."""


def pretrain(seed: int = 0, rows: int = 32) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """Train by curriculum: to copy, then to look up among few facts, then among ten that are linked.

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
            batch = stage.batch(rng, rows)
            loss, hits = reading_loss(model, tokenizer, batch)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            for kind in stage.kinds:
                share = [hit for hit, of in zip(hits, batch.kinds, strict=True) if of == kind]
                right[kind] = 0.8 * right[kind] + 0.2 * sum(share) / len(share)
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
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, batch: Reading
) -> tuple[torch.Tensor, list[float]]:
    """Cross-entropy of the words to be predicted, and for each of them the share of texts with it right."""
    ids: torch.Tensor = tokenizer(batch.texts, return_tensors="pt", add_special_tokens=False)["input_ids"]
    places = torch.tensor(batch.answers)
    hidden = model.model(input_ids=ids).last_hidden_state[:, places - 1]
    logits = model.lm_head(hidden).float()
    targets = ids[:, places]
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
    return loss, (logits.argmax(-1) == targets).float().mean(0).tolist()


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
