"""What a model writes before it answers, in a block of its own: which marks open one, which close it, what is left.

Marks are the field's: `<think>` (DeepSeek-R1, Qwen3, SmolLM3), `<thinking>`, `<thought>`, `<reasoning>`,
`<reflection>`, `<analysis>`, `<scratchpad>` and such with a prefix (`<seed:think>`), `[THINK]` (Magistral), `◁think▷`
(Kimi), `<|begin_of_thought|>` (Sky-T1, OpenThinker), `<|START_THINKING|>` (Command A), `<|channel|>analysis<|message|>`
(gpt-oss), `<|channel>thought` (Gemma).
"""

from __future__ import annotations

import re

_WORD = r"(?:\w+:)?(?:think|thinking|thought|thoughts|reason|reasoning|reflection|analysis|scratchpad)"
_OPENS = (
    rf"<{_WORD}>|\[(?:THINK|THINKING|REASONING)\]|◁think▷|<\|begin_of_thought\|>|<\|START_THINKING\|>"
    r"|<\|channel\|>(?:analysis|commentary)\b|<\|channel>thought\b"
)
_CLOSES = (
    rf"</{_WORD}>|\[/(?:THINK|THINKING|REASONING)\]|◁/think▷|<\|end_of_thought\|>|<\|END_THINKING\|>"
    r"|<\|channel\|>final<\|message\|>|<channel\|>"
)
_MARK = re.compile(f"(?P<opens>{_OPENS})|(?P<closes>{_CLOSES})", re.IGNORECASE)


def without_thinking(text: str) -> str:
    """The text outside its thinking blocks.

    A block that is never closed reaches to the end. A mark that closes what the text did not open ends the thinking
    that the prompt opened, which reaches back to the beginning. In time proportional to the text.
    """
    kept: list[str] = []
    start, thinking = 0, False
    for mark in _MARK.finditer(text):
        if mark["opens"]:
            if not thinking:
                kept.append(text[start : mark.start()])
            thinking = True
        else:
            if not thinking:
                kept.clear()
            start, thinking = mark.end(), False
    return "".join(kept) if thinking else "".join([*kept, text[start:]])


def is_mark(token: str) -> bool:
    """Whether a token opens or closes a thinking block, or is a part of such a mark."""
    return _MARK.fullmatch(token) is not None or token in ("<|channel|>", "<|message|>")
