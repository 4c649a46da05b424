"""Every key of a recipe, as the command line lists them and as docs/keys.md does."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping
from typing import Any

import yaml

from dro_rl.keys import Key, keys_of
from dro_rl.keys.inherited import REFUSED, WITHOUT_EFFECT
from dro_rl.keys.run import RunConfig
from dro_rl.keys.training import TrainingKeys

RUN_KEYS, TRAINING_KEYS = keys_of(RunConfig), keys_of(TrainingKeys)
KEYS: Mapping[str, Key] = {**RUN_KEYS, **TRAINING_KEYS}
"""Every key of a recipe, by name."""


def keys_page() -> str:
    """The reference page: every key with what it may be, and every key of transformers and TRL that is none."""
    lines = [
        "# Recipe keys",
        "",
        "Made by `dro-rl recipe keys --markdown`; rules and defaults stand in `dro_rl/keys/`. A recipe is flat YAML",
        "of these keys, and the command line goes over it (`--key value`). A resumed run may change those marked so.",
        "`extends: FILE`, seen from its own folder, or `extends: NAME` of a shipped one, lays a file over another.",
    ]
    group = ""
    for key in KEYS.values():
        if key.group != group:
            group = key.group
            lines += [
                "",
                f"## {group}",
                "",
                "| key | may be | default | on resume | what it is |",
                "|---|---|---|---|---|",
            ]
        default = f"`{as_yaml(key.default)}`" if key.default != "" else "required"
        cells = (f"`{key.name}`", key.allowed, default, "may change" if key.resumes else "", key.help)
        lines.append(f"| {' | '.join(cell.replace('|', '&#124;') for cell in cells)} |")
    lines += ["", "## Keys of transformers and TRL that have no effect here", "", "| key | use |", "|---|---|"]
    lines += [f"| `{name}` | {use} |" for name, use in WITHOUT_EFFECT.items()]
    lines += ["", "## Keys of transformers and TRL that are refused", "", "| key | why | instead |", "|---|---|---|"]
    lines += [f"| `{name}` | {rule} | {fix} |" for name, (rule, fix) in REFUSED.items()]
    return "\n".join(lines) + "\n"


def matching(word: str) -> list[Key]:
    """The keys that have a word, in any case of letters, in what is said of them."""
    return [key for key in KEYS.values() if word.lower() in f"{key.name} {key.allowed} {key.help}".lower()]


def keys_text(word: str = "") -> str:
    """The keys as `--help` lists them, in 80 columns: all, or those that have a word in what is said of them."""
    lines, group = [], ""
    head = textwrap.TextWrapper(80, initial_indent="  ", subsequent_indent="    ", break_on_hyphens=False)
    body = textwrap.TextWrapper(80, initial_indent="      ", subsequent_indent="      ", break_on_hyphens=False)
    for key in matching(word):
        if key.group != group:
            group = key.group
            lines += ["", group]
        default = "required" if key.default == "" else as_yaml(key.default)
        lines += [*head.wrap(f"{key.name}: {key.allowed} [{default}]"), *body.wrap(key.help)]
    return "\n".join(lines) + "\n"


def as_yaml(value: Any) -> str:
    """The value as a recipe has it, in one line."""
    return yaml.safe_dump(value, default_flow_style=True, width=math.inf).removesuffix("\n").removesuffix("\n...")


def as_options(keys: Mapping[str, Any]) -> list[str]:
    """Keys as words of a command line: `--key`, its value, and so on."""
    return [word for key, value in keys.items() for word in (f"--{key}", as_yaml(value))]
