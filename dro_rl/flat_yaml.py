"""Flat YAML as recipes are written in it: every key once, plain values, and nothing that grows as it is read.

Dates stay text. A number is written in decimal digits: YAML 1.1 reads `010` as 8 and `1:30` as 90, which nobody means.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml
from yaml.resolver import BaseResolver

from dro_rl.errors import InputError, Phrase, first_line

MAX_BYTES = 2**20
MAX_DEPTH = 20
DECIMAL = r"[-+]?(0|[1-9][0-9_]*|[0-9_]*\.[0-9_]*([eE][-+]?[0-9]+)?|\.\w+)"
PLAIN = ("null", "bool", "int", "float")


class _Loader(yaml.SafeLoader):
    """Null, booleans, numbers, text, lists and dictionaries; a name may stand for text or a number, not for more."""

    yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in resolvers if tag.rpartition(":")[2] in PLAIN]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    depth = 0

    def refusal(self, at: yaml.Event | yaml.Node, found: str, rule: str, fix: str) -> InputError:
        """The error for what stands in a line."""
        assert at.start_mark is not None
        return InputError(f"{self.name}: line {at.start_mark.line + 1}", Phrase(found), rule, fix)

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        """A node, not too deep. A name that stands for a list of names that stand for lists fills any memory."""
        event = self.peek_event()
        if self.depth >= MAX_DEPTH:
            raise self.refusal(
                event, f"{MAX_DEPTH} levels of lists and dictionaries", "values are plain", "Correct it."
            )
        if getattr(event, "tag", None) not in (None, "!"):
            raise self.refusal(event, event.tag, "a value is of the type that it looks like", "Remove the tag.")
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        if isinstance(event, yaml.AliasEvent) and not isinstance(node, yaml.ScalarNode):
            raise self.refusal(
                event, f"*{event.anchor}", "a name stands for one value, not for several", "Write it out."
            )
        return node

    def mapping(self, node: yaml.MappingNode) -> dict[Any, Any]:
        """A dictionary, each key of which is text and stands once."""
        seen: dict[str, int] = {}
        for key_node, _ in node.value:
            key = self.construct_object(key_node) if isinstance(key_node, yaml.ScalarNode) else None
            if not isinstance(key, str):
                found = str(key_node.value) if isinstance(key_node, yaml.ScalarNode) else "a list or dictionary"
                raise self.refusal(key_node, found, "a key is a name", "Correct it.")
            if key in seen:
                raise self.refusal(
                    key_node, repr(key), f"a key stands once, and line {seen[key]} has it too", "Remove one."
                )
            seen[key] = key_node.start_mark.line + 1
        return self.construct_mapping(node, deep=True)

    def number(self, node: yaml.ScalarNode) -> float:
        """A number in decimal digits, and not so many that no computer counts them."""
        if len(node.value) > 400 or not re.fullmatch(DECIMAL, node.value):
            raise self.refusal(node, node.value, "a number is written in decimal digits", "Put quotes around text.")
        whole = node.tag.endswith(":int")
        return self.construct_yaml_int(node) if whole else self.construct_yaml_float(node)


_Loader.add_constructor(BaseResolver.DEFAULT_MAPPING_TAG, _Loader.mapping)
for _tag in ("int", "float"):
    _Loader.add_constructor(f"tag:yaml.org,2002:{_tag}", _Loader.number)


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a flat YAML file. Raises `InputError` for one that is missing, too large, broken or empty."""
    if not path.is_file():
        raise InputError(str(path), Phrase("no such file"), "a recipe is a YAML file", "Check the path.")
    try:
        with path.open("rb") as stream:
            content = stream.read(MAX_BYTES + 1)
    except OSError as error:
        raise InputError(str(path), Phrase(str(error.strerror)), "a recipe can be read", "Check the path.") from None
    if len(content) > MAX_BYTES:
        raise InputError(str(path), Phrase(f"more than {MAX_BYTES} bytes"), "a recipe is small", "Check the path.")
    values = parse_yaml(content, str(path))
    if not isinstance(values, dict):
        raise InputError(str(path), Phrase(type(values).__name__), "a recipe is `key: value` lines", "Write some.")
    return values


def parse_yaml(content: bytes | str, name: str) -> Any:
    """The value that a piece of YAML is. Raises `InputError` with `name` and the line."""
    loader: _Loader | None = None
    try:
        loader = _Loader(content)
        loader.name = name
        return loader.get_single_data()
    except (UnicodeDecodeError, yaml.reader.ReaderError) as error:
        raise InputError(name, Phrase(first_line(error)), "a recipe is UTF-8 text", "Convert the file.") from None
    except yaml.MarkedYAMLError as error:
        line = f": line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise InputError(f"{name}{line}", Phrase(str(error.problem)), "a recipe is YAML", "Correct it.") from None
    except InputError:
        raise
    except ValueError as error:  # an escape for a character that is none
        raise InputError(name, Phrase(first_line(error)), "values are plain", "Put quotes around text.") from None
    finally:
        if loader is not None:
            loader.dispose()
