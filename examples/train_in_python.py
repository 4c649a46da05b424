"""The trainer without a recipe: your own questions and models, in thirty lines. `python examples/train_in_python.py`.

Three steps on the toy world with the shipped tiny model, on a CPU.
"""

from __future__ import annotations

import sys

from dro_rl import DROConfig, DROTrainer, Prompter, SelectorGenerator, load_model, load_tokenizer
from dro_rl.toy.world import TOY_BASE, make_world

base = str(TOY_BASE)
config = DROConfig(
    output_dir=sys.argv[1] if len(sys.argv) > 1 else "runs/python",
    num_iterations=3,
    questions_per_iteration=4,
    num_generations=4,
    num_selected=3,
    max_prompt_length=256,
    max_completion_length=8,
    max_answer_length=4,
    per_device_train_batch_size=16,
    learning_rate=1e-4,
    gradient_checkpointing=False,
    early_stopping_patience=None,
    report_to="none",
)
trainer = DROTrainer(
    model=SelectorGenerator(selector=load_model(base), generator=load_model(base)),
    args=config,
    train_questions=make_world("train", 64),
    eval_questions=make_world("dev", 16),
    prompters={
        "selector": Prompter(load_tokenizer(base), "toy_selector", config.max_prompt_length),
        "generator": Prompter(load_tokenizer(base), "toy_generator", config.max_prompt_length),
    },
)
trainer.train()
trainer.save_model()
