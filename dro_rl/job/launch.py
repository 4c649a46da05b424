"""Starting the job as `accelerate launch` does: by its own parser and launchers, without their tracebacks.

One process is become, so that signals and the exit status are the job's. Several are children of this one.
"""

from __future__ import annotations

import contextlib
import copy
import io
import logging
import os
import shlex
import warnings
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command, launch_command_parser
from accelerate.utils.launch import prepare_simple_launcher_cmd_env
from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from dro_rl.errors import InputError, first_line
from dro_rl.job.stopping import LAUNCHED, say_stopped
from dro_rl.shipped import ACCELERATE, find

JOB = Path(__file__).parent.parent / "train.py"
KINDS = ("multi_gpu", "tpu", "use_deepspeed", "use_fsdp", "use_megatron_lm")
"""What accelerate starts by a launcher of processes of its own."""
SHARING = ("ddp", "zero2", "zero3", "fsdp2")
"""Shipped configurations of several processes."""


def launch_job(options: str, arguments: Sequence[str], *, on_cpu: bool = False) -> int:
    """Run `dro_rl/train.py` with `arguments`, under options of `accelerate launch`.

    Args:
        on_cpu: one process on the CPU, whatever devices there are, unless the options or accelerate's own configuration
            say otherwise.

    Returns:
        The exit status of several processes: that of the first one that failed. A job of one process takes this one's
        place, and nothing returns.

    Raises:
        InputError: accelerate does not take the options.
    """
    logging.disable(logging.ERROR)  # the launchers' remarks, not the job's: what went wrong is in an exception
    warnings.simplefilter("ignore")
    args = _parsed(options, arguments)
    try:
        found, defaults, _ = _validate_launch_command(copy.deepcopy(args))
        several = any(getattr(found, kind) for kind in KINDS) and not found.cpu
        if on_cpu and not options and defaults is None:
            several, found.use_cpu = False, True
        if several:
            return _launch_several(args)
        command, environment = prepare_simple_launcher_cmd_env(found)
    except (ValueError, ImportError, RuntimeError, OSError, KeyError, TypeError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(
            "--launch", options, f"accelerate can follow these options ({first_line(error)})", "Correct them."
        ) from None
    return os.execvpe(command[0], command, environment)


def launched(options: str) -> tuple[int | None, str | None]:
    """What options of `accelerate launch` say of a run, None where they do not: how many processes, and which of the
    shipped configurations shares the models among them."""
    args = _parsed(options, ())
    if args.config_file is None:
        return args.num_processes, None
    try:
        config = load_config_from_file(args.config_file)
    except (ValueError, OSError, KeyError, TypeError) as error:
        raise InputError(
            "--launch", options, f"accelerate reads its configuration ({first_line(error)})", "Correct it."
        ) from None
    place = Path(args.config_file)
    shares = place.parent == ACCELERATE and place.stem in SHARING
    return args.num_processes or config.num_processes, place.stem if shares else None


def _launch_several(args: Namespace) -> int:
    os.environ[LAUNCHED] = "1"  # for the processes that it starts
    try:
        launch_command(args)
    except ChildFailedError as error:  # which has said why
        status = error.get_first_failure()[1].exitcode
        return status if status > 0 else 128 - status
    except SignalException as error:
        say_stopped(error.sigval)
        return 128 + error.sigval
    finally:
        del os.environ[LAUNCHED]
    return 0


def _parsed(options: str, arguments: Sequence[str]) -> Namespace:
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            args = launch_command_parser().parse_args([*shlex.split(options), str(JOB), *arguments])
    except (SystemExit, ValueError) as error:
        words = said.getvalue().strip().splitlines() or [first_line(error)]
        raise InputError(
            "--launch",
            options,
            f"these are options of accelerate launch ({words[-1].partition('error: ')[2] or words[-1]})",
            "`accelerate launch --help` lists them.",
        ) from None
    if args.config_file is not None:
        args.config_file = str(find(args.config_file, ACCELERATE))
    return args
