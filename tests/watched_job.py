"""Runs the job, and prints of each of the selector's passes whether it read anything: `watched_job.py BOUND RECIPE …`.

BOUND is the coefficient below which a question teaches nothing; with 0 none is left out.
"""

from __future__ import annotations

import os
import sys
from typing import Any

from dro_rl.em import m_step


class Watched(m_step.MicroBatch):
    """Says, when it has read the selector's rows, whether there were any."""

    def rows(self, role: Any, *args: Any) -> Any:
        found = super().rows(role, *args)
        if role == "selector":
            said = "busy" if self.completion_tokens else "idle"
            print(f"\npass of process {os.environ.get('RANK', 0)}: {said}, skips {self.tokens_skipped}", flush=True)
        return found


if __name__ == "__main__":
    m_step.NOTHING = float(sys.argv[1])
    from dro_rl.em import passes
    from dro_rl.train import run_job

    passes.MicroBatch = Watched  # type: ignore[misc]
    sys.exit(run_job(sys.argv[2:]))
