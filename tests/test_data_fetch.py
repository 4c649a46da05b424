"""`dro-rl data fetch`, from a hub that is made here: a server that answers what the hub's client asks."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants
from typer.testing import CliRunner

from dro_rl.cli import app
from dro_rl.data import fetch
from dro_rl.data.fetch import LOCK
from dro_rl.data.prepare import LICENCES
from dro_rl.data.readers import FORMATS
from dro_rl.data.releases import RELEASES
from dro_rl.data.sources import split_rows
from dro_rl.records import read_questions
from tests import released

ROWS: dict[str, list[Any]] = {
    "nq": [{"question": "who painted it", "answer": ["Zoë", "Zoe"]}, {"question": "where", "answer": ["Ulm"]}],
    "hotpotqa": [released.HOTPOT_COLUMNS, {**released.HOTPOT_COLUMNS, "id": "second"}],
    "musique": [released.MUSIQUE],
    "2wikimultihopqa": [released.TWO_WIKI_MIRRORS["JSON as text"]],
    "wow": [released.FLASHRAG],
}
"""What the repositories hold, in the forms of theirs."""


class Hub(ThreadingHTTPServer):
    """Repositories by name: the commit of each, and the bytes of its files."""

    def __init__(self) -> None:
        self.commits: dict[str, str] = {}
        self.files: dict[str, bytes] = {}
        self.asked: list[str] = []
        super().__init__(("127.0.0.1", 0), _Handler)


class _Handler(BaseHTTPRequestHandler):
    server: Hub

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, *, body: bool) -> None:
        self.server.asked.append(f"{self.command} {self.path}")
        about = re.fullmatch(r"/api/datasets/([^/]+/[^/]+)(?:/revision/(.+))?", self.path)
        file = re.fullmatch(r"/datasets/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", self.path)
        repository = (about or file or [None, ""])[1]
        commit = self.server.commits.get(repository, "")
        data, headers, error = b"", {}, ""
        if not commit:
            error = "RepoNotFound"
        elif (about or file)[2] not in (None, "main", commit):  # type: ignore[index]
            error = "RevisionNotFound"
        elif about:
            data = json.dumps({"id": repository, "sha": commit, "siblings": []}).encode()
        elif file and f"{repository}/{file[3]}" in self.server.files:
            data = self.server.files[f"{repository}/{file[3]}"]
            headers = {"ETag": f'"{hashlib.sha256(data).hexdigest()}"', "X-Repo-Commit": commit}
        else:
            error = "EntryNotFound"
        self.send_response(404 if error else 200)
        for name, value in (headers | ({"X-Error-Code": error} if error else {})).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if body:
            self.wfile.write(data)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub with the five repositories, the rows of each in its files; what is pinned are these."""
    server = Hub()
    endpoint = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", f"{endpoint}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    )
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    releases = {}
    for name, release in RELEASES.items():
        server.commits[release.repository] = release.commit
        files: dict[str, dict[str, str]] = {}
        for split, paths in release.files.items():
            for number, path in enumerate(paths):
                made = released.write(
                    tmp_path / Path(path).name, *ROWS[name][number : None if len(paths) == 1 else number + 1]
                )
                data = made.read_bytes()
                server.files[f"{release.repository}/{path}"] = data
                files.setdefault(split, {})[path] = hashlib.sha256(data).hexdigest()
                made.unlink()
        releases[name] = dataclasses.replace(release, files=files)
    monkeypatch.setattr(fetch, "RELEASES", releases)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


def run(*arguments: object) -> Any:
    return CliRunner().invoke(app, ["data", "fetch", *map(str, arguments)])


def test_what_is_pinned_is_whole_and_can_be_read() -> None:
    assert RELEASES.keys() == LICENCES.keys()
    for release in RELEASES.values():
        assert re.fullmatch("[0-9a-f]{40}", release.commit)
        assert release.format in FORMATS
        assert set(release.files) == {"train", "dev"}
        hashes = [sha256 for files in release.files.values() for sha256 in files.values()]
        assert all(re.fullmatch("[0-9a-f]{64}", each) for each in hashes)
        assert len(set(hashes)) == len(hashes)


@pytest.mark.parametrize("name", RELEASES)
def test_a_dataset_comes_as_question_files_that_training_reads(hub: Hub, tmp_path: Path, name: str) -> None:
    folder = tmp_path / "data" / name
    done = run(name, "--output", folder)
    assert done.exit_code == 0, done.stderr
    release = fetch.RELEASES[name]
    assert done.stdout.splitlines()[0] == f"{name}: {LICENCES[name]}; {release.repository} at {release.commit}"
    assert ("without candidates" in done.stdout) == (name in ("nq", "wow"))
    for split in ("train", "dev"):
        found = read_questions(folder / f"{split}.jsonl.gz", candidates="optional")
        assert len(found) == len(ROWS[name])
        assert all(question.dataset == name for question in found)
        assert bool(found[0].documents) == release.candidates
        manifest = json.loads((folder / f"{split}.jsonl.gz.manifest.json").read_text())
        assert manifest["licence"] == LICENCES[name]
        assert manifest["sources"] == [
            {"name": f"{release.repository}@{release.commit}/{path}", "sha256": sha256}
            for path, sha256 in release.files[split].items()
        ]
    lock = json.loads((folder / LOCK).read_text())
    assert lock["commit"] == release.commit
    assert lock["files"] == {path: sha for files in release.files.values() for path, sha in files.items()}
    if release.candidates:
        assert len(list(split_rows(str(folder), "train"))) == len(ROWS[name])


