"""Claims about `dro-rl serve`: real clients and a real browser are answered, and nothing that comes in harms it."""

from __future__ import annotations

import json
import socket
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from browser import CHROMIUM, browser
from retrieval_world import PASSAGES, write_corpus
from typer.testing import CliRunner

from benchmarks.serving import PATH, bodies_of, toy_pair
from dro_rl.cli import app
from dro_rl.data import load_questions
from dro_rl.pipeline import read_settings
from dro_rl.records import Document, Question, Selection
from dro_rl.retrieval.bm25 import BM25
from dro_rl.retrieval.index import Index, build_index
from dro_rl.serve.batching import Batcher
from dro_rl.serve.connections import address_of, listen
from dro_rl.serve.limits import Rate
from dro_rl.serve.page import page, policy
from dro_rl.serve.ranking import ranked, score
from dro_rl.serve.refusals import Refusal
from dro_rl.serve.serving import Serving
from dro_rl.serve.settings import Limits
from dro_rl.serve.work import Asked, Pair, Served
from dro_rl.shown import visible

HOSTILE = "</script><img src=x onerror=\"document.title='stolen'\"> \u202eשלום \x1b[31m مرحبا 日本 👩‍🔬 [2] > [1] <eos>"
LIMITS = Limits(rate=0.0)


@contextmanager
def serving(pair: Any, limits: Limits = LIMITS, batch_size: int = 8) -> Iterator[tuple[httpx.Client, Serving]]:
    """A server in a thread of this process, and a client of it."""
    listening, up = listen("127.0.0.1", 0), threading.Event()
    url, made = address_of(listening), Serving(pair, "pair", limits, batch_size)
    thread = threading.Thread(target=made.run, args=(listening, up.set))
    thread.start()
    try:
        assert up.wait(60)
        with httpx.Client(base_url=url, timeout=60, trust_env=False) as client:
            yield client, made
    finally:
        made.stop()
        thread.join(60)
        assert not thread.is_alive()


class Slow:
    """Stands for a pair: it works on what it is given until it may end."""

    index = None

    def __init__(self) -> None:
        self.go, self.begun = threading.Event(), threading.Semaphore(0)
        self.batches: list[list[str]] = []

    def work(self, batch: Sequence[Asked]) -> list[Served]:
        self.batches.append([asked.question for asked in batch])
        self.begun.release()
        assert self.go.wait(60)
        return [Served(asked.documents, None, Selection((1,), True), (1,), asked.question) for asked in batch]


