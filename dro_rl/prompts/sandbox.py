"""Jinja for templates from anywhere: they reach no code, and what they cost is bounded.

A template arrives with a recipe or a run folder, which people pass on. jinja2's immutable sandbox keeps it from code
and from changing what it is given. What it lacks is a bound on time and memory: `'x' * 3000000000` is one expression.
Here each rendering has an allowance, in characters that it may touch: looking at a value costs its length, a step of a
loop and a call cost the template's length, and what would make something longer is paid for before it is made. Filters
and attributes whose result may be longer than what they are given, and are not needed for prompts, are not there.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Mapping
from contextvars import ContextVar
from functools import wraps
from typing import Any

from jinja2 import Template, TemplateError, Undefined, nodes, pass_context
from jinja2.defaults import DEFAULT_FILTERS
from jinja2.exceptions import SecurityError
from jinja2.runtime import LoopContext
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

ALLOWANCE = 20_000_000
"""Characters that a rendering may touch, whatever it is given."""
A_CHARACTER = 50
"""More of them for each character of what it is given."""
A_STEP = 400
"""What a step of a loop and a call cost in a template of no length."""
LONGEST_TEMPLATE = 200_000
"""Characters of a template."""

OF_TEXT = ("capitalize", "e", "escape", "lower", "safe", "striptags", "title", "trim", "truncate", "upper", "wordcount")
OF_VALUES = (
    "abs", "count", "d", "default", "first", "float", "int", "last", "length", "list", "map", "max", "min", "reject",
    "rejectattr", "reverse", "select", "selectattr", "sort", "unique",
)  # fmt: skip
"""jinja2's filters that give no more than a few times what they are given. `join`, `replace`, `indent`, `string` and
`tojson` are there too, and pay for what they make."""

METHODS = (
    "capitalize", "casefold", "count", "endswith", "find", "isalnum", "isalpha", "isdecimal", "isdigit",
    "islower", "isnumeric", "isspace", "istitle", "isupper", "join", "lower", "lstrip", "partition",
    "removeprefix", "removesuffix", "replace", "rfind", "rpartition", "rsplit", "rstrip", "split", "splitlines",
    "startswith", "strip", "swapcase", "title", "upper", "items", "keys", "values", "get", "index",
)  # fmt: skip
"""Of texts, lists and dicts."""

REFUSED = (nodes.Block, nodes.Extends, nodes.FromImport, nodes.Import, nodes.Include)
"""Statements that reach for other templates."""

_left: ContextVar[list[float]] = ContextVar("left")


class Exhausted(TemplateError):
    """A template costs more than prompts do."""


def _pay(characters: float) -> None:
    left = _left.get()
    left[0] -= characters
    if left[0] < 0:
        raise Exhausted("it makes more than a prompt holds, or takes longer than one takes")


def _size(value: Any) -> int:
    return len(value) if isinstance(value, str | list | tuple | dict | range) else 1


@pass_context
def _looked_at(context: Any, value: Any) -> Any:
    """Any value that a name, an attribute or an item stands for."""
    _pay(_size(value))
    return value


@pass_context
def _steps(context: Any, values: Any) -> list[Any]:
    """What a loop goes through."""
    found = list(values)
    _pay(len(found) * context.environment.a_step)
    return found


@pass_context
def _flat(context: Any, values: Any) -> Any:
    """A list, tuple or dict of a template: it holds no other, which could hold itself many times over."""
    _pay(_size(values))
    if any(
        isinstance(value, list | tuple | dict) for value in (values.values() if isinstance(values, dict) else values)
    ):
        raise SecurityError("lists within lists are not there")
    return values


def _printed(value: Any) -> Any:
    """What may be written: text and numbers."""
    if not isinstance(value, str | int | float | Undefined | None):
        raise SecurityError(f"a {type(value).__name__} is not text; write what it holds")
    _pay(_size(value))
    return value


def _text(value: Any) -> str:
    return value if isinstance(value, str) else str(_printed(value))


@pass_context
def _joined(context: Any, values: Iterable[Any], between: str = "", attribute: str | None = None) -> str:
    if attribute is not None:
        values = [context.environment.getattr(value, attribute) for value in values]
    pieces = [_text(_printed(value)) for value in values]
    _pay(len(between) * len(pieces))
    return str(between).join(pieces)


def _replaced(text: Any, old: str, new: str, count: int = -1) -> str:
    text = _text(text)
    most = len(text) + 1 if not old else text.count(old)
    _pay((most if count is None or count < 0 else min(most, count)) * len(new))
    return text.replace(old, new, -1 if count is None else count)


def _indented(text: Any, width: int | str = 4, first: bool = False, blank: bool = False) -> str:
    text = _text(text)
    _pay((text.count("\n") + 1) * (len(width) if isinstance(width, str) else width))
    return DEFAULT_FILTERS["indent"](text, width, first, blank)


@pass_context
def _as_json(context: Any, value: Any) -> Any:
    return DEFAULT_FILTERS["tojson"](context.eval_ctx, _printed(value))


def _checked(function: Callable[..., Any], *, of_text: bool) -> Callable[..., Any]:
    """A filter of jinja2's that pays for what it is given, and gives no lists within lists."""

    @wraps(function)
    def checked(*arguments: Any, **options: Any) -> Any:
        for argument in (*arguments, *options.values()):
            _pay(_size(argument))
        if of_text:
            place = 1 if hasattr(function, "jinja_pass_arg") else 0
            arguments = (*arguments[:place], _printed(arguments[place]), *arguments[place + 1 :])
        found = function(*arguments, **options)
        return _flat(None, found) if isinstance(found, list | tuple | dict) else found

    return checked