def test_what_is_there_is_left_alone_and_what_is_missing_is_fetched(hub: Hub, tmp_path: Path) -> None:
    folder = tmp_path / "data"
    assert run("musique", "--split", "dev", "--output", folder).exit_code == 0
    before = (folder / "dev.jsonl.gz").stat().st_mtime_ns
    hub.asked.clear()
    assert run("musique", "--output", folder).exit_code == 0
    assert (folder / "dev.jsonl.gz").stat().st_mtime_ns == before
    assert {line.rpartition("/")[2] for line in hub.asked if "resolve" in line} == {"musique_ans_v1.0_train.jsonl"}
    hub.asked.clear()
    done = run("musique", "--output", folder, "--json")
    assert json.loads(done.stdout)["splits"]["dev"]["manifest"]["num_questions"] == 1
    assert hub.asked == []


def test_other_bytes_than_are_pinned_end_it_with_both_hashes(hub: Hub, tmp_path: Path) -> None:
    path = "dgslibisey/MuSiQue/musique_ans_v1.0_dev.jsonl"
    known = hashlib.sha256(hub.files[path]).hexdigest()
    hub.files[path] += b"\n"
    seen = hashlib.sha256(hub.files[path]).hexdigest()
    done = run("musique", "--split", "dev", "--output", tmp_path / "data")
    assert done.exit_code == 3
    assert len(done.stderr.splitlines()) == 1
    assert f"sha256 {seen}" in done.stderr
    assert f"the file that is known has {known}" in done.stderr
    assert not (tmp_path / "data").exists()


def test_a_revision_is_resolved_once_and_locked(hub: Hub, tmp_path: Path) -> None:
    """Of a commit that is not pinned no hash is known: the first fetch writes it down, the next ones hold to it."""
    repository, folder = "dgslibisey/MuSiQue", tmp_path / "data"
    hub.commits[repository] = "f" * 40
    path = f"{repository}/musique_ans_v1.0_dev.jsonl"
    hub.files[path] += b"\n"
    done = run("musique", "--split", "dev", "--revision", "main", "--output", folder)
    assert done.exit_code == 0, done.stderr
    lock = json.loads((folder / LOCK).read_text())
    assert (lock["commit"], list(lock["files"])) == ("f" * 40, ["musique_ans_v1.0_dev.jsonl"])

    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / LOCK).write_bytes((folder / LOCK).read_bytes())
    assert run("musique", "--split", "dev", "--revision", "f" * 40, "--output", elsewhere).exit_code == 0
    (elsewhere / "dev.jsonl.gz").unlink()
    lock["files"]["musique_ans_v1.0_dev.jsonl"] = "0" * 64
    (elsewhere / LOCK).write_text(json.dumps(lock))
    done = run("musique", "--split", "dev", "--revision", "f" * 40, "--output", elsewhere)
    assert (done.exit_code, "the file that is known has 0000" in done.stderr) == (3, True)

    hub.commits[repository] = "e" * 40
    done = run("musique", "--split", "dev", "--revision", "main", "--output", folder)
    assert done.exit_code == 2
    assert f"--revision {'f' * 40}" in done.stderr
    done = run("musique", "--split", "dev", "--output", folder)
    assert (done.exit_code, "a folder holds one commit" in done.stderr) == (2, True)


@pytest.mark.parametrize("options", [(), ("--revision", "main")])
def test_a_hub_out_of_reach_is_a_lack_in_one_line(hub: Hub, tmp_path: Path, options: tuple[str, ...]) -> None:
    hub.shutdown()
    hub.server_close()
    done = run("nq", "--output", tmp_path / "data", *options)
    assert done.exit_code == 3
    assert len(done.stderr.splitlines()) == 1
    assert f"{constants.ENDPOINT}/datasets/google-research-datasets/nq_open cannot be reached" in done.stderr
    assert "HF_ENDPOINT" in done.stderr
    assert not (tmp_path / "data").exists()


def test_what_the_cache_has_needs_no_hub(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run("nq", "--output", tmp_path / "one").exit_code == 0
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    hub.asked.clear()
    assert run("nq", "--output", tmp_path / "two").exit_code == 0
    assert hub.asked == []


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("hotpot",), "Did you mean hotpotqa?"),
        (("nq", "--split", "test"), "nq has train and dev"),
        (("nq", "--revision", "a" * 40), "the hub has this revision"),
        (("nq", "--revision", "v2"), "the hub has this revision"),
    ],
)
def test_what_is_not_there_is_named(hub: Hub, tmp_path: Path, arguments: tuple[str, ...], said: str) -> None:
    done = run(*arguments, "--output", tmp_path / "data")
    assert done.exit_code == 2
    assert said in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_a_file_of_others_is_not_written_over(hub: Hub, tmp_path: Path) -> None:
    (tmp_path / "train.jsonl.gz").write_bytes(b"mine")
    done = run("nq", "--output", tmp_path)
    assert done.exit_code == 2
    assert "not written over" in done.stderr
    assert (tmp_path / "train.jsonl.gz").read_bytes() == b"mine"


def test_a_bad_row_leaves_no_file(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = "dgslibisey/MuSiQue/musique_ans_v1.0_dev.jsonl"
    hub.files[path] = hub.files[path] + b'\n{"id": "x"}'
    release = fetch.RELEASES["musique"]
    files = {"dev": {"musique_ans_v1.0_dev.jsonl": hashlib.sha256(hub.files[path]).hexdigest()}}
    monkeypatch.setattr(fetch, "RELEASES", {"musique": dataclasses.replace(release, files=files)})
    done = run("musique", "--output", tmp_path / "data")
    assert done.exit_code == 2
    assert not (tmp_path / "data" / "dev.jsonl.gz").exists()
    done = run("musique", "--output", tmp_path / "data", "--skip-bad")
    assert done.exit_code == 0
    assert "left out: 1" in done.stdout
