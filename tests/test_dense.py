"""Dense retrieval: encoders of sentence-transformers, vectors in shards, faiss. Most encoders here are tables of words
made on the spot; one is real (all-MiniLM-L6-v2, from a package).
"""

from __future__ import annotations

import gzip
import importlib.util
import json
import os
import shutil
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from benchmarks import untrained_colbert
from dro_rl.cli import app
from dro_rl.errors import InputError, LackError
from dro_rl.records import Document
from dro_rl.retrieval import dense, inverted_lists
from dro_rl.retrieval.dense import Dense
from dro_rl.retrieval.encoder import Encoder, check_encoder, encoder_sha256
from dro_rl.retrieval.index import Index, build_index
from dro_rl.retrieval.workers import side_by_side
from tests.retrieval_world import PASSAGES, write_asked, write_corpus

pytest.importorskip("sentence_transformers", reason="the extra dense is not installed")
pytest.importorskip("faiss", reason="the extra dense is not installed")

WORDS = sorted({word.strip(".,;").lower() for each in PASSAGES for word in f"{each.title} {each.text}".split()})


def write_encoder(folder: Path, *, seed: int = 0, dimension: int = 16, **saved: object) -> Path:
    """A table of random vectors, a word each, of which a text has the mean; saved as any encoder is."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.models import StaticEmbedding
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel({word: n for n, word in enumerate(["?", *WORDS])}, unk_token="?"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    table = np.random.default_rng(seed).normal(size=(len(WORDS) + 1, dimension)).astype(np.float32)
    SentenceTransformer(modules=[StaticEmbedding(tokenizer, embedding_weights=table)], **saved).save_pretrained(
        str(folder), create_model_card=False
    )
    return folder


@pytest.fixture(scope="module")
def encoder(tmp_path_factory) -> str:
    return str(write_encoder(tmp_path_factory.mktemp("encoder") / "table"))


@pytest.fixture
def corpus(tmp_path) -> str:
    return str(write_corpus(tmp_path / "corpus.jsonl"))


@pytest.fixture
def small_shards(monkeypatch):
    monkeypatch.setattr(dense, "SHARD", 3)
    monkeypatch.setattr(inverted_lists, "BLOCK", 2)


def plain(
    checkpoint: str, query: str, passages: list[Document], *, cosine: bool = True, before: tuple[str, str] = ("", "")
):
    """Every passage's score: the library's own vectors of whole texts, and an inner product."""
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(checkpoint, device="cpu")
    texts = [f"{before[1]}{' '.join(filter(None, (each.title, each.text)))}" for each in passages]
    question, *vectors = model.encode([before[0] + query, *texts], prompt="")
    if cosine:
        question, *vectors = (vector / np.linalg.norm(vector) for vector in (question, *vectors))
    return np.array(vectors) @ question


# What is found ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("similarity", ["cosine", "dot"])
def test_flat_finds_what_an_inner_product_with_every_vector_finds(
    encoder, corpus, tmp_path, small_shards, dtype, similarity
):
    retriever = Dense(encoder, dtype=dtype, similarity=similarity)
    build_index(retriever, corpus, tmp_path / "index")
    index = Index(tmp_path / "index")
    for query in ("Which bird has a red lamp?", "Where is the tin bridge?"):
        scores = plain(encoder, query, PASSAGES, cosine=similarity == "cosine")
        (found,) = index.search([query], 8)
        assert [each.document for each in found] == [PASSAGES[row] for row in np.argsort(-scores)]
        assert [each.score for each in found] == pytest.approx(
            sorted(scores)[::-1], abs=1e-6 if dtype == "float32" else 2e-3
        )
        assert [each.document.id for each in index.search([query], 3)[0]] == [each.document.id for each in found[:3]]


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_ivf_that_looks_into_all_lists_finds_what_flat_finds(encoder, corpus, tmp_path, small_shards, dtype):
    queries = [each.text for each in PASSAGES] + ["Which bird has a red lamp?"]
    build_index(Dense(encoder, dtype=dtype), corpus, tmp_path / "flat")
    build_index(Dense(encoder, dtype=dtype, faiss_index="ivf", nlist=4, nprobe=4), corpus, tmp_path / "ivf")
    flat, ivf = (Index(tmp_path / name).search(queries, 8) for name in ("flat", "ivf"))
    for one, two in zip(flat, ivf, strict=True):
        assert [each.document.id for each in one] == [each.document.id for each in two]
        assert [each.score for each in one] == pytest.approx([each.score for each in two], abs=1e-6)
    assert sorted(path.name for path in (tmp_path / "ivf" / "dense").iterdir()) == [
        "encoder.json", "ivf.faiss", "ivf.lists",
    ]  # fmt: skip


def test_ivf_that_looks_into_one_list_finds_fewer_and_its_nprobe_can_be_changed_for_a_search(encoder, corpus, tmp_path):
    build_index(Dense(encoder, faiss_index="ivf", nlist=4, nprobe=1), corpus, tmp_path / "index")
    assert len(Index(tmp_path / "index").search(["red lamp"], 8)[0]) < 8
    path = tmp_path / "index" / "index.json"
    manifest = json.loads(path.read_text())
    manifest["settings"]["nprobe"] = 4
    path.write_text(json.dumps(manifest))
    assert len(Index(tmp_path / "index").search(["red lamp"], 8)[0]) == 8


def test_an_index_is_found_in_where_it_was_moved(encoder, corpus, tmp_path):
    build_index(Dense(encoder, faiss_index="ivf", nlist=2, nprobe=2), corpus, tmp_path / "built")
    before = Index(tmp_path / "built").search(["tin"], 4)
    (tmp_path / "built").rename(tmp_path / "moved")
    assert Index(tmp_path / "moved").search(["tin"], 4) == before


@pytest.mark.parametrize("compare", [dense._by_faiss, dense._by_torch])
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_nearest_is_the_plain_sort_whatever_the_shards_and_the_device(monkeypatch, compare, dtype):
    """What a GPU would do runs here on a CPU: its function is the same."""
    monkeypatch.setattr(dense, "_by_faiss", compare)
    draw = np.random.default_rng(3)
    vectors, queries = draw.normal(size=(101, 8)).astype(dtype), draw.normal(size=(5, 8)).astype(np.float32)
    vectors[70] = vectors[20]  # of equal score the earlier
    shards = np.split(vectors, [1, 40, 80])
    for k in (1, 7, 101):
        scores, rows = dense.nearest(queries, iter(shards), k, "cpu")
        every = queries @ vectors.astype(np.float32).T
        order = np.argsort(-every, axis=1, kind="stable")[:, :k]
        assert (rows == order).all() or k == 1
        np.testing.assert_allclose(scores, np.take_along_axis(every, order, 1), rtol=1e-5, atol=1e-5)
    assert dense.nearest(queries, iter(shards), 102, "cpu")[1][:, -1].tolist() == [-1] * 5


def test_prompts_are_the_encoders_own_or_those_that_are_given(corpus, tmp_path):
    own = str(write_encoder(tmp_path / "encoder", prompts={"query": "lamp ", "passage": "boat "}))
    build_index(Dense(own), corpus, tmp_path / "own")
    build_index(Dense(own, query_prompt="grass ", passage_prompt=""), corpus, tmp_path / "given")
    for folder, how in (("own", ("lamp ", "boat ")), ("given", ("grass ", ""))):
        found = Index(tmp_path / folder).search(["tin bridge"], 8)[0]
        scores = plain(own, "tin bridge", PASSAGES, before=how)
        assert [each.score for each in found] == pytest.approx(sorted(scores)[::-1], abs=1e-6)
        facts = json.loads((tmp_path / folder / "dense" / "encoder.json").read_text())
        assert (facts["query_prompt"], facts["passage_prompt"]) == how
        assert (facts["dimension"], facts["similarity"], facts["passages"]) == (16, "cosine", 8)


# A build ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("faiss_index", ["flat", "ivf"])
def test_a_build_that_was_killed_goes_on_with_the_next_shard(
    encoder, corpus, tmp_path, monkeypatch, small_shards, faiss_index
):
    retriever, whole, numbers = Dense(encoder, faiss_index=faiss_index, nlist=2, nprobe=2), dense._encode_shard, []

    def killed(*arguments):
        if len(numbers) == 2:
            raise KeyboardInterrupt
        numbers.append(arguments[-1])
        return whole(*arguments)

    monkeypatch.setattr(dense, "_encode_shard", killed)
    with pytest.raises(KeyboardInterrupt):
        build_index(retriever, corpus, tmp_path / "index")
    resumed = []
    monkeypatch.setattr(dense, "_encode_shard", lambda *given: resumed.append(given[-1]) or whole(*given))
    build_index(retriever, corpus, tmp_path / "index")
    assert (numbers, resumed) == ([0, 1], [2])
    monkeypatch.setattr(dense, "_encode_shard", whole)
    build_index(retriever, corpus, tmp_path / "once")
    one, two = (Index(tmp_path / name).search(["red lamp", "tin"], 5) for name in ("index", "once"))
    assert one == two


def test_a_build_of_ivf_goes_on_wherever_it_was_killed(encoder, corpus, tmp_path, monkeypatch, small_shards):
    """A kill at each file that is written on the way."""
    retriever = Dense(encoder, faiss_index="ivf", nlist=2, nprobe=2)
    build_index(retriever, corpus, tmp_path / "once")
    written, real = [], inverted_lists.written_whole

    def killed(path):
        written.append(path.name)
        if path.name == at:
            raise KeyboardInterrupt
        return real(path)

    monkeypatch.setattr(inverted_lists, "written_whole", killed)
    for at in ("ivf.trained", "ivf.block-00001", "ivf.lists", "ivf.faiss", ""):
        if at:
            with pytest.raises(KeyboardInterrupt):
                build_index(retriever, corpus, tmp_path / "index")
    build_index(retriever, corpus, tmp_path / "index")
    assert written.count("ivf.block-00000") == 1
    one, two = (Index(tmp_path / name).search(["red lamp", "tin"], 8) for name in ("index", "once"))
    assert one == two
    assert not list((tmp_path / "index" / "dense").glob("ivf.block*"))


@pytest.mark.slow
def test_processes_side_by_side_write_what_one_writes(encoder, tmp_path, monkeypatch):
    passages = [Document(str(n), "", f"{WORDS[n % len(WORDS)]} {WORDS[n % 7]} {n}") for n in range(dense.SHARD + 40)]
    corpus = str(write_corpus(tmp_path / "corpus.jsonl", passages))
    one, two = (Dense(encoder, batch_size=4096) for _ in range(2))
    build_index(one, corpus, tmp_path / "one")
    build_index(two, corpus, tmp_path / "two", processes=2)
    for name in ("00000.npy", "00001.npy"):
        there = [np.load(tmp_path / folder / "dense" / "vectors" / name) for folder in ("one", "two")]
        np.testing.assert_allclose(there[0], there[1], atol=1e-6)


def _refuses(numbers, done):
    raise InputError("passage p7", numbers, "a rule", "A fix.")


@pytest.mark.slow
def test_what_a_process_refuses_is_refused_by_all_of_them():
    with pytest.raises(InputError, match=r"passage p7: \[\d\]: a rule"):
        side_by_side(_refuses, (), [1], 1, None)


def test_a_torn_shard_is_encoded_again(encoder, corpus, tmp_path, monkeypatch, small_shards):
    whole = Dense.build

    def killed(self, passages, folder, processes):
        whole(self, passages, folder, processes)
        raise KeyboardInterrupt

    monkeypatch.setattr(Dense, "build", killed)
    with pytest.raises(KeyboardInterrupt):
        build_index(Dense(encoder), corpus, tmp_path / "index")
    monkeypatch.setattr(Dense, "build", whole)
    path = tmp_path / "index" / "dense" / "vectors" / "00001.npy"
    before = path.read_bytes()
    path.write_bytes(before[:150])
    build_index(Dense(encoder), corpus, tmp_path / "index")
    assert path.read_bytes() == before


# What is refused, and when ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"dtype": "int8"}, "dtype: 'int8'.*float32 or float16"),
        ({"faiss_index": "hnsw"}, "faiss_index: 'hnsw'.*flat or ivf"),
        ({"similarity": "euclidean"}, "similarity: 'euclidean'.*cosine or dot"),
        ({"nlist": -1}, "nlist: -1.*at least 0"),
        ({"batch_size": 0}, "batch_size: 0.*at least 1"),
        ({"faiss_index": "ivf", "nlist": 4, "nprobe": 5}, "nprobe: 5.*at most nlist, 4"),
    ],
)
def test_a_wrong_setting_is_named(encoder, settings, said):
    with pytest.raises(InputError, match=said):
        Dense(encoder, **settings).check()


def test_more_lists_than_passages_are_refused_before_anything_is_encoded(encoder, corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(dense, "_encode_shard", lambda *_: pytest.fail("encoded"))
    with pytest.raises(InputError, match="nlist: 9: there are 8 passages"):
        build_index(Dense(encoder, faiss_index="ivf", nlist=9, nprobe=1), corpus, tmp_path / "index")


@pytest.mark.parametrize("module", ["sentence_transformers", "faiss"])
def test_a_missing_library_is_named_with_its_extra(encoder, corpus, tmp_path, monkeypatch, module):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == module else find(name, *rest))
    result = CliRunner().invoke(app, ["index", "dense", corpus, str(tmp_path / "index"), "--checkpoint", encoder])
    assert result.exit_code == 3
    assert result.stderr == (
        f"error: dense: {module} is not installed: dense retrieval runs on sentence-transformers and faiss. "
        "pip install 'dro_rl[dense]'\n"
    )


def test_what_is_no_encoder_of_sentence_transformers_is_refused(encoder, tmp_path):
    folder = tmp_path / "encoder"
    shutil.copytree(encoder, folder)
    check_encoder(folder)
    modules = json.loads((folder / "modules.json").read_text())
    for text, said in (
        (
            json.dumps([{**modules[0], "type": "evil.Module"}]),
            "evil.Module: code that comes with an encoder is not run",
        ),
        ("{", r"modules\.json: .*as sentence-transformers saves it"),
        ("[{}]", r"modules\.json: .*as sentence-transformers saves it"),
    ):
        (folder / "modules.json").write_text(text)
        with pytest.raises(InputError, match=said):
            check_encoder(folder)
    (folder / "modules.json").unlink()
    with pytest.raises(InputError, match=r"no modules\.json"):
        check_encoder(folder)


def test_weights_that_would_be_unpickled_are_refused(encoder, tmp_path):
    folder = tmp_path / "encoder"
    shutil.copytree(encoder, folder)
    weights = next(folder.rglob("*.safetensors"))
    torch.save({}, weights.with_name("pytorch_model.bin"))
    check_encoder(folder)
    weights.unlink()
    with pytest.raises(InputError, match=r"pytorch_model\.bin without safetensors: weights are not unpickled"):
        check_encoder(folder)


def test_a_torn_encoder_is_one_line(encoder, tmp_path):
    folder = tmp_path / "encoder"
    shutil.copytree(encoder, folder)
    weights = next(folder.rglob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(InputError, match="sentence-transformers loads it"):
        Encoder(folder, None, None, None, on_gpu=False, half=False)


def test_a_similarity_that_is_no_inner_product_is_refused(tmp_path):
    folder = write_encoder(tmp_path / "encoder", similarity_fn_name="euclidean")
    with pytest.raises(InputError, match="'euclidean': vectors are compared by cosine or dot"):
        Encoder(folder, None, None, None, on_gpu=False, half=False)


def test_another_encoder_in_its_place_is_refused(corpus, tmp_path):
    folder = write_encoder(tmp_path / "encoder")
    build_index(Dense(str(folder)), corpus, tmp_path / "index")
    there = Index(tmp_path / "index").versions
    assert there["weights"] == encoder_sha256(folder)
    assert {"sentence-transformers", "faiss", "torch", "transformers"} < set(there)
    shutil.rmtree(folder)
    write_encoder(folder, seed=1)
    with pytest.raises(InputError, match=r"checkpoint: weights.*was built with"):
        Index(tmp_path / "index")
    shutil.rmtree(folder)
    write_encoder(folder, prompts={"query": "lamp "})
    with pytest.raises(InputError, match=r"checkpoint: weights.*was built with"):
        Index(tmp_path / "index")


def test_an_index_with_other_facts_than_its_encoder_is_refused(encoder, corpus, tmp_path):
    build_index(Dense(encoder), corpus, tmp_path / "index")
    path = tmp_path / "index" / "dense" / "encoder.json"
    facts = json.loads(path.read_text())
    path.write_text(json.dumps({**facts, "dimension": 8}))
    with pytest.raises(InputError, match=r"encoder\.json: dimension: 8: .*has 16"):
        Dense(encoder).open(path.parent)
    path.write_text(json.dumps({**facts, "passages": 9}))
    with pytest.raises(InputError, match="8 vectors: there is one of 16 dimensions for each of 9 passages"):
        Dense(encoder).open(path.parent)


def test_a_truncated_shard_of_a_finished_index_is_refused(encoder, corpus, tmp_path):
    build_index(Dense(encoder), corpus, tmp_path / "index")
    path = tmp_path / "index" / "dense" / "vectors" / "00000.npy"
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(InputError, match="other bytes than were written"):
        Index(tmp_path / "index")
    with pytest.raises(InputError, match="the vectors of an index are whole"):
        Dense(encoder).open(path.parents[1])


def test_a_corpus_that_changed_since_is_refused(encoder, corpus, tmp_path):
    build_index(Dense(encoder), corpus, tmp_path / "index")
    write_corpus(Path(corpus), PASSAGES[:7])
    with pytest.raises(InputError, match="changed since"):
        Index(tmp_path / "index")


@pytest.mark.parametrize("table", [np.nan, 1e9])
def test_vectors_that_are_no_numbers_are_refused_by_their_passage(corpus, tmp_path, monkeypatch, table):
    encoder = str(write_encoder(tmp_path / "encoder"))
    monkeypatch.setattr(Encoder, "passages", lambda self, texts, size: np.full((len(texts), 16), table, np.float32))
    with pytest.raises(InputError, match=r"passage p1: .*finite numbers"):
        build_index(Dense(encoder, dtype="float16"), corpus, tmp_path / "index")


def test_memory_that_runs_out_is_a_lack_with_its_setting(encoder, monkeypatch):
    made = Encoder(Path(encoder), None, None, None, on_gpu=False, half=False)

    def fails(*_, **__):
        raise RuntimeError("CUDA out of memory. Tried to allocate 2 GiB")

    monkeypatch.setattr(made._model, "encode_query", fails)
    with pytest.raises(LackError, match="batch_size: 7"):
        made.queries(["a"], 7)


# The commands -----------------------------------------------------------------------------------------------


def test_the_commands_index_retrieve_and_report(encoder, corpus, tmp_path):
    def run(*arguments: object):
        result = CliRunner().invoke(app, [str(each) for each in arguments])
        assert result.exit_code == 0, result.stderr
        return result.stdout

    asked, index, found = write_asked(tmp_path / "asked.jsonl"), tmp_path / "index", tmp_path / "found.jsonl"
    assert "8 passages" in run("index", "dense", corpus, index, "--checkpoint", encoder)
    run("retrieve", index, asked, "--k", 4, "--output", found)
    (report,) = json.loads(run("retrieval", "report", found, "--json"))["reports"]
    assert (report["retriever"], report["depth"]) == ("dense", 4)
    manifest = json.loads((tmp_path / "found.jsonl.manifest.json").read_text())["retrieval"]
    assert manifest["settings"]["faiss_index"] == "flat"
    assert len(manifest["versions"]["weights"]) == 64


# The real thing ---------------------------------------------------------------------------------------------

DATA = Path(os.environ.get("DRO_RL_DATA") or Path(__file__).parents[2] / "shared" / "data")


@pytest.mark.slow
def test_a_real_encoder_finds_the_gold_passages_of_real_questions(tmp_path):
    """all-MiniLM-L6-v2 on HotpotQA: for most questions a gold passage is first among those of all the questions."""
    if not untrained_colbert.is_available():
        pytest.skip(f"{untrained_colbert.PACKAGE} is not installed")
    if not DATA.is_dir():
        pytest.skip("no corpus at DRO_RL_DATA or ../shared/data")
    checkpoint = str(untrained_colbert.encoder_folder())
    with gzip.open(DATA / "dev" / "hotpotqa.jsonl.gz", "rt", encoding="utf-8") as lines:
        asked = [json.loads(line) for line in islice(lines, 6)]
    passages = {each["id"]: Document(**each) for row in asked for each in row["documents"]}
    corpus = write_corpus(tmp_path / "corpus.jsonl", list(passages.values()))
    build_index(Dense(checkpoint), str(corpus), tmp_path / "index")
    found = Index(tmp_path / "index").search([row["question"] for row in asked], 2)
    hits = sum(each[0].document.id in row["supporting"] for each, row in zip(found, asked, strict=True))
    assert hits >= 4
    scores = plain(checkpoint, asked[0]["question"], [each.document for each in found[0]])
    assert [each.score for each in found[0]] == pytest.approx(scores, abs=1e-5)
