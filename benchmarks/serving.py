"""Questions a second and latency of `dro-rl serve` at 1, 8 and 32 clients, and what becomes of them in a stop.

    python -m benchmarks.serving                                   the toy pair
    python -m benchmarks.serving --run runs/nq --data dev.jsonl    any other

The server is a process of its own, as users start it; the clients are threads of this one, on the same machine. A
client asks for an answer from a question's documents, waits, and asks again. Then the server is told to stop while
the most clients ask: each question has an answer, or a refusal in words, or finds nobody to connect to. A connection
that was taken and ends without a word is a question that was lost, and is counted.
"""

from __future__ import annotations

import json
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import httpx
import psutil
import typer

from benchmarks.harness import OUTPUT, OutputOption, cell, report

PATH = "/v1/chat/completions"


def toy_pair(folder: Path) -> Path:
    """The shipped tiny model as both roles, untrained, with the settings of the quick start."""
    from dro_rl.pipeline import PROMPT, PipelineSettings, save_settings
    from dro_rl.prompts import TEMPLATES
    from dro_rl.roles import ROLES
    from dro_rl.toy.world import TOY_BASE

    for role in ROLES:
        shutil.copytree(TOY_BASE, folder / role)
        shutil.copy(TEMPLATES / f"toy_{role}.jinja", folder / role / PROMPT)
    save_settings(folder, PipelineSettings(3, 256, 8, 4, {}, constrain_selection=True))
    return folder


def bodies_of(data: str, split: str = "test") -> list[dict[str, Any]]:
    """A request for each question of a split."""
    from dro_rl.data import load_questions

    return [
        {
            "messages": [{"role": "user", "content": question.question}],
            "documents": [{"id": each.id, "title": each.title, "text": each.text} for each in question.documents],
        }
        for question in load_questions(data, split, limit=200)
    ]


