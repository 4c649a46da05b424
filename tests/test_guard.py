"""Claims about the key between trainer and vLLM servers: its owner's alone, and asked for by every path but health."""

from __future__ import annotations

import asyncio
import stat
from pathlib import Path
from typing import Any

import httpx
import pytest
from training_world import world

from dro_rl.engines.guard import KEY, KEY_FILE, Guard, server_key
from dro_rl.engines.serve import server_command
from dro_rl.engines.vllm_server import Server, servers_of
from dro_rl.errors import InputError
from dro_rl.recipe import load_recipe


@pytest.fixture(autouse=True)
def no_key_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(KEY)


# The key ----------------------------------------------------------------------------------------------------


def test_a_key_is_made_once_at_random_for_its_owner_alone(tmp_path: Path) -> None:
    key = server_key(tmp_path / "new" / "key")
    assert server_key(tmp_path / "new" / "key") == key
    assert stat.S_IMODE((tmp_path / "new" / "key").stat().st_mode) == 0o600
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["key"]
    assert server_key(tmp_path / "other") != key
    assert len(key) >= 32


def test_the_environment_goes_before_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(KEY, "given by hand, for two machines")
    assert server_key(tmp_path / "key") == "given by hand, for two machines"
    assert not (tmp_path / "key").exists()


@pytest.mark.parametrize(
    ("content", "mode", "said"),
    [
        ("k" * 40, 0o644, "others may read it"),
        ("", 0o600, "0 characters"),
        ("short", 0o600, "5 characters"),
        ("k" * 20 + "\x1b" + "k" * 20, 0o600, "characters"),
        ("é" * 40, 0o600, "ascii"),
    ],
)
def test_a_file_that_is_no_secret_is_refused(tmp_path: Path, content: str, mode: int, said: str) -> None:
    (tmp_path / "key").write_text(content)
    (tmp_path / "key").chmod(mode)
    with pytest.raises(InputError, match=said) as error:
        server_key(tmp_path / "key")
    assert error.value.place == "vllm_server_key_file"
    assert "k" * 20 not in str(error.value)


def test_a_key_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=f"set {KEY} for trainer and server"):
        server_key(tmp_path / "file" / "key")


# The guard --------------------------------------------------------------------------------------------------


async def _app(scope: Any, receive: Any, send: Any) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"done"})


@pytest.fixture
def guarded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Guard:
    monkeypatch.setenv(KEY_FILE, str(tmp_path / "key"))
    return Guard(_app)


def status(guard: Guard, url: str, method: str = "POST", **headers: str) -> int:
    async def ask() -> int:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(guard)) as client:
            return (await client.request(method, url, headers=headers)).status_code

    return asyncio.run(ask())


PATHS = ("/collective_rpc", "/v1/completions", "/reset_prefix_cache", "/server_info", "/sleep", "//health", "/health/x")


@pytest.mark.parametrize("path", PATHS)
def test_every_call_needs_the_key(guarded: Guard, tmp_path: Path, path: str) -> None:
    """vLLM's own covers /v1 alone."""
    key, url = server_key(tmp_path / "key"), f"http://server{path}"
    assert status(guarded, url) == 401
    assert status(guarded, url, authorization="Bearer " + "k" * 43) == 401
    assert status(guarded, url, authorization=key) == 401
    assert status(guarded, url, authorization="Basic no") == 401
    assert status(guarded, url, authorization=f"Bearer {key}") == 200


def test_the_key_may_be_the_password_of_an_address(guarded: Guard, tmp_path: Path) -> None:
    """As TRL's client has to give it."""
    assert status(guarded, f"http://dro_rl:{server_key(tmp_path / 'key')}@server/v1/models", "GET") == 200
    assert status(guarded, "http://dro_rl:another@server/v1/models", "GET") == 401


@pytest.mark.parametrize("origin", ["https://example.org", "null", "http://localhost:8000"])
@pytest.mark.parametrize("method", ["POST", "OPTIONS", "GET"])
def test_a_page_in_a_browser_is_refused_whatever_it_knows(
    guarded: Guard, tmp_path: Path, method: str, origin: str
) -> None:
    bearer = f"Bearer {server_key(tmp_path / 'key')}"
    assert status(guarded, "http://server/collective_rpc", method, origin=origin, authorization=bearer) == 403
    assert status(guarded, "http://server/health", method, origin=origin) == 403


def test_health_needs_no_key(guarded: Guard) -> None:
    """It is asked by whoever waits, and says nothing."""
    assert status(guarded, "http://server/health", "GET") == 200


def test_a_socket_without_the_key_is_closed(guarded: Guard) -> None:
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    asyncio.run(guarded({"type": "websocket", "path": "/v1/realtime", "headers": []}, None, send))  # type: ignore[arg-type]
    assert [message["type"] for message in sent] == ["websocket.close"]


# Both ends --------------------------------------------------------------------------------------------------


def test_trainer_and_server_find_one_key_by_the_recipe_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And it is in nothing that is printed, or that a list of processes shows."""
    monkeypatch.setattr("dro_rl.engines.serve.check_installed", lambda *a: None)
    recipe = load_recipe(world(tmp_path, vllm_mode="server", vllm_server_key_file=str(tmp_path / "key")))
    command = server_command(recipe)
    monkeypatch.setenv(KEY_FILE, command.environment[KEY_FILE])
    (server,) = servers_of(recipe.training)
    guard = Guard(_app)
    assert status(guard, f"{server.url}/collective_rpc", **server._client.headers) == 200
    assert server.key not in " ".join([*command.arguments, *command.environment.values()])
    assert command.arguments[command.arguments.index("--middleware") + 1] == f"{Guard.__module__}.Guard"


def test_another_key_is_one_line_that_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    server = Server("http://127.0.0.1:1", 1, 1, "mine")
    answers = httpx.MockTransport(lambda request: httpx.Response(401))
    monkeypatch.setattr(server, "_client", httpx.Client(base_url=server.url, transport=answers))
    for ask in (server.settings, lambda: server.call("POST", "/collective_rpc")):
        with pytest.raises(InputError, match=f"127.0.0.1:1 asks for another key.*set {KEY} for both") as error:
            ask()
        assert error.value.place == "vllm_server_key_file"
