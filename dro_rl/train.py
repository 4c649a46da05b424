"""The job: a recipe in, a trained selector and generator out. What it does stands in `job/run.py`.

dro-rl train quickstart --seed 1 --output_dir runs/seed-1
dro-rl train recipes/musique.yaml [--key value …] --launch "--config_file ddp --num_processes 8"
accelerate launch --config_file recipes/accelerate/ddp.yaml dro_rl/train.py recipes/musique.yaml [--key value …]
"""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Sequence

from dro_rl.errors import InputError, LackError, Phrase, first_line, from_system, is_full_disk, is_out_of_memory
from dro_rl.job.stopping import LAUNCHED, Stopped, say_stopped, stop_on_signals, stop_with_launcher
from dro_rl.keys.reference import keys_text
from dro_rl.recipe import parse_command_line, read_keys
from dro_rl.terminal import PlainFormatter, console

SECONDS_TO_BE_ENDED = 10


def main(arguments: Sequence[str]) -> None:
    """The job. A wrong key is found before torch is imported, which takes seconds."""
    read_keys(*parse_command_line(arguments))
    from dro_rl.job.run import run

    run(arguments)


def run_job(arguments: Sequence[str]) -> int:
    """`main` with errors in a user's input, and a signal's end, as one line on standard error and the exit status."""
    if "--help" in arguments or "-h" in arguments or not arguments:
        print((__doc__ or "").strip(), keys_text(), sep="\n")
        return 0
    handler = logging.StreamHandler()
    handler.setFormatter(PlainFormatter("%(message)s"))
    root = logging.getLogger()
    if not root.handlers:
        root.addHandler(handler)
    logging.getLogger("dro_rl").setLevel(logging.INFO if os.environ.get("RANK", "0") == "0" else logging.WARNING)
    try:
        return _refusing(arguments)
    except Stopped as stopped:
        if os.environ.get("RANK", "0") == "0" and LAUNCHED not in os.environ:
            say_stopped(stopped.number)
        return stopped.status
    finally:
        root.removeHandler(handler)  # the stream may end before a process that runs several jobs


def _refusing(arguments: Sequence[str]) -> int:
    try:
        main(arguments)
    except InputError as error:
        return _refuse(error)
    except Exception as error:
        if is_full_disk(error):
            return _refuse(
                LackError(
                    str(getattr(error, "filename", None) or "disk"),
                    Phrase(f"full ({first_line(error)})"),
                    "a run has room for its files; checkpoints that are in place are whole",
                    "Free some, and give the same command with --resume_from_checkpoint auto.",
                )
            )
        if is_out_of_memory(error):
            return _refuse(
                LackError(
                    "memory",
                    Phrase(f"full ({first_line(error)})"),
                    "what a job loads has room",
                    "Load less, with dtype: bfloat16 and adapters over a base that is shared or quantised (share_base, "
                    "quantization); in a warm-up, lower warmup_batch_size, raise warmup_gradient_accumulation_steps.",
                )
            )
        found = from_system(error)
        if found is None:
            raise
        return _refuse(found)
    return 0


def _refuse(error: InputError) -> int:
    rank = os.environ.get("RANK", "0")
    beside = os.environ.get("LOCAL_RANK", "0") != "0"
    if beside:
        # Most errors befall all processes, and the launcher ends this one when the main one has said it. What befell
        # this one alone must be said here.
        time.sleep(SECONDS_TO_BE_ENDED)
    where = f"[process {rank}] " if beside else ""
    console(stderr=True).print(f"{where}error: {error}", soft_wrap=True)
    return error.status


if __name__ == "__main__":
    stop_on_signals()
    stop_with_launcher()
    status = run_job(sys.argv[1:])
    torch = sys.modules.get("torch")
    if torch and torch.distributed.is_initialized() and status < 128:  # whoever was stopped waits for nobody
        torch.distributed.destroy_process_group()
    if os.environ.get("RANK", "0") != "0":
        # Seen rarely: threads that libraries leave running abort a process that exits after all is done. Only the main
        # process has anything to finish on exit.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)