def _paid_concat(pieces: Iterable[str]) -> str:
    found = []
    for piece in pieces:
        _pay(len(piece))
        found.append(piece)
    return "".join(found)


class BoundedEnvironment(ImmutableSandboxedEnvironment):
    """See the module. Compile with `template`, render with `render`."""

    intercepted_binops = frozenset(("+", "*", "**", "%"))
    concat = staticmethod(_paid_concat)

    def __init__(self, **options: Any) -> None:
        super().__init__(finalize=_printed, **options)
        self.a_step = 1
        self.filters = {name: _checked(DEFAULT_FILTERS[name], of_text=True) for name in OF_TEXT} | {
            **{name: _checked(DEFAULT_FILTERS[name], of_text=False) for name in OF_VALUES},
            "string": _text,
            "join": _joined,
            "replace": _replaced,
            "indent": _indented,
            "tojson": _as_json,
            "looked at": _looked_at,
            "steps": _steps,
            "flat": _flat,
        }
        self.globals = {name: self.globals[name] for name in ("range", "namespace", "joiner")}

    def template(self, source: str) -> Template:
        """Compile. Raises `TemplateError`, and what Python's own compiler raises for what is nested too deep."""
        if len(source) > LONGEST_TEMPLATE:
            raise Exhausted(f"a template has at most {LONGEST_TEMPLATE} characters, and this one {len(source)}")
        self.a_step = max(A_STEP, len(source))
        token = _left.set([float(ALLOWANCE)])
        try:
            code = self.compile(_Paying().visit(self.parse(source)))
        finally:
            _left.reset(token)
        return Template.from_code(self, code, self.make_globals(None))

    def render(self, template: Template, characters: int, variables: Mapping[str, Any]) -> str:
        """Render. Raises `TemplateError` and whatever a template's expressions raise.

        Args:
            template: from `template`.
            characters: how long what it is given is.
            variables: what it is given.
        """
        token = _left.set([float(ALLOWANCE + A_CHARACTER * characters)])
        try:
            return template.render(variables)
        finally:
            _left.reset(token)

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        """Fields of what is given, a loop's and a namespace's own, and the `METHODS` of texts, lists and dicts."""
        if not super().is_safe_attribute(obj, attr, value):
            return False
        if isinstance(obj, str | list | tuple | dict):
            return attr in METHODS
        return isinstance(obj, LoopContext | Namespace) or attr in getattr(type(obj), "__dataclass_fields__", ())

    def wrap_str_format(self, value: Any) -> None:
        """`str.format` is an attribute like others here, and not one of `METHODS`."""

    def call(self, context: Any, function: Any, *arguments: Any, **options: Any) -> Any:
        """Call what a template calls; texts' methods that make more of what they are given are the filters."""
        _pay(self.a_step)
        for argument in (*arguments, *options.values()):
            _pay(_size(argument))
        text = getattr(function, "__self__", None)
        if isinstance(text, str) and function.__name__ == "join":
            return _joined(context, arguments[0], text)
        if isinstance(text, str) and function.__name__ == "replace":
            return _replaced(text, *arguments)
        return super().call(context, function, *arguments, **options)

    def call_binop(self, context: Any, name: str, left: Any, right: Any) -> Any:
        """Arithmetic on small numbers, and texts and lists that are paid for before they are made."""
        numbers = isinstance(left, int | float) and isinstance(right, int | float)
        if not numbers and name == "*":
            size, times = (_size(left), right) if isinstance(right, int) else (_size(right), left)
            _pay(size * max(0, times) if isinstance(times, int) else 0)
        elif not numbers and name == "+":
            _pay(_size(left) + _size(right))
        elif not numbers and name == "%":
            raise SecurityError("a format string is not there; write what it would write")
        elif numbers and name in ("*", "**") and max(abs(left), abs(right)) > (1e9 if name == "*" else 64):
            raise SecurityError(f"{left!r:.20} {name} {right!r:.20} is not a number that a prompt needs")
        return getattr(operator, _OPERATORS[name])(left, right)


_OPERATORS = {"+": "add", "*": "mul", "**": "pow", "%": "mod"}


class _Paying(NodeTransformer):
    """Has values paid for where a template looks at them, goes through them or puts them together."""

    def generic_visit(self, node: nodes.Node, *arguments: Any, **options: Any) -> Any:
        if isinstance(node, REFUSED):
            raise SecurityError(f"line {node.lineno}: a template stands alone, without other templates and blocks")
        node = super().generic_visit(node, *arguments, **options)
        reads = getattr(node, "ctx", "load") == "load"
        if isinstance(node, nodes.For):
            node.iter = _through("steps", node.iter)
        elif isinstance(node, nodes.Name | nodes.Getattr | nodes.Getitem) and reads:
            return _through("looked at", node)
        elif isinstance(node, nodes.List | nodes.Tuple | nodes.Dict) and reads:
            return _through("flat", node)
        elif isinstance(node, nodes.Concat):
            return _through("join", nodes.List(node.nodes, lineno=node.lineno))
        return node


def _through(name: str, node: Any) -> nodes.Filter:
    return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno, environment=node.environment)
