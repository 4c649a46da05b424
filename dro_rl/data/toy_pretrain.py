"""Pre-trains the toy world's base model: `python -m dro_rl.data.toy_pretrain --output DIR`.

The base learns to *read*: to copy, to look up what stands in its context in both directions, and what a list looks
like. It never sees a question of the toy world, nor a prompt of the selector or the generator, nor which documents
help. The shipped `TOY_BASE` went through stages of this kind, run in parts and not by this one command: another run
gives another base, and may stay long at the first facts. No training run needs this file.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass
from pathlib import Path
from random import Random

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from dro_rl.data.toy import MAX_DOCUMENTS, PEOPLE, PLACES, RELATIONS, TO_PERSON, Fact, draw_fact
from dro_rl.selection import format_selection

SPECIAL = ("<pad>", "<eos>", "<unk>")
# The words of the prompts have embeddings from the start, but no meaning: they never occur in pre-training.
PROMPT_WORDS = ("question", "answer", "select", ":", "?", ">")
NUMBERS = tuple(f"[{n}]" for n in range(1, MAX_DOCUMENTS + 1))
READING_WORDS = ("=", "in", "list")
KINDS = ("object", "number", "object later", "number later", "chain")
LENGTH = {"object": 3, "number": 4, "object later": 4, "number later": 5, "chain": 4}


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
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


@dataclass(frozen=True, slots=True)
class Reading:
    """Texts of one shape: which of their words are to be predicted, and what kind of reading each of them is."""

    texts: list[str]
    answers: list[int]
    kinds: list[str]


def copy_batch(rng: Random, rows: int, length: int) -> Reading:
    """Words without meaning, then the same words again: onwards after `=`, backwards after `in`."""
    texts = []
    for row in range(rows):
        words = rng.sample([*PEOPLE, *PLACES, *RELATIONS, *NUMBERS], length)
        texts.append(" ".join([*words, "=", *words] if row % 2 else [*words, "in", *reversed(words)]))
    # The first word of a copy cannot be known.
    return Reading(texts, list(range(length + 2, 2 * length + 1)), ["copy"] * (length - 1))


def lookup_batch(rng: Random, rows: int, num_facts: int, kinds: list[str], linked: bool) -> Reading:
    """Numbered facts, look-ups in them, drawn with replacement, and a list of some of their numbers.

    The numbers in the list are random: it shows what a list looks like, and has nothing to do with what is looked up.

    Args:
        rng: draws everything.
        rows: how many texts.
        num_facts: facts in each text.
        kinds: of the look-ups, in order: `object` (home_of mira oslo), `number` of a fact (in home_of mira [3]),
            both also with a word in between (`object later`: home_of mira = oslo), and `chain` over two facts
            (home_of friend_of mira oslo).
        linked: some facts share a subject, and some tell of another's object. Otherwise all subjects differ and
            the relation is the same, so that look-ups go by the subject.
    """
    answers, end = [], 4 * num_facts
    for kind in kinds:
        end += LENGTH[kind]
        answers.append(end - 1)
    numbers = rng.randint(2, min(num_facts, 5))
    answers += range(end + 2, end + 2 + 2 * numbers)
    texts = [f"{_lookups(rng, num_facts, kinds, linked)} {_list(rng, numbers, num_facts)}" for _ in range(rows)]
    return Reading(texts, answers, [*kinds, *["list"] * (2 * numbers)])


def _list(rng: Random, numbers: int, num_facts: int) -> str:
    return f"list {numbers} {format_selection(rng.sample(range(1, num_facts + 1), numbers))} <eos>"


def _lookups(rng: Random, num_facts: int, kinds: list[str], linked: bool) -> str:
    people = rng.sample(PEOPLE, len(PEOPLE))
    chains: list[tuple[Fact, Fact]] = []
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
            shape = "chain" if not chains else rng.choice(("chain", "twins", "single", "single"))
        subject = people.pop()
        taken.add(subject)
        if shape == "chain" and left > 1:
            first = tell(subject, TO_PERSON)
            if first.object in people:
                people.remove(first.object)
            taken.add(first.object)
            chains.append((first, tell(first.object, relations)))
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
        asked, later = f"{fact.relation} {fact.subject}", " =" if kind.endswith("later") else ""
        if kind.startswith("object"):
            parts.append(f"{asked}{later} {fact.object}")
        elif kind.startswith("number"):
            parts.append(f"in {asked}{later} [{n + 1}]")
        else:
            first, second = rng.choice(chains)
            parts.append(f"{second.relation} {first.relation} {first.subject} {second.object}")
    return " ".join(parts)


LOOKUPS = ("object", "number", "object later", "number later")
WEIGHTS = {"object": 1, "number": 2, "object later": 1, "number later": 2, "chain": 2}


@dataclass(frozen=True, slots=True)
class Stage:
    """What is read: so many words to copy, or look-ups of these kinds among so many facts."""

    size: int
    kinds: tuple[str, ...] = ("copy",)
    linked: bool = False
    learning_rate: float = 2e-3

    def batch(self, rng: Random, rows: int) -> Reading:
        if self.kinds == ("copy",):
            return copy_batch(rng, rows, self.size)
        kinds = [*self.kinds, *rng.choices(self.kinds, weights=[WEIGHTS[kind] for kind in self.kinds], k=8)]
        rng.shuffle(kinds)
        return lookup_batch(rng, rows, self.size, kinds, self.linked)


STAGES = (
    *(Stage(length) for length in (8, 12, 16, 20, 24, 28)),
    Stage(4, LOOKUPS, learning_rate=1e-3),
    *(Stage(num_facts, LOOKUPS) for num_facts in (6, 8, 10)),
    Stage(10, (*LOOKUPS, "chain"), linked=True),
)
"""The next one begins when nine answers in ten are right."""


def pretrain(
    seed: int = 0, rows: int = 64, layers: int = 3, finish: int = 200, minutes: float = 15.0
) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """Train by curriculum: to copy, then to look up among few facts, then among ten that are linked.

    From ten facts at once, or without having learnt to copy, such a model stays at chance for as long as one cares
    to wait. After the last stage is mastered come `finish` steps in which the learning rate falls to zero.
    """
    torch.manual_seed(seed)
    rng = Random(f"toy-pretrain/{seed}")
    tokenizer = build_tokenizer()
    model = build_model(tokenizer, layers=layers)
    print(f"{sum(p.numel() for p in model.parameters()):,} weights")
    start, step, finishing = time.monotonic(), 0, 0
    stage, entered = 0, 0
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.01, betas=(0.9, 0.98))
    right: dict[str, float] = {"copy": 0.0}
    while time.monotonic() - start < 60 * minutes and not (finishing and step - finishing >= finish):
        if stage < len(STAGES) - 1 and min(right.values()) > 0.9:
            stage += 1
            right = dict.fromkeys(STAGES[stage].kinds, 0.0)
            if STAGES[stage].learning_rate != STAGES[stage - 1].learning_rate:
                # Moments of another kind of text mislead: begin anew.
                optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.01, betas=(0.9, 0.98))
                entered = step
        elif not finishing and stage == len(STAGES) - 1 and min(right.values()) > 0.75:
            finishing = step
        step += 1
        rate = min(1.0, (step - entered) / 50) * (1 - (step - finishing) / (finish + 1) if finishing else 1.0)
        for group in optimizer.param_groups:
            group["lr"] = STAGES[stage].learning_rate * rate
        batch = STAGES[stage].batch(rng, rows)
        loss, hits = reading_loss(model, tokenizer, batch)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        for kind in set(batch.kinds) - {"list"}:
            share = [hit for hit, of in zip(hits, batch.kinds, strict=True) if of == kind]
            right[kind] = 0.8 * right[kind] + 0.2 * sum(share) / len(share)
        if step % 50 == 0:
            accuracy = ", ".join(f"{kind} {value:.2f}" for kind, value in sorted(right.items()))
            print(f"step {step}, {time.monotonic() - start:.0f} s, stage {stage}: {accuracy}", flush=True)
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
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--minutes", type=float, default=15.0, help="stop after so long, wherever it stands")
    arguments = parser.parse_args()
    model, tokenizer = pretrain(seed=arguments.seed, layers=arguments.layers, minutes=arguments.minutes)
    model.save_pretrained(arguments.output)
    tokenizer.save_pretrained(arguments.output)


if __name__ == "__main__":
    main()
