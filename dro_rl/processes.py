"""What the processes of one job do as one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

from accelerate import PartialState
from accelerate.utils import broadcast_object_list

from dro_rl.errors import InputError

T = TypeVar("T")


def told_by_main(find: Callable[[], T]) -> T:
    """What the main process finds, on every process: the value, or the `InputError` that it raised."""
    said: Any = None
    if PartialState().is_main_process:
        try:
            said = (find(), None)
        except InputError as error:
            said = (None, (error.place, error.value, error.rule, error.fix))
    value, wrong = cast(Any, broadcast_object_list([said])[0])
    if wrong is not None:
        raise InputError(*wrong)
    return cast(T, value)
