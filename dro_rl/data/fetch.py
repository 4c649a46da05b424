"""The five datasets from a hub: files of a commit, checked by their hashes, made into question files.

The hub's client downloads into its cache and goes on where it stopped. `fetched.json`, beside the question files, says
of which commit they are, with every hash: what is fetched there later has to agree with it.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dro_rl.data.manifest import Manifest, read_manifest, write_manifest
from dro_rl.data.prepare import LICENCES, Preparation, prepare
from dro_rl.data.releases import RELEASES, Release
from dro_rl.errors import InputError, LackError, Phrase, did_you_mean, first_line
from dro_rl.files import file_sha256, written_whole
from dro_rl.hub import look_up
from dro_rl.rows import Watch
from dro_rl.rows.small import read_object, record

LOCK = "fetched.json"


@dataclass(frozen=True)
class Fetched:
    """What stands in `fetched.json`.

    Args:
        dataset: its name.
        repository: where it is on the hub.
        commit: of the repository.
        licence: of the data.
        files: sha256 of each file that was fetched, by its path there.
    """

    dataset: str
    repository: str
    commit: str
    licence: str
    files: dict[str, str]


def release_of(name: str) -> Release:
    """The release of a dataset. Raises `InputError` for a name that is none."""
    if name not in RELEASES:
        raise InputError(
            "dataset",
            name,
            f"a dataset that can be fetched is one of {', '.join(RELEASES)}",
            did_you_mean(name, RELEASES, "Use one of them, or dro-rl data prepare with any hub dataset."),
        )
    return RELEASES[name]


def commit_of(release: Release, revision: str | None) -> str:
    """The commit that a revision names: the pinned one where none is given; a branch or a tag is asked for.

    Raises:
        LackError: the hub is out of reach.
        InputError: it has no such revision.
    """
    if revision is None:
        return release.commit
    if re.fullmatch("[0-9a-f]{40}", revision):
        return revision
    from huggingface_hub import HfApi

    place = f"--revision {revision}"
    found = _asked(release, place, lambda: HfApi().dataset_info(release.repository, revision=revision, timeout=5))
    return str(found.sha)


def fetch(
    name: str,
    folder: Path,
    commit: str,
    splits: Sequence[str] = ("train", "dev"),
    *,
    skip_bad: bool = False,
    watch: Watch | None = None,
) -> dict[str, tuple[Path, Manifest]]:
    """Fetch a dataset's splits as question files with manifests. Called again it goes on, and leaves what is whole.

    Args:
        name: of `RELEASES`.
        folder: where `train.jsonl.gz`, `dev.jsonl.gz` and `fetched.json` go.
        commit: of the repository: `commit_of`.
        splits: which.
        skip_bad: leave bad rows out and count them.
        watch: draws progress while files are read.

    Returns:
        The question file of each split, and its manifest.

    Raises:
        InputError: no such split, other data in the folder, or a bad row.
        LackError: the hub is out of reach, or gave other bytes than are known.
    """
    release = release_of(name)
    for split in splits:
        if split not in release.files:
            raise InputError("--split", split, f"{name} has {' and '.join(release.files)}", "Name one of them.")
    lock = _lock(folder, name, release, commit)
    made = {}
    for split in splits:
        pinned = release.files[split] if commit == release.commit else {}
        hashes = {path: pinned.get(path) or lock.files.get(path) for path in release.files[split]}
        there = _finished(folder / f"{split}.jsonl.gz", release, commit, hashes)
        if there is None:
            files = {path: _file(release, commit, path, known) for path, known in hashes.items()}
            lock = dataclasses.replace(lock, files=lock.files | {path: sha for path, (_, sha) in files.items()})
            _write_lock(folder, lock)
            there = _prepare(name, folder, split, release, commit, files, skip_bad, watch)
        made[split] = (folder / f"{split}.jsonl.gz", there)
    return made


def _lock(folder: Path, name: str, release: Release, commit: str) -> Fetched:
    """What was fetched into the folder before, of the same commit; else nothing yet."""
    path = folder / LOCK
    fix = "Fetch into another folder, or delete this one."
    fresh = Fetched(name, release.repository, commit, LICENCES[name], {})
    if not path.is_file():
        return fresh
    known = record(Fetched, read_object(path, "what was fetched", fix), str(path), "what was fetched", fix)
    if (known.dataset, known.repository, known.commit) != (name, release.repository, commit):
        raise InputError(
            str(path),
            Phrase(f"{known.dataset} of {known.repository} at {known.commit}"),
            f"this is {name} of {release.repository} at {commit}, and a folder holds one commit",
            f"Name that one with --revision {known.commit}, or fetch into another folder.",
        )
    return known


def _write_lock(folder: Path, lock: Fetched) -> None:
    with written_whole(folder / LOCK) as beside:
        beside.write_text(json.dumps(asdict(lock), indent=2) + "\n", encoding="utf-8")


def _finished(questions: Path, release: Release, commit: str, hashes: Mapping[str, str | None]) -> Manifest | None:
    """The manifest of a question file that was made of these files; None where there is none yet."""
    manifest = read_manifest(questions) if questions.is_file() else None
    if manifest is None:
        if questions.exists():
            raise _taken(questions)
        return None
    known = [{"name": _name(release, commit, path), "sha256": sha256} for path, sha256 in hashes.items()]
    if manifest.sources != known:
        raise _taken(questions)
    return manifest


def _taken(questions: Path) -> InputError:
    return InputError(
        str(questions),
        Phrase("a file that was not fetched from there"),
        "a file of others is not written over",
        "Name another --output, or move it away.",
    )


def _file(release: Release, commit: str, path: str, known: str | None) -> tuple[Path, str]:
    """A file of the release in the hub client's cache, and its sha256, which is the known one."""
    from huggingface_hub import HfApi

    look_up("dataset", release.repository, commit)
    place = f"{release.repository}@{commit}/{path}"
    file = Path(
        _asked(
            release,
            place,
            lambda: HfApi().hf_hub_download(release.repository, path, repo_type="dataset", revision=commit),
        )
    )
    found = file_sha256(file)
    if known is not None and found != known:
        raise LackError(
            place,
            Phrase(f"sha256 {found}"),
            f"the file that is known has {known}",
            f"Delete {file} and fetch it again; if it stays so, the hub has other bytes than those that were pinned.",
        )
    return file, found


