"""Pre-trains the tiny base model of the toy world: `python -m dro_rl.data.toy_pretrain --output DIR`, a few minutes.

The base learns to *read*: to look up what stands in its context, in both directions. It never sees a question of the
toy world, a prompt of the selector or the generator, or a list of documents. Its result is shipped as `TOY_BASE`, so
no run needs this file.
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

from dro_rl.data.toy import MAX_DOCUMENTS, PEOPLE, PLACES, RELATIONS, TO_PERSON, TO_PLACE, Fact, draw_fact

SPECIAL = ("<pad>", "<eos>", "<unk>")
# The words of the prompts have embeddings from the start, but no meaning: they never occur in pre-training.
PROMPT_WORDS = ("question", "answer", "select", ":", "?", ">")
READING_WORDS = ("=", "in")
KINDS = ("object", "number", "content", "chain")


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token a word, `[3]` included, so that decoding a selection gives exactly `[3] > [1] > [2]`."""
    numbers = [str(n) for n in range(1, MAX_DOCUMENTS + 1)]
    words = [*SPECIAL, *PROMPT_WORDS, *READING_WORDS, *numbers, *(f"[{n}]" for n in numbers)]
    words += [*RELATIONS, *PEOPLE, *PLACES]
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
    """Facts and look-ups among them: text, and which of its words are the answers of which kind."""

    texts: list[str]
    answers: list[int]
    kinds: list[str]


def reading_batch(rng: Random, rows: int, num_facts: int, lookups: list[str]) -> Reading:
    """Numbered facts, then look-ups in them, drawn with replacement; all rows have the same shape.

    Kinds of look-up: `object` (mira lives_in = oslo), `number` of a fact (mira lives_in in [3]), `content` of a
    number ([3] = oslo), and `chain` over two facts (mira knows lives_in = oslo).
    """
    answers = []
    position = 4 * num_facts
    for kind in lookups:
        position += {"object": 4, "number": 4, "content": 3, "chain": 5}[kind]
        answers.append(position - 1)
    return Reading([_reading(rng, num_facts, lookups) for _ in range(rows)], answers, lookups)


def _reading(rng: Random, num_facts: int, lookups: list[str]) -> str:
    people = rng.sample(PEOPLE, len(PEOPLE))
    chains: list[tuple[Fact, Fact]] = []
    facts: list[Fact] = []
    taken: set[str] = set()

    def tell(subject: str, relations: tuple[str, ...]) -> Fact:
        told = {fact.relation for fact in facts if fact.subject == subject}
        relation = rng.choice([relation for relation in relations if relation not in told])
        facts.append(draw_fact(rng, "train", subject, relation, taken))
        return facts[-1]

    while len(facts) < num_facts:
        left = num_facts - len(facts)
        shape = "chain" if not chains else rng.choice(("chain", "twins", "single", "single"))
        subject = people.pop()
        taken.add(subject)
        if shape == "chain" and left > 1:
            first = tell(subject, TO_PERSON)
            if first.object in people:
                people.remove(first.object)
            taken.add(first.object)
            chains.append((first, tell(first.object, RELATIONS)))
        elif shape == "twins" and left > 1:
            tell(subject, RELATIONS)
            tell(subject, RELATIONS)
        else:
            tell(subject, RELATIONS)
    rng.shuffle(facts)
    parts = [f"[{n}] {fact.text}" for n, fact in enumerate(facts, start=1)]
    for kind in lookups:
        n = rng.randrange(num_facts)
        fact = facts[n]
        if kind == "object":
            parts.append(f"{fact.subject} {fact.relation} = {fact.object}")
        elif kind == "number":
            parts.append(f"{fact.subject} {fact.relation} in [{n + 1}]")
        elif kind == "content":
            parts.append(f"[{n + 1}] = {fact.object}")
        else:
            first, second = rng.choice(chains)
            parts.append(f"{first.subject} {first.relation} {second.relation} = {second.object}")
    return " ".join(parts)


def pretrain(
    seed: int = 0,
    steps: int = 3000,
    rows: int = 96,
    learning_rate: float = 1e-3,
    max_facts: int = 10,
    layers: int = 3,
    minutes: float = 15.0,
) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """Train by curriculum: two facts at first, two more whenever nine look-ups in ten are right.

    From ten facts at once, or with one look-up a text, such a model stays at chance for as long as one cares to wait.
    """
    torch.manual_seed(seed)
    rng = Random(f"toy-pretrain/{seed}")
    tokenizer = build_tokenizer()
    model = build_model(tokenizer, layers=layers)
    print(f"{sum(p.numel() for p in model.parameters()):,} weights")
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.01)
    num_facts, right = 2, dict.fromkeys(KINDS, 0.0)
    start = time.monotonic()
    done_at = 0
    for step in range(1, steps + 1):
        decay = 1.0 if not done_at else max(0.05, 1 - (step - done_at) / 300)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * min(1.0, step / 100) * decay
        lookups = [*KINDS, *rng.choices(KINDS, weights=(2, 2, 1, 2), k=8)]
        rng.shuffle(lookups)
        batch = reading_batch(rng, rows, num_facts, lookups)
        loss, hits = reading_loss(model, tokenizer, batch)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        for kind in KINDS:
            share = sum(h for h, k in zip(hits, lookups, strict=True) if k == kind) / lookups.count(kind)
            right[kind] = 0.8 * right[kind] + 0.2 * share
        if step % 25 == 0:
            accuracy = " ".join(f"{kind} {value:.2f}" for kind, value in right.items())
            seconds = time.monotonic() - start
            print(f"step {step} {seconds:.0f}s {num_facts} facts loss {loss.item():.3f} {accuracy}", flush=True)
        if min(right.values()) > 0.9 and num_facts < max_facts:
            num_facts += 2
            right = dict.fromkeys(KINDS, 0.0)
        elif not done_at and num_facts == max_facts and min(right.values()) > 0.97:
            done_at = step
        if (done_at and step - done_at >= 300) or time.monotonic() - start > 60 * minutes:
            break
    return model, tokenizer


def reading_loss(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, batch: Reading
) -> tuple[torch.Tensor, list[float]]:
    """Cross-entropy of the answers (their words alone), and for each look-up of the batch the share answered right."""
    ids = tokenizer(batch.texts, return_tensors="pt", add_special_tokens=False)["input_ids"]
    places = torch.tensor(batch.answers)
    hidden = model.model(input_ids=ids).last_hidden_state[:, places - 1]
    logits = model.lm_head(hidden).float()
    targets = ids[:, places]
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
    return loss, (logits.argmax(-1) == targets).float().mean(0).tolist()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True, help="folder to write the model and tokenizer to")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--minutes", type=float, default=15.0, help="stop after this long, wherever it stands")
    arguments = parser.parse_args()
    model, tokenizer = pretrain(seed=arguments.seed, layers=arguments.layers, minutes=arguments.minutes)
    model.save_pretrained(arguments.output)
    tokenizer.save_pretrained(arguments.output)


if __name__ == "__main__":
    main()
