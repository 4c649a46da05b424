"""A small untrained model with a tokenizer of its own, to run the job on real questions without any download.

    python -m dro_rl.toy.tiny_model --questions train.jsonl.gz --output runs/tiny

It knows no language: it shows that everything runs, how fast, and in how much memory; never how well.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import torch
import typer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from dro_rl.records import Question, read_questions

SPECIAL = ("<pad>", "<s>", "</s>")


def build(
    questions: Sequence[Question],
    output: str | Path,
    *,
    vocab_size: int = 4096,
    hidden_size: int = 64,
    layers: int = 2,
    heads: int = 2,
    seed: int = 0,
) -> None:
    """Train a byte-level BPE tokenizer on the questions' text, and save it with a randomly initialised Llama."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    texts = (text for q in questions for text in (q.question, *q.answers, *(d.text for d in q.documents)))
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>")
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(fast),
        hidden_size=hidden_size,
        intermediate_size=4 * hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
        pad_token_id=fast.pad_token_id,
        bos_token_id=fast.bos_token_id,
        eos_token_id=fast.eos_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(output)
    fast.save_pretrained(output)


def main(
    questions: Annotated[Path, typer.Option(help="A question file, whose text the tokenizer learns from.")],
    output: Annotated[Path, typer.Option(help="Folder to write the model and the tokenizer to.")],
    hidden_size: Annotated[int, typer.Option(help="Width.")] = 64,
    layers: Annotated[int, typer.Option(help="Depth.")] = 2,
    heads: Annotated[int, typer.Option(help="Attention heads; head size is width over heads.")] = 2,
    vocab_size: Annotated[int, typer.Option(help="Tokens.")] = 4096,
    seed: Annotated[int, typer.Option(help="Of the weights.")] = 0,
) -> None:
    """Build a small untrained model for smoke runs on real questions."""
    build(
        read_questions(questions),
        output,
        hidden_size=hidden_size,
        layers=layers,
        heads=heads,
        vocab_size=vocab_size,
        seed=seed,
    )


if __name__ == "__main__":
    typer.run(main)