@contextmanager
def server(run: Path, *options: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """`dro-rl serve` on a free port: the process, and its address."""
    command = [sys.executable, "-m", "dro_rl", "serve", str(run), "--port", "0", "--rate", "0", "--json", *options]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        if not line:
            raise SystemExit(process.wait())
        yield process, json.loads(line)["url"]
    finally:
        process.kill()
        process.wait()


class Clients:
    """So many clients, each with one question in flight, until told to stop.

    Attributes:
        seconds: of each answer.
        ends: how many questions came to which end.
    """

    def __init__(self, url: str, bodies: Sequence[dict[str, Any]], count: int) -> None:
        self.seconds: list[float] = []
        self.ends: Counter[str] = Counter()
        self._url, self._bodies, self._over = url, bodies, threading.Event()
        self._threads = [threading.Thread(target=self._ask, args=(number,)) for number in range(count)]

    def start(self) -> None:
        """Begin to ask."""
        for thread in self._threads:
            thread.start()

    def finish(self) -> None:
        """Ask no more, and wait for what is asked."""
        self._over.set()
        self.join()

    def join(self) -> None:
        """Wait until each client has stopped."""
        for thread in self._threads:
            thread.join()

    def _ask(self, number: int) -> None:
        with httpx.Client(base_url=self._url, timeout=120, trust_env=False) as client:
            while not self._over.is_set():
                body = self._bodies[number % len(self._bodies)]
                number += 7
                began = time.perf_counter()
                end = ask(client, body)
                self.ends[end] += 1
                if end != "answered":
                    return
                self.seconds.append(time.perf_counter() - began)


def ask(client: httpx.Client, body: dict[str, Any]) -> str:
    """What becomes of a question."""
    try:
        response = client.post(PATH, json=body)
        said = response.json()
    except httpx.ConnectError:
        return "nobody to connect to"
    except (httpx.TransportError, ValueError):
        return "lost"
    if response.status_code == 200:
        return "answered" if said["choices"] else "lost"
    return "refused in words" if said["error"]["message"] else "lost"


def main(
    context: typer.Context,
    run: Annotated[Path | None, typer.Option(help="A run's folder; the toy pair, unless told.")] = None,
    data: Annotated[str, typer.Option(help="Whose questions are asked.")] = "toy",
    split: Annotated[str, typer.Option(help="Of the data.")] = "test",
    clients: Annotated[list[int] | None, typer.Option(help="Clients at once; may be repeated.")] = None,
    seconds: Annotated[float, typer.Option(help="Measured at each number, after a tenth that is not.")] = 20.0,
    batch_size: Annotated[int, typer.Option(help="Of the server.")] = 8,
    device: Annotated[str, typer.Option(help="Named in the report; the server takes CUDA where there is one.")] = "cpu",
    output: OutputOption = OUTPUT,
) -> None:
    """Measure, then stop the server in the middle."""
    numbers = clients or [1, 8, 32]
    bodies = bodies_of(data, split)
    rows: list[dict[str, Any]] = []
    folder = Path(tempfile.mkdtemp())
    load = psutil.getloadavg()
    options = ("--batch-size", str(batch_size), "--queue", str(2 * max(numbers)))
    with server(run or toy_pair(folder / "toy"), *options) as (process, url):
        for number in numbers:
            asking = Clients(url, bodies, number)
            asking.start()
            time.sleep(seconds / 10)
            warm, before = len(asking.seconds), httpx.get(f"{url}/metrics", trust_env=False).text
            began, worked = time.perf_counter(), psutil.Process(process.pid).cpu_times().user
            time.sleep(seconds)
            taken, elapsed = asking.seconds[warm:], time.perf_counter() - began
            worked = psutil.Process(process.pid).cpu_times().user - worked
            after = httpx.get(f"{url}/metrics", trust_env=False).text
            asking.finish()
            batches = counted(after, "dro_rl_batch_questions_count") - counted(before, "dro_rl_batch_questions_count")
            together = counted(after, "dro_rl_batch_questions_sum") - counted(before, "dro_rl_batch_questions_sum")
            row = {"clients": number, "seconds": elapsed, "answers": len(taken), "latencies": taken}
            row |= {"cpu_seconds": worked, "batch": together / max(batches, 1), "ends": dict(asking.ends)}
            rows.append(row)
        asking = Clients(url, bodies, max(numbers))
        asking.start()
        time.sleep(2)
        process.send_signal(signal.SIGTERM)
        told = time.perf_counter()
        asking.join()
        answered = time.perf_counter() - told
        status = process.wait(timeout=120)
        ended = time.perf_counter() - told
    shutil.rmtree(folder)
    lost = sum(row["ends"].get("lost", 0) for row in rows) + asking.ends["lost"]
    ends = ", ".join(f"{count} {end}" for end, count in sorted(asking.ends.items()))
    stop = (
        f"Told to stop under {max(numbers)} clients: the last of them knew after {answered:.1f} s, the process ended "
        f"after {ended:.1f} s with status {status}. What was asked from two seconds before on: {ends}; {lost} lost."
    )
    told_to_stop = {"clients": max(numbers), "stopped": dict(asking.ends), "status": status}
    rows.append({**told_to_stop, "answered": answered, "seconds": ended})
    measured = rows[:-1]
    report(
        "serving",
        context,
        "Answers of a served pair, with selection and generation",
        ["clients", "questions a second", "p50, ms", "p95, ms", "questions a batch", "server CPU, ms a question"],
        [
            [
                str(row["clients"]),
                cell(row["answers"] / row["seconds"], 1),
                *(cell(1000 * quantile(row["latencies"], share), 0) for share in (0.5, 0.95)),
                cell(row["batch"], 1),
                cell(1000 * row["cpu_seconds"] / row["answers"], 1),
            ]
            for row in measured
        ],
        rows,
        [f"Load of the machine before: {load[0]:.1f}; the clients are on it too.", stop],
    )
    raise SystemExit(1 if lost else 0)


def counted(text: str, name: str) -> float:
    """A figure of `/metrics`."""
    return float(next(line.split()[1] for line in text.splitlines() if line.startswith(f"{name} ")))


def quantile(values: Sequence[float], share: float) -> float:
    """Of some seconds, that below which a share of them lies."""
    return statistics.quantiles(values, n=100, method="inclusive")[round(100 * share) - 1]


if __name__ == "__main__":
    typer.run(main)