def _asked(release: Release, place: str, ask: Callable[[], Any]) -> Any:
    """What the hub answers; what it has not, and that it is out of reach, in one line."""
    import httpx
    from huggingface_hub import errors, hf_hub_url

    try:
        return ask()
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled, httpx.TransportError) as error:
        url = hf_hub_url(release.repository, "", repo_type="dataset").partition("/resolve/")[0]
        raise LackError(
            place,
            Phrase(f"{url} cannot be reached ({type(error).__name__})"),
            "it is fetched from the hub, and is not in its cache",
            "Connect, name a mirror in HF_ENDPOINT, or bring the file here and give it to dro-rl data prepare --input.",
        ) from None
    except (errors.HfHubHTTPError, errors.EntryNotFoundError, errors.HFValidationError) as error:
        raise InputError(
            place, Phrase(first_line(error)), "the hub has this revision, and the file in it", "Check --revision."
        ) from None


def _prepare(
    name: str,
    folder: Path,
    split: str,
    release: Release,
    commit: str,
    files: Mapping[str, tuple[Path, str]],
    skip_bad: bool,
    watch: Watch | None,
) -> Manifest:
    """The question file of downloaded files, whose manifest names them by repository and commit."""
    first = next(iter(files.values()))[0]
    output = folder / f"{split}.jsonl.gz"
    job = Preparation(
        dataset=name,
        source=str(first if len(files) == 1 else first.parent),
        output=output,
        format=release.format,
        split=split,
        skip_bad=skip_bad,
    )
    manifest, _ = prepare(job, watch=watch)
    sources = [{"name": _name(release, commit, path), "sha256": sha256} for path, (_, sha256) in files.items()]
    manifest = dataclasses.replace(manifest, sources=sources)
    write_manifest(output, manifest)
    return manifest


def _name(release: Release, commit: str, path: str) -> str:
    return f"{release.repository}@{commit}/{path}"