def question(text: str, *documents: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": text}], "documents": list(documents) or ["a document"]}


def head_of(body: bytes) -> bytes:
    head = f"POST {PATH} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\ncontent-length: {len(body)}"
    return head.encode() + b"\r\n\r\n"


def until(condition: Any, seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """The toy pair, which selects three, with an index over eight passages."""
    folder = tmp_path_factory.mktemp("served")
    build_index(BM25(), str(write_corpus(folder / "corpus.jsonl")), folder / "index")
    run = toy_pair(folder / "toy")
    return Pair.open(run, read_settings(run), folder / "index", 4, 8)


@pytest.fixture(scope="module")
def client(pair: Pair) -> Iterator[httpx.Client]:
    with serving(pair, replace(LIMITS, body=400_000)) as (made, _):
        yield made


@pytest.fixture(scope="module")
def url(client: httpx.Client) -> str:
    return str(client.base_url).rstrip("/")


# Real clients -----------------------------------------------------------------------------------------------

DOCUMENTS = ["home_of mira oslo", "school_of mira turin", "home_of uma rome", "home_of mira riga", "boss_of uma nils"]


def expected(pair: Pair, text: str, documents: Sequence[str] = DOCUMENTS) -> Any:
    """What the pipeline says, asked by itself."""
    made = tuple(Document(str(place), "", each) for place, each in enumerate(documents))
    (answer,) = pair.pipeline.answer_all([Question("q", text, (), made)])
    return answer


def test_coheres_client_ranks(pair: Pair, url: str) -> None:
    cohere = pytest.importorskip("cohere", reason="cohere is not installed")
    said = cohere.ClientV2(api_key="none", base_url=url).rerank(
        model="pair", query="home_of mira ?", documents=DOCUMENTS, top_n=4
    )
    numbers = expected(pair, "home_of mira ?").selection.numbers
    assert len(numbers) == 3
    assert [result.index + 1 for result in said.results[:3]] == list(numbers)
    assert [result.relevance_score for result in said.results] == [1, 1 / 2, 1 / 3, 0]
    assert said.results[3].index == next(place for place in range(5) if place + 1 not in numbers)
    with pytest.raises(cohere.NotFoundError):
        cohere.ClientV2(api_key="none", base_url=url).rerank(model="other", query="?", documents=DOCUMENTS)


def test_openais_client_is_answered_with_citations(pair: Pair, url: str) -> None:
    openai = pytest.importorskip("openai", reason="openai is not installed")
    own = openai.OpenAI(api_key="none", base_url=f"{url}/v1", max_retries=0)
    assert [model.id for model in own.models.list()] == ["pair"]
    documents = [{"id": f"d{place}", "text": text} for place, text in enumerate(DOCUMENTS)]
    asked: dict[str, Any] = {
        "model": "pair",
        "messages": [{"role": "user", "content": "home_of mira ?"}],
        "extra_body": {"documents": documents},
        "temperature": 0.7,
    }
    answer, whole = expected(pair, "home_of mira ?"), own.chat.completions.create(**asked)
    assert whole.choices[0].message.content == answer.text != ""
    assert [cited["id"] for cited in whole.citations] == [f"d{number - 1}" for number in answer.selection.numbers]
    assert [cited["index"] + 1 for cited in whole.citations] == list(answer.selection.numbers)
    assert whole.usage.total_tokens == whole.usage.prompt_tokens + whole.usage.completion_tokens > 0
    chunks = list(own.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == answer.text
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] == "stop"
    assert chunks[-1].usage == whole.usage
    with pytest.raises(openai.BadRequestError, match="tools: there is no such parameter here"):
        own.chat.completions.create(**asked, tools=[{"type": "function", "function": {"name": "f"}}])
    with pytest.raises(openai.NotFoundError):
        own.chat.completions.create(**{**asked, "model": "gpt"})


def test_jinas_and_vllms_requests_are_answered_in_their_shape(client: httpx.Client) -> None:
    """As their documentation has them: Jina's on /v1/rerank, with documents as objects; vLLM's on /rerank too."""
    jina = {"model": "pair", "query": "home_of mira ?", "top_n": 2, "documents": [{"text": each} for each in DOCUMENTS]}
    said = client.post("/v1/rerank", json=jina).json()
    assert [set(result) for result in said["results"]] == [{"index", "relevance_score", "document"}] * 2
    assert said["results"][0]["document"] == {"text": DOCUMENTS[said["results"][0]["index"]]}
    assert said["usage"]["total_tokens"] == said["usage"]["prompt_tokens"] > 0
    vllm = {"model": "pair", "query": "home_of mira ?", "documents": DOCUMENTS, "top_n": 0, "truncate_prompt_tokens": 9}
    assert len(client.post("/rerank", json=vllm).json()["results"]) == 5
    bare = client.post("/rerank", json={**vllm, "return_documents": False}).json()["results"]
    assert [set(result) for result in bare] == [{"index", "relevance_score"}] * 5


def test_many_at_once_are_told_what_each_would_be_alone(pair: Pair, url: str) -> None:
    questions = load_questions("toy", "test", limit=24)
    alone = pair.pipeline.answer_all(questions)

    def ask(body: dict[str, Any]) -> Any:
        return httpx.post(url + PATH, json=body, timeout=60, trust_env=False).json()

    with ThreadPoolExecutor(24) as pool:
        said = list(pool.map(ask, bodies_of("toy")[:24]))
    assert [each["choices"][0]["message"]["content"] for each in said] == [answer.text for answer in alone]
    assert [[cited["index"] + 1 for cited in each["citations"]] for each in said] == [
        list(answer.selection.numbers) for answer in alone
    ]


def test_a_question_without_documents_is_answered_from_the_index(client: httpx.Client, pair: Pair) -> None:
    body = {"messages": [{"role": "user", "content": "Where is the tin bridge?"}]}
    said = client.post(PATH, json=body).json()
    assert isinstance(pair.index, Index)
    (found,) = pair.index.search(["Where is the tin bridge?"], 4)
    assert [(each["id"], each["score"]) for each in said["retrieved"]] == [
        (hit.document.id, hit.score) for hit in found
    ]
    assert said["retrieved"][0]["text"] == PASSAGES[2].text
    assert [cited["id"] for cited in said["citations"]] == [
        said["retrieved"][cited["index"]]["id"] for cited in said["citations"]
    ]
    nothing = client.post(PATH, json={"messages": [{"role": "user", "content": "zzz"}]})
    assert (nothing.status_code, nothing.json()["error"]["code"]) == (404, "nothing_found")


@pytest.mark.skipif(CHROMIUM is None, reason="no browser here")
def test_a_real_browser_asks_and_sees_what_was_retrieved_selected_and_answered(client: httpx.Client, url: str) -> None:
    with browser() as at:
        at.call("Emulation.setDeviceMetricsOverride", width=360, height=640, deviceScaleFactor=2, mobile=True)
        at.open(url + "/")
        at.type("#question", "Where is the tin bridge?")
        at.evaluate("document.getElementById('go').click()")
        at.wait("!document.getElementById('result').hidden")
        lists = "[...document.querySelectorAll('#{} li')].map(each => each.textContent)"
        body = {"messages": [{"role": "user", "content": "Where is the tin bridge?"}]}
        said = client.post(PATH, json=body).json()
        assert at.evaluate("document.getElementById('answer').textContent") == said["choices"][0]["message"]["content"]
        retrieved, selected = at.evaluate(lists.format("retrieved")), at.evaluate(lists.format("selected"))
        assert [each["text"] in shown for each, shown in zip(said["retrieved"], retrieved, strict=True)] == [True] * 3
        assert [said["retrieved"][cited["index"]]["text"] in shown for cited, shown in
                zip(said["citations"], selected, strict=True)] == [True] * len(selected)  # fmt: skip
        assert len(selected) == 3

        at.type("#documents", f"home_of mira {HOSTILE}\n\nhome_of mira riga")
        at.evaluate("document.getElementById('result').hidden = true; document.getElementById('go').click()")
        at.wait("!document.getElementById('result').hidden")
        shown = at.evaluate(lists.format("retrieved"))
        assert "<img src=x" in shown[0]
        assert "\\u202e" in shown[0]
        assert at.evaluate("document.querySelectorAll('img').length") == 0
        assert at.evaluate("document.title") == "pair – dro_rl"
        assert at.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
        assert at.evaluate("getComputedStyle(document.querySelector('li')).borderTopStyle") == "solid"

        at.evaluate("document.getElementById('question').value = ' '; document.getElementById('go').click()")
        assert "this is not empty" in at.wait("document.getElementById('error').textContent")
        assert {address.removeprefix(url) for address in at.addresses()} <= {"/", PATH, "data:,"}


def test_the_page_allows_its_own_script_and_fetches_nothing() -> None:
    made = page(HOSTILE, has_index=False)
    assert "<img" not in made
    assert "\\u202e" in made
    assert "default-src 'none'" in policy(made)
    assert policy(made) != policy(made.replace("use strict", "use trick"))
    assert "http" not in made.replace("http-equiv", "")


# What comes in ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/rerank", [], "body"),
        ("/rerank", {"documents": ["a"]}, "query"),
        ("/rerank", {"query": "", "documents": ["a"]}, "query"),
        ("/rerank", {"query": 1, "documents": ["a"]}, "query"),
        ("/rerank", {"query": "q", "documents": "a"}, "documents"),
        ("/rerank", {"query": "q", "documents": []}, "documents"),
        ("/rerank", {"query": "q", "documents": ["a"] * 101}, "documents"),
        ("/rerank", {"query": "q", "documents": ["a", 1]}, "documents[1]"),
        ("/rerank", {"query": "q", "documents": ["a", None]}, "documents[1]"),
        ("/rerank", {"query": "q", "documents": [{"title": "t"}]}, "documents[0].text"),
        ("/rerank", {"query": "q", "documents": [{"text": " \n"}]}, "documents[0].text"),
        ("/rerank", {"query": "q", "documents": [{"text": ["x"]}]}, "documents[0].text"),
        ("/rerank", {"query": "q", "documents": [{"text": "a", "id": 1}, {"text": "b", "id": "1"}]}, "documents[1].id"),
        ("/rerank", {"query": "q", "documents": ["a"], "top_n": "3"}, "top_n"),
        ("/rerank", {"query": "q", "documents": ["a"], "top_n": -1}, "top_n"),
        ("/rerank", {"query": "q", "documents": ["a"], "top_n": 1.5}, "top_n"),
        ("/rerank", {"query": "q", "documents": ["a"], "return_documents": "yes"}, "return_documents"),
        ("/rerank", {"query": "q", "documents": ["a"], "rank_fields": ["x"]}, "rank_fields"),
        ("/rerank", {"query": "\ud800", "documents": ["a"]}, "query"),
        ("/rerank", {"query": "q", "documents": ["a"], HOSTILE: 1}, None),
        (PATH, {"messages": []}, "messages"),
        (PATH, {"messages": "q"}, "messages"),
        (PATH, question("q") | {"n": 2}, "n"),
        (PATH, question("q") | {"max_tokens": 0}, "max_tokens"),
        (PATH, question("q") | {"stream": "true"}, "stream"),
        (PATH, question("q") | {"response_format": {"type": "json_object"}}, "response_format"),
        (PATH, question("q", {"data": {"title": "t"}}), "documents[0].text"),
        (PATH, {"messages": [{"role": "system", "content": "Be brief."}]}, "messages[0].role"),
        (PATH, {"messages": [{"role": "user", "content": None}]}, "messages[0].content"),
        (PATH, {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]},
         "messages[1].role"),
        (PATH, {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
         "messages[0].content[0]"),
        (PATH, question("home_of " * 300), "question asked"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_request_is_named(client: httpx.Client, path: str, body: Any, param: str | None) -> None:
    response = client.post(path, content=json.dumps(body), headers={"content-type": "application/json"})
    error = response.json()["error"]
    assert response.status_code == 400
    assert set(error) == {"message", "type", "param", "code"}
    assert param is None or error["param"] == param
    assert error["message"] == visible(error["message"])


@pytest.mark.parametrize("body", [b"", b"{", b"\xff\xfe", b"[" * 100_000, b'{"query": NaN}', b"query=q"])
def test_what_is_no_json_is_refused(client: httpx.Client, body: bytes) -> None:
    for kind in ("application/json", "text/plain", "application/x-www-form-urlencoded"):
        response = client.post("/v1/rerank", content=body, headers={"content-type": kind})
        assert (response.status_code, response.json()["error"]["type"]) == (400, "invalid_request_error")


def test_any_text_comes_back_as_it_was(client: httpx.Client) -> None:
    body = {"query": HOSTILE, "documents": [{"text": HOSTILE, "title": HOSTILE, "id": HOSTILE, "url": "x"}, "a"]}
    results = client.post("/rerank", json=body).json()["results"]
    documents = {result["index"]: result["document"] for result in results}
    assert documents == {0: {"text": HOSTILE, "title": HOSTILE, "id": HOSTILE}, 1: {"text": "a"}}
    said = client.post(PATH, json=question(HOSTILE, {"text": "b", "id": HOSTILE})).json()
    assert [cited["id"] for cited in said["citations"]] == [HOSTILE]


def test_fewer_documents_than_are_selected_are_all_ranked(client: httpx.Client) -> None:
    """K above N: three are asked for, and there are two."""
    said = client.post("/rerank", json={"query": "home_of mira ?", "documents": DOCUMENTS[:2], "top_n": 50}).json()
    assert sorted(result["index"] for result in said["results"]) == [0, 1]
    assert sorted(said["selection"]["indices"]) == [0, 1]


def test_more_documents_than_are_shown_at_once_go_through_windows(pair: Pair) -> None:
    """The toy selector has numbers for twenty."""
    settings = pair.pipeline.settings
    documents = tuple(Document(str(place), "", f"home_of mira {place}") for place in range(30))
    pair.pipeline.settings = settings.slid(10, None)
    try:
        (served,) = pair.work([Asked("home_of mira ?", documents)])
    finally:
        pair.pipeline.settings = settings
    assert len(served.selection.numbers) == 3
    assert sorted(ranked(served.selection, 30)) == list(range(1, 31))


def test_very_long_documents_are_cut_to_the_prompt(client: httpx.Client) -> None:
    said = client.post(PATH, json=question("home_of mira ?", "home_of mira oslo " * 9000, "home_of mira riga"))
    assert said.status_code == 200
    assert said.json()["usage"]["prompt_tokens"] <= 256


def test_an_answer_is_no_longer_than_was_asked_for(client: httpx.Client) -> None:
    body = question("home_of friend_of mira ?", "friend_of mira goran", "home_of goran oslo")
    whole = client.post(PATH, json=body).json()
    cut = client.post(PATH, json={**body, "max_tokens": 1}).json()
    assert whole["usage"]["completion_tokens"] > 1 == cut["usage"]["completion_tokens"]
    assert cut["choices"][0]["finish_reason"] == "length"
    first = cut["choices"][0]["message"]["content"]
    assert whole["choices"][0]["message"]["content"].startswith(first)


def test_utterances_of_a_chat_are_lines_of_the_question() -> None:
    pair = Slow()
    pair.go.set()
    with serving(pair) as (client, _):
        messages = [
            {"role": role, "content": text} for role, text in (("user", "a"), ("assistant", "b"), ("user", "c"))
        ]
        messages[2]["content"] = [{"type": "text", "text": "c"}, {"type": "text", "text": "d"}]  # type: ignore[assignment]
        assert client.post(PATH, json={"messages": messages, "documents": ["x"]}).status_code == 200
        assert pair.batches == [["a\nb\ncd"]]
        without = client.post(PATH, json={"messages": messages})
        assert "--corpus INDEX" in without.json()["error"]["message"]


@pytest.mark.parametrize("declared", [True, False])
def test_a_body_that_is_too_large_is_refused_as_it_is_read(client: httpx.Client, declared: bool) -> None:
    """Chunked, nobody says how long it will be."""
    data = b'{"query": "' + b"a" * 600_000
    content: Any = data if declared else iter([data[place : place + 50_000] for place in range(0, len(data), 50_000)])
    response = client.post("/rerank", content=content, headers={"content-type": "application/json"})
    assert (response.status_code, response.json()["error"]["code"]) == (413, "body_too_large")
    assert client.get("/health").json()["status"] == "ok"


def test_only_names_of_this_machine_are_answered(client: httpx.Client) -> None:
    """A page from elsewhere whose name was led to loopback runs in the user's browser."""
    assert client.get("/health", headers={"host": "evil.example"}).status_code == 421
    assert client.get("/health", headers={"host": "LOCALHOST:1"}).status_code == 200


def test_what_it_offers_is_described_and_counted(client: httpx.Client) -> None:
    described = client.get("/openapi.json").json()
    assert {"/v1/rerank", "/v2/rerank", "/rerank", PATH, "/v1/models", "/health", "/metrics"} < set(described["paths"])
    assert "1/place" in json.dumps(described["components"]["schemas"]["RerankResult"])
    assert [client.get(path).status_code for path in ("/docs", "/redoc", "/nowhere")] == [404] * 3
    assert client.post("/health").status_code == 405
    lines = client.get("/metrics").text.splitlines()
    before = next(float(line.split()[1]) for line in lines if line.startswith("dro_rl_batch_questions_sum"))
    client.post("/rerank", json={"query": "q", "documents": DOCUMENTS})
    lines = client.get("/metrics").text.splitlines()
    assert f"dro_rl_batch_questions_sum {before + 1}" in lines
    assert any(line.startswith('dro_rl_requests_total{path="other",status="404"}') for line in lines)
    assert "nowhere" not in "".join(lines)


# Many of them, and slow ones ---------------------------------------------------------------------------------


def test_a_flood_is_refused_and_what_was_taken_is_answered() -> None:
    pair = Slow()
    with serving(pair, replace(LIMITS, waiting=3), batch_size=2) as (client, made), ThreadPoolExecutor(20) as pool:
        first = pool.submit(client.post, PATH, json=question("first"))
        assert pair.begun.acquire(timeout=30)
        waiting = []
        for number in range(3):
            waiting.append(pool.submit(client.post, PATH, json=question(f"waits {number}")))
            until(lambda n=number: made.batcher.waiting == n + 1)
        refused = [client.post(PATH, json=question("late")) for _ in range(10)]
        assert {(each.status_code, each.json()["error"]["code"]) for each in refused} == {(503, "queue_full")}
        assert all(int(each.headers["retry-after"]) >= 1 for each in refused)
        assert client.get("/health").json() == {"status": "ok", "model": "pair", "waiting": 3, "working": 1}
        pair.go.set()
        said = [each.result().json()["choices"][0]["message"]["content"] for each in (first, *waiting)]
    assert said == ["first", "waits 0", "waits 1", "waits 2"]
    assert pair.batches == [["first"], ["waits 0", "waits 1"], ["waits 2"]]


def test_an_address_that_asks_too_often_is_told_when_to_come_back() -> None:
    pair = Slow()
    pair.go.set()
    with serving(pair, replace(LIMITS, rate=0.01, burst=3)) as (client, _):
        responses = [client.post(PATH, json=question("q")) for _ in range(5)]
        assert [each.status_code for each in responses] == [200, 200, 200, 429, 429]
        assert 90 <= int(responses[3].headers["retry-after"]) <= 100
        assert responses[3].json()["error"]["type"] == "rate_limit_error"
        assert client.get("/health").status_code == 200


def test_a_bucket_fills_with_time_and_each_address_has_its_own() -> None:
    now = 0.0
    rate = Rate(2.0, 3, lambda: now)
    assert [rate.take("a") for _ in range(4)] == [0, 0, 0, 0.5]
    assert rate.take("b") == 0
    now = 0.5
    assert [rate.take("a"), rate.take("a")] == [0, 0.5]
    now = 100.0
    assert [rate.take("a") for _ in range(4)] == [0, 0, 0, 0.5]
    for number in range(5000):
        rate.take(str(number))
    assert len(rate._buckets) == 4096


@pytest.mark.parametrize(
    ("sent", "code"),
    [
        (b"", "head_too_slow"),
        (b"POST /rerank HTTP/1.1\r\nhost: localh", "head_too_slow"),
        (b"POST /rerank HTTP/1.1\r\nhost: localhost\r\ncontent-length: 99\r\n\r\n{", "body_too_slow"),
        (b"POST /rerank HTTP/1.1\r\nhost: localhost\r\ntransfer-encoding: chunked\r\n\r\n1\r\n{\r\n", "body_too_slow"),
    ],
)
def test_a_client_that_does_not_go_on_is_let_go(sent: bytes, code: str) -> None:
    limits = replace(LIMITS, header_seconds=0.2, body_seconds=0.2)
    with serving(Slow(), limits) as (client, _):
        with socket.create_connection((client.base_url.host, client.base_url.port or 0), timeout=30) as slow:
            slow.sendall(sent)
            said = b""
            while data := slow.recv(65536):
                said += data
        assert said.startswith(b"HTTP/1.1 408 ")
        assert json.loads(said.partition(b"\r\n\r\n")[2])["error"]["code"] == code
        assert client.get("/health").status_code == 200


def test_a_client_that_does_not_read_is_let_go() -> None:
    pair, limits = Slow(), replace(LIMITS, send_seconds=0.2, body=20_000_000, body_seconds=60.0)
    pair.go.set()
    with serving(pair, limits) as (client, made), socket.socket() as slow:
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        slow.connect((client.base_url.host, client.base_url.port))
        body = json.dumps(question("a" * 16_000_000)).encode()
        slow.sendall(head_of(body) + body)
        assert pair.begun.acquire(timeout=30)
        until(lambda: made.connections == 0)
        assert sum(map(len, iter(lambda: slow.recv(2**20), b""))) < 16_000_000


def test_more_connections_than_may_be_open_are_told_so() -> None:
    with serving(Slow(), replace(LIMITS, connections=2)) as (client, _):
        where = (client.base_url.host, client.base_url.port or 0)
        with socket.create_connection(where), socket.create_connection(where):
            time.sleep(0.1)
            with socket.create_connection(where, timeout=30) as third:
                said = b"".join(iter(lambda: third.recv(65536), b""))
        assert said.startswith(b"HTTP/1.1 503 ")
        assert json.loads(said.partition(b"\r\n\r\n")[2])["error"]["code"] == "too_many_connections"


def test_a_client_that_hangs_up_leaves_the_queue() -> None:
    pair = Slow()
    with serving(pair, batch_size=1) as (client, made), ThreadPoolExecutor(2) as pool:
        first = pool.submit(client.post, PATH, json=question("first"))
        assert pair.begun.acquire(timeout=30)
        with pytest.raises(httpx.ReadTimeout):
            client.post(PATH, json=question("impatient"), timeout=0.3)
        last = pool.submit(client.post, PATH, json=question("last"))
        until(lambda: made.batcher.waiting == 2)
        pair.go.set()
        assert first.result().status_code == last.result().status_code == 200
        assert '/completions",status="499"} 1.0' in client.get("/metrics").text
    assert pair.batches == [["first"], ["last"]]


def test_a_question_that_takes_too_long_is_given_up() -> None:
    pair = Slow()
    with serving(pair, replace(LIMITS, answer_seconds=0.2)) as (client, _):
        response = client.post(PATH, json=question("q"))
        assert (response.status_code, response.json()["error"]["code"]) == (504, "timeout")
        pair.go.set()


def test_one_bad_question_does_not_spoil_its_batch(client: httpx.Client, pair: Pair) -> None:
    good = Asked("home_of mira ?", (Document("1", "", "home_of mira oslo"),), True)
    bad = replace(good, question="home_of " * 300)
    hold, batcher = threading.Event(), Batcher(lambda batch: hold.wait(30) and pair.work(batch), 8, 8)
    batcher.start()
    futures = [batcher.submit(asked) for asked in (good, good, bad, good)]
    hold.set()
    assert futures[3].result(30) == futures[0].result(30)
    with pytest.raises(ValueError, match="max_prompt_length"):
        futures[2].result(30)
    batcher.stop()
    assert batcher.join(30)


# The stop ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("in_time", [True, False])
def test_a_stop_answers_what_it_can_and_refuses_the_rest_in_words(in_time: bool) -> None:
    pair = Slow()
    limits = replace(LIMITS, stop_seconds=30.0 if in_time else 0.3)
    with ThreadPoolExecutor(8) as pool, serving(pair, limits, batch_size=2) as (client, made):
        client.get("/health")  # a connection that is open, and idle
        asked = [pool.submit(client.post, PATH, json=question(str(number))) for number in range(6)]
        until(lambda: made.batcher.waiting + made.batcher.working == 6)
        late = socket.create_connection((client.base_url.host, client.base_url.port or 0), timeout=30)
        time.sleep(0.1)
        made.stop()
        until(lambda: made.batcher.stopping)
        body = json.dumps(question("late")).encode()
        head = (
            f"POST {PATH} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\ncontent-length: {len(body)}"
        )
        late.sendall(head.encode() + b"\r\n\r\n" + body)
        said = b"".join(iter(lambda: late.recv(65536), b""))
        assert said.startswith(b"HTTP/1.1 503 ")
        assert b'"stopping"' in said
        with pytest.raises(OSError, match="refused"):
            socket.create_connection((client.base_url.host, client.base_url.port or 0), timeout=30)
        if in_time:
            pair.go.set()
        responses = [each.result() for each in asked]
        pair.go.set()
    if in_time:
        assert sorted(each.json()["choices"][0]["message"]["content"] for each in responses) == list("012345")
    else:
        assert {(each.status_code, each.json()["error"]["code"]) for each in responses} == {(503, "stopping")}
        assert {each.headers["connection"] for each in responses} == {"close"}


# The command line --------------------------------------------------------------------------------------------


def test_a_port_in_use_is_said_before_anything_is_loaded(tmp_path: Path) -> None:
    with listen("127.0.0.1", 0) as taken:
        port = str(taken.getsockname()[1])
        done = CliRunner().invoke(app, ["serve", str(tmp_path), "--port", port])
    assert done.exit_code == 2
    assert done.stderr.startswith(f"error: --port: {port} (in use): ")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--host", "no.such.host.invalid"], "--host"),
        (["--host", "192.0.2.1"], "--host"),
        (["--host", "\x00"], "--host"),
        (["--port", "70000"], "--port"),
        (["--k", "0"], "--k"),
        (["--window-size", "1"], "--window-size"),
        (["--rate", "-1"], "--rate"),
        ([], "pipeline.json"),
    ],
)
def test_a_wrong_option_is_a_line(tmp_path: Path, options: list[str], said: str) -> None:
    done = CliRunner().invoke(app, ["serve", str(tmp_path), "--port", "0", *options])
    assert done.exit_code == 2
    assert said in done.stderr
    assert "Traceback" not in done.output


def test_more_candidates_than_passages_are_refused_before_models_load(pair: Pair) -> None:
    assert pair.index is not None
    run = pair.index.folder.parent / "toy"
    done = CliRunner().invoke(app, ["serve", str(run), "--port", "0", "--corpus", str(pair.index.folder)])
    assert done.exit_code == 2
    assert "k: 20: this is 1 to 8" in done.stderr


def test_without_the_extra_the_machine_lacks_something(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    done = CliRunner().invoke(app, ["serve", str(tmp_path)])
    assert done.exit_code == 3
    assert "pip install 'dro_rl[serve]'" in done.stderr


# Parts -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("numbers", "order", "scores"),
    [
        ((3, 1), [3, 1, 2, 4], [1, 0.5, 0, 0]),
        ((), [1, 2, 3, 4], [0, 0, 0, 0]),
        ((4, 3, 2, 1), [4, 3, 2, 1], [1, 1 / 2, 1 / 3, 1 / 4]),
    ],
)
def test_those_selected_come_first_and_the_others_keep_their_order(
    numbers: tuple[int, ...], order: list[int], scores: list[float]
) -> None:
    selection = Selection(numbers, bool(numbers))
    assert ranked(selection, 4) == order
    assert [score(selection, rank) for rank in range(1, 5)] == scores


def test_a_queue_that_stops_takes_nothing_more() -> None:
    batcher: Batcher[int, int] = Batcher(list, 2, 2)
    batcher.stop()
    with pytest.raises(Refusal) as refused:
        batcher.submit(1)
    assert (refused.value.status, refused.value.headers) == (503, {"Retry-After": "5"})
