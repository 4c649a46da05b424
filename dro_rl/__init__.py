"""Direct retrieval-augmented optimization: a selector and a generator trained together.

The public names, each imported from its room when it is first asked for: `import dro_rl` itself needs no torch.
"""

from __future__ import annotations

import importlib
import logging
import os
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dro_rl.config import DROConfig as DROConfig
    from dro_rl.data import load_questions as load_questions
    from dro_rl.errors import InputError as InputError
    from dro_rl.evaluation import exact_match as exact_match
    from dro_rl.evaluation import f1 as f1
    from dro_rl.evaluation import recall_at_k as recall_at_k
    from dro_rl.likelihood import completion_logps as completion_logps
    from dro_rl.models.loading import load_model as load_model
    from dro_rl.models.loading import load_tokenizer as load_tokenizer
    from dro_rl.models.module import SelectorGenerator as SelectorGenerator
    from dro_rl.objective import effective_sample_size as effective_sample_size
    from dro_rl.objective import evidence_bound as evidence_bound
    from dro_rl.objective import generator_loss as generator_loss
    from dro_rl.objective import importance_weights as importance_weights
    from dro_rl.objective import selector_loss as selector_loss
    from dro_rl.pipeline import Answer as Answer
    from dro_rl.pipeline import RAGPipeline as RAGPipeline
    from dro_rl.prompts import Prompter as Prompter
    from dro_rl.recipe import load_recipe as load_recipe
    from dro_rl.records import Document as Document
    from dro_rl.records import Question as Question
    from dro_rl.records import Rollout as Rollout
    from dro_rl.records import Selection as Selection
    from dro_rl.records import read_questions as read_questions
    from dro_rl.records import write_questions as write_questions
    from dro_rl.selection import format_selection as format_selection
    from dro_rl.selection import parse_selection as parse_selection
    from dro_rl.trainer import DROTrainer as DROTrainer

__version__ = "0.1.0"

_ROOMS = {
    "config": ("DROConfig",),
    "data": ("load_questions",),
    "errors": ("InputError",),
    "evaluation": ("exact_match", "f1", "recall_at_k"),
    "likelihood": ("completion_logps",),
    "models.loading": ("load_model", "load_tokenizer"),
    "models.module": ("SelectorGenerator",),
    "objective": (
        "effective_sample_size", "evidence_bound", "generator_loss", "importance_weights", "selector_loss",
    ),
    "pipeline": ("Answer", "RAGPipeline"),
    "prompts": ("Prompter",),
    "recipe": ("load_recipe",),
    "records": ("Document", "Question", "Rollout", "Selection", "read_questions", "write_questions"),
    "selection": ("format_selection", "parse_selection"),
    "trainer": ("DROTrainer",),
}  # fmt: skip
_ROOM_OF = {name: room for room, names in _ROOMS.items() for name in names}

__all__ = ["__version__", *_ROOM_OF]

SILENT = {
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "DO_NOT_TRACK": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "WANDB_ERROR_REPORTING": "false",
    "GRADIO_ANALYTICS_ENABLED": "False",
}
"""The libraries underneath report usage unless told not to. What is set already stays as it is set."""

for _name, _value in SILENT.items():
    os.environ.setdefault(_name, _value)
if os.environ["HF_HUB_DISABLE_TELEMETRY"] == "1" and "huggingface_hub.constants" in sys.modules:
    # The hub client reads the switch once, when it is imported, and may have been before us.
    sys.modules["huggingface_hub.constants"].HF_HUB_DISABLE_TELEMETRY = True  # type: ignore[attr-defined]
# Where bitsandbytes is installed, whatever imports it is told on a CPU of a kernel to fetch, which nothing here needs.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)


def __getattr__(name: str) -> Any:
    if name not in _ROOM_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_ROOM_OF[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
