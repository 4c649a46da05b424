"""ColBERT by colbert-ai. The encoder has real weights (all-MiniLM-L6-v2, from a package) under a fixed projection:
it is not trained as ColBERT, and shows that everything runs, not how well it finds.
"""

from __future__ import annotations

import gzip
import importlib.util
import json
import os
import time
from itertools import islice
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from benchmarks import untrained_colbert
from dro_rl.errors import InputError
from dro_rl.records import Document
from dro_rl.retrieval import colbert, colbert_runtime, workers
from dro_rl.retrieval.checkpoint import checkpoint_folder
from dro_rl.retrieval.colbert import ColBERT, check_checkpoint
from dro_rl.retrieval.index import Index, build_index
from tests.retrieval_world import write_corpus

DATA = Path(os.environ.get("DRO_RL_DATA") or Path(__file__).parents[2] / "shared" / "data")


def write_checkpoint(folder: Path, **config: object) -> Path:
    """What looks like a checkpoint, without an encoder."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "bert", **config}))
    save_file({"linear.weight": torch.ones(2, 2)}, folder / "model.safetensors")
    return folder


# What is refused, and when ----------------------------------------------------------------------------------


def test_an_encoder_without_projection_is_no_checkpoint(tmp_path):
    folder = write_checkpoint(tmp_path / "checkpoint")
    check_checkpoint(folder)
    save_file({"bert.weight": torch.ones(2, 2)}, folder / "model.safetensors")
    with pytest.raises(InputError, match=r"no linear\.weight"):
        check_checkpoint(folder)


def test_code_that_comes_with_a_checkpoint_is_refused(tmp_path):
    with pytest.raises(InputError, match="is not run"):
        check_checkpoint(write_checkpoint(tmp_path / "checkpoint", auto_map={"AutoModel": "evil.Model"}))


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_torn_checkpoint_is_refused(tmp_path, name):
    folder = write_checkpoint(tmp_path / "checkpoint")
    (folder / name).write_bytes(b"{")
    with pytest.raises(InputError, match=r"config\.json and model\.safetensors"):
        check_checkpoint(folder)
    (folder / name).unlink()
    with pytest.raises(InputError, match=r"config\.json and model\.safetensors"):
        check_checkpoint(folder)


@pytest.mark.parametrize("name", ["", "/none/such", "./none", "bert"])
def test_what_is_no_folder_and_no_hub_name_is_refused_at_once(name):
    with pytest.raises(InputError, match="folder or hub name"):
        checkpoint_folder(name, "a ColBERT checkpoint")


def test_a_missing_package_is_named_with_its_extra(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "colbert" else find(name))
    with pytest.raises(InputError, match=r"pip install 'dro_rl\[colbert\]'"):
        colbert_runtime.check_runtime()


def test_a_missing_compiler_is_named(monkeypatch):
    pytest.importorskip("colbert")
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(InputError, match="no no-such-compiler on the path"):
        colbert_runtime.check_runtime()


def test_another_version_of_colbert_is_refused(monkeypatch):
    pytest.importorskip("colbert")
    monkeypatch.setattr(colbert_runtime, "REPAIRED", "0.1")
    with pytest.raises(InputError, match=r"knows colbert-ai 0\.1"):
        colbert_runtime.check_runtime()


def test_a_lock_that_a_killed_compile_left_is_named_in_bounded_time(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    lock = colbert_runtime.build_folder("filter_pids_cpp") / "lock"
    colbert_runtime.wait_for_lock("filter_pids_cpp")
    lock.touch()
    os.utime(lock, (time.time() - 3600, time.time() - 3600))
    with pytest.raises(InputError, match="nothing has changed for 900 s") as caught:
        colbert_runtime.wait_for_lock("filter_pids_cpp")
    assert caught.value.place == str(lock)


def test_a_lock_of_a_compile_that_ends_is_waited_for(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    lock = colbert_runtime.build_folder("filter_pids_cpp") / "lock"
    lock.touch()
    monkeypatch.setattr(time, "sleep", lambda _: lock.unlink())
    colbert_runtime.wait_for_lock("filter_pids_cpp")


def test_ranks_share_out_the_gpus_that_there_are(monkeypatch):
    taken = []
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for there in (False, True):
        monkeypatch.setattr(torch.cuda, "is_available", lambda there=there: there)
        assert [workers.take_gpu(rank) for rank in range(3)] == [there] * 3
    assert taken == [0, 1, 0]


@pytest.mark.parametrize("settings", [{"nbits": 3}, {"doc_maxlen": 0}, {"batch_size": -1}])
def test_a_wrong_setting_is_named(settings):
    with pytest.raises(InputError, match=next(iter(settings))):
        ColBERT("x", **settings).check()


@pytest.fixture
def unopened(tmp_path, monkeypatch):
    """An index that is whole but for ColBERT's own files, which are neither made nor read; its checkpoint; its corpus.

    Building and opening are those of other tests: here are the checks around them.
    """
    pytest.importorskip("colbert")
    monkeypatch.setattr(ColBERT, "build", lambda *_: None)
    monkeypatch.setattr(ColBERT, "open", lambda *_: None)
    checkpoint = write_checkpoint(tmp_path / "checkpoint")
    corpus = write_corpus(tmp_path / "corpus.jsonl")
    build_index(ColBERT(str(checkpoint)), str(corpus), tmp_path / "index")
    return tmp_path / "index", checkpoint, corpus


def test_other_weights_in_the_place_of_those_that_encoded_are_refused(unopened):
    folder, checkpoint, corpus = unopened
    assert Index(folder).versions == Index(folder).manifest.versions
    save_file({"linear.weight": torch.zeros(2, 2)}, checkpoint / "model.safetensors")
    with pytest.raises(InputError, match=r"checkpoint: weights.*was built with"):
        Index(folder)
    with pytest.raises(InputError, match=r"checkpoint: weights.*was built with"):
        build_index(ColBERT(str(checkpoint)), str(corpus), folder)


def test_another_version_of_a_package_may_search_and_is_known(unopened):
    folder = unopened[0]
    manifest = json.loads((folder / "index.json").read_text())
    now = manifest["versions"]["torch"]
    manifest["versions"]["torch"] = "2.0"
    (folder / "index.json").write_text(json.dumps(manifest))
    index = Index(folder)
    assert (index.manifest.versions["torch"], index.versions["torch"]) == ("2.0", now)


def test_a_build_goes_on_with_another_batch_size(tmp_path, monkeypatch):
    pytest.importorskip("colbert")
    checkpoint = str(write_checkpoint(tmp_path / "checkpoint"))
    corpus = str(write_corpus(tmp_path / "corpus.jsonl"))
    sizes = []

    def killed(retriever, *_):
        sizes.append(retriever.batch_size)
        raise KeyboardInterrupt

    monkeypatch.setattr(ColBERT, "build", killed)
    for size in (64, 8):
        with pytest.raises(KeyboardInterrupt):
            build_index(ColBERT(checkpoint, batch_size=size), corpus, tmp_path / "index")
    assert sizes == [64, 8]
    with pytest.raises(InputError, match="goes on as it began"):
        build_index(ColBERT(checkpoint, nbits=4), corpus, tmp_path / "index")


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_every_search_has_the_settings_of_its_own_k():
    """colbert-ai keeps what it chose for the first k. Its own choice runs here, and what it would have ranked with."""
    pytest.importorskip("colbert")
    colbert_runtime.load_colbert()
    from colbert import Searcher
    from colbert.infra.config import ColBERTConfig

    used = []

    class Ranker:
        def rank(self, config, *_, **__):
            used.append((config.ncells, config.centroid_score_threshold, config.ndocs))
            return [], []

    retriever = ColBERT("x")
    retriever._searcher = Searcher.__new__(Searcher)
    retriever._searcher.config, retriever._searcher.ranker = ColBERTConfig(), Ranker()
    retriever._searcher.encode = lambda queries: torch.zeros(len(queries), 1, 1)
    for k in (5, 100, 1000):
        retriever.search(["a?", "b?"], k)
    assert used[::2] == used[1::2] == [(1, 0.5, 256), (2, 0.45, 1024), (4, 0.4, 4096)]


# The real thing ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """all-MiniLM-L6-v2 under a fixed projection to 128 dimensions, as ColBERT's files are named."""
    pytest.importorskip("colbert")
    if not untrained_colbert.is_available():
        pytest.skip(f"{untrained_colbert.PACKAGE} is not installed")
    return untrained_colbert.write_checkpoint(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(scope="module")
def passages():
    """The first passages of HotpotQA's corpus."""
    if not DATA.is_dir():
        pytest.skip("no corpus at DRO_RL_DATA or ../shared/data")
    with gzip.open(DATA / "corpus" / "hotpotqa.jsonl.gz", "rt", encoding="utf-8") as lines:
        return [Document(**json.loads(line)) for line in islice(lines, 80)]


@pytest.fixture(scope="module")
def built(checkpoint, passages, tmp_path_factory):
    folder = tmp_path_factory.mktemp("colbert")
    corpus = write_corpus(folder / "corpus.jsonl", passages)
    whole, numbers = colbert._encode_chunk, []

    def killed(indexer, store, number, size):
        if len(numbers) == 20:
            raise KeyboardInterrupt
        numbers.append(number)
        return whole(indexer, store, number, size)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(colbert, "_encode_chunk", killed)
        with pytest.raises(KeyboardInterrupt):
            build_index(ColBERT(str(checkpoint)), str(corpus), folder / "index")
        patch.setattr(colbert, "_encode_chunk", whole)
        resumed = []
        patch.setattr(colbert, "_encode_chunk", lambda *args: resumed.append(args[2]) or whole(*args))
        build_index(ColBERT(str(checkpoint)), str(corpus), folder / "index")
    return folder / "index", numbers, resumed


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_a_real_encoder_indexes_and_finds_passages_by_their_own_words(built, passages):
    index = Index(built[0])
    asked = passages[::8]
    found = index.search([" ".join(document.text.split()[:16]) for document in asked], 5)
    assert [candidates[0].document for candidates in found] == asked
    for candidates in found:
        scores = [candidate.score for candidate in candidates]
        assert len(candidates) == 5
        assert scores == sorted(scores, reverse=True)


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_a_build_that_was_killed_goes_on_with_the_next_chunk(built):
    _, before, after = built
    assert before + after == list(range(40))
    assert len(before) == 20


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_scores_are_those_of_the_plain_sum_of_maxima_but_for_compression(built, passages):
    """MaxSim from the encoder's own vectors: the index keeps them as a centroid and 2 bits a dimension."""
    index = Index(built[0])
    encoder = index.retriever._searcher.checkpoint
    query = "Who directed the film?"
    (question,) = index.retriever._searcher.encode([query])
    for document, score in index.search([query], 3)[0]:
        (vectors,) = encoder.docFromText([colbert.passage_text(document)], bsize=1, keep_dims=False)[0]
        plain = (question @ vectors.float().T).max(dim=1).values.sum().item()
        assert score == pytest.approx(plain, rel=0.1)


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_an_encoding_process_that_dies_ends_the_build_at_once_and_two_finish_it(checkpoint, passages, built, tmp_path):
    corpus = write_corpus(tmp_path / "corpus.jsonl", passages)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(colbert, "_encode_chunks", _die)
        with pytest.raises(InputError, match="died with status 7"):
            build_index(ColBERT(str(checkpoint)), str(corpus), tmp_path / "index", processes=2)
    with pytest.raises(InputError, match="not finished"):
        Index(tmp_path / "index")
    build_index(ColBERT(str(checkpoint)), str(corpus), tmp_path / "index", processes=2)
    asked = [document.title for document in passages[:5]]
    one, two = (Index(folder).search(asked, 1) for folder in (built[0], tmp_path / "index"))
    assert [found[0].document for found in one] == [found[0].document for found in two]
    assert [found[0].score for found in one] == pytest.approx([found[0].score for found in two], rel=1e-3)


def _die(*_):
    os._exit(7)
