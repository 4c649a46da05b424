"""vLLM as servers of their own, over HTTP: health, requests with retries, new weights.

A server is plain vLLM (`dro-rl serve-rollouts` starts one with the flags that it needs). The trainer's side needs no
vLLM, except to send weights over NCCL.
"""

from __future__ import annotations

import logging
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
from accelerate import PartialState
from accelerate.utils import broadcast_object_list

from dro_rl.config import DROConfig
from dro_rl.engines.guard import KEY, KEY_PLACE, server_key
from dro_rl.engines.protocol import GenerationRequest
from dro_rl.engines.requests import at_once
from dro_rl.engines.vllm_adapters import Adapters
from dro_rl.engines.vllm_common import LOGITS_PROCESSOR, constrained, request_options
from dro_rl.errors import InputError, Phrase
from dro_rl.proposal import Completion, SamplingParams

logger = logging.getLogger(__name__)

ATTEMPTS = 3
"""How often one question's rollouts are asked for before a server counts as away."""
CONCURRENCY = 64
"""Questions in flight at once, over all servers."""
RESETS = 5
"""How often a server is asked to forget its prefixes: it does not while a request holds them."""
PAUSE = 1.0
"""Seconds between two looks at a server that is not up, or holds its prefixes."""
COMPLETIONS = "/v1/completions"
LOAD, UNLOAD = "/v1/load_lora_adapter", "/v1/unload_lora_adapter"
LORA_ROUTES = "VLLM_ALLOW_RUNTIME_LORA_UPDATING"
"""What is 1 in the environment of a server that takes adapters while it runs."""
START = "Start it (`dro-rl serve-rollouts RECIPE`), and give the same command with --resume_from_checkpoint auto."


class Server:
    """One vLLM server.

    Args:
        url: where it is, without a closing slash.
        timeout: seconds to wait for one that is not up.
        request_timeout: seconds that it may take over one request.
        key: what it asks for; see `guard`.
    """

    def __init__(self, url: str, timeout: float, request_timeout: float, key: str = "") -> None:
        self.url, self.timeout, self.request_timeout, self.key = url, timeout, request_timeout, key
        # A server of rollouts is on this machine or on its network: a proxy for the internet is not on the way.
        self._client = httpx.Client(
            base_url=url,
            timeout=httpx.Timeout(request_timeout, connect=min(10.0, timeout), pool=None),
            limits=httpx.Limits(max_connections=None),
            headers={"Authorization": f"Bearer {key}"} if key else None,
            trust_env=False,
        )

    def wait(self) -> None:
        """Return when the server is up. Raises `InputError` after `timeout` seconds."""
        deadline = time.monotonic() + self.timeout
        said = False
        while (problem := self.problem()) is not None:
            if time.monotonic() + PAUSE > deadline:
                raise self.away(f"no answer for {self.timeout:g} s ({problem})")
            if not said:
                logger.info(f"waiting for the vLLM server at {self.url}, {self.timeout:g} s at most ({problem})")
                said = True
            time.sleep(PAUSE)

    def problem(self) -> str | None:
        """Why the server is not up; None when it is."""
        try:
            answer = self._client.get("/health", timeout=min(10.0, self.timeout))
        except httpx.TransportError as error:
            return str(error) or type(error).__name__
        return None if answer.status_code == 200 else f"it answered with status {answer.status_code}"

    def away(self, problem: str) -> InputError:
        """The error that ends a run whose server does not answer."""
        return InputError(
            "vllm_server_base_url", Phrase(f"{self.url}, {problem}"), "a vLLM server answers there", START
        )

    def call(self, method: str, path: str, **body: Any) -> Any:
        """One request, once.

        Returns:
            What the server answered, read as JSON; None for nothing.

        Raises:
            httpx.TransportError: it could not be reached, was too slow, or its engine has died.
            InputError: it answered that it could not.
        """
        answer = self._client.request(method, path, **body)
        # What stands before a server says that it is away, or the server says so of its engine: a request that is wrong
        # has another status. Adapters that it has no longer are not there since it was started again.
        gone = answer.status_code == 404 and "model" in body.get("json", {})
        if answer.status_code in (502, 503, 504) or (path == COMPLETIONS and (answer.status_code == 500 or gone)):
            raise httpx.RemoteProtocolError(f"status {answer.status_code}: {answer.text[:300]}")
        if answer.status_code == 401:
            raise InputError(
                KEY_PLACE,
                Phrase(f"{self.url} asks for another key"),
                "trainer and server have one key",
                f"Copy the key's file from where the server runs, or set {KEY} for both.",
            )
        if answer.status_code != 200:
            raise InputError(
                "vllm_server_base_url",
                Phrase(f"{self.url}{path.partition('?')[0]} answered {answer.status_code}: {answer.text[:300]}"),
                "the server does what rollouts need",
                "Read its log. `dro-rl serve-rollouts RECIPE` starts one with the flags that it needs.",
            )
        return answer.json() if answer.content and path not in (LOAD, UNLOAD) else None  # these say it in words

    def settings(self) -> dict[str, Any]:
        """The server's own configuration, which it tells in development mode alone.

        Raises:
            InputError: it is not in that mode, which taking new weights needs too.
        """
        try:
            return self.call("GET", "/server_info?config_format=json")["vllm_config"]
        except InputError as error:
            if error.place == KEY_PLACE:
                raise
            raise InputError(
                "vllm_server_base_url",
                self.url,
                "a server takes new weights only in development mode",
                "Start it with VLLM_SERVER_DEV_MODE=1, as `dro-rl serve-rollouts RECIPE` does.",
            ) from None
        except httpx.TransportError as error:
            raise self.away(str(error) or type(error).__name__) from None

    def check(self, config: DROConfig, adapters: Adapters | None = None) -> str:
        """Wait for the server, and refuse one whose settings would make rollouts wrong or fail.

        Args:
            adapters: what it is sent, unless that is whole weights.

        Returns:
            Its instance: another each time that it is started.
        """
        self.wait()
        settings = self.settings()
        model, scheduler = settings["model_config"], settings["scheduler_config"]
        if "processed_logprobs" not in str(model["logprobs_mode"]):
            raise self._refused(
                f"--logprobs-mode {model['logprobs_mode']}",
                "log q is that of the distribution that tokens are drawn from",
                "--logprobs-mode processed_logprobs",
            )
        if config.constrain_selection and LOGITS_PROCESSOR not in (model["logits_processors"] or []):
            raise self._refused(
                "no constraint",
                "constrain_selection is kept where tokens are drawn",
                f"--logits-processors {LOGITS_PROCESSOR}",
            )
        needed = (config.max_prompt_length or 0) + config.max_completion_length
        if model["max_model_len"] < needed:
            raise self._refused(
                f"--max-model-len {model['max_model_len']}",
                f"max_prompt_length and max_completion_length are {needed} tokens together",
                f"--max-model-len {needed}",
            )
        if settings["device_config"]["device"] == "cpu" and scheduler["enable_chunked_prefill"]:
            raise self._refused(
                "chunked prefill on a CPU",
                "vLLM fails there on a prompt that it splits, when the request has a seed",
                "--no-enable-chunked-prefill",
            )
        self._check_lora(settings, adapters)
        return str(settings["instance_id"])

    def _check_lora(self, settings: dict[str, Any], adapters: Adapters | None) -> None:
        """A server that was started for adapters has a base that nobody replaces: those of later runs go over it."""
        lora, model = settings["lora_config"], settings["model_config"]
        if lora is None:
            if adapters is not None and adapters.required:
                flags = f"--enable-lora --max-lora-rank {adapters.max_rank} and {LORA_ROUTES}=1"
                raise self._refused("no LoRA", "adapters are sent alone to a server that takes them", flags)
            return
        if adapters is None:
            raise InputError(
                "vllm_server_base_url",
                Phrase(f"{self.url} runs with --enable-lora"),
                "whole weights would take the place of the base that adapters go over there, and no adapters are sent",
                "Start it without.",
            )
        if not adapters.trained_over(model["model"], model["revision"]):
            raise InputError(
                "vllm_server_base_url",
                Phrase(f"{self.url} holds {model['model']}, revision {model['revision'] or 'main'}"),
                f"adapters are of their base, {adapters.base}"
                + (f", revision {adapters.revision}" if adapters.revision else ""),
                "Start it with that model (`dro-rl serve-rollouts RECIPE`), or without --enable-lora.",
            )
        if lora["max_lora_rank"] < adapters.rank:
            raise self._refused(
                f"--max-lora-rank {lora['max_lora_rank']}",
                f"the adapters' rank is {adapters.rank}",
                f"--max-lora-rank {adapters.max_rank}",
            )
        try:
            answer = self._client.post(LOAD, json={"lora_name": "", "lora_path": ""})
        except httpx.TransportError as error:
            raise self.away(str(error) or type(error).__name__) from None
        if answer.status_code == 404:  # where there is such a call, it asks for a name
            raise self._refused(
                "--enable-lora and no call to load adapters", "they are loaded while it runs", f"{LORA_ROUTES}=1"
            )

    def _refused(self, found: str, rule: str, flag: str) -> InputError:
        return InputError(
            "vllm_server_base_url", Phrase(f"{self.url} runs with {found}"), rule, f"Start it with {flag}."
        )

    def unload(self, folder: Path) -> None:
        """Have it forget adapters, where it still has them."""
        with suppress(InputError, httpx.TransportError):
            self.call("POST", UNLOAD, json={"lora_name": adapter_name(folder)})

    def _has(self, folder: Path) -> bool:
        return adapter_name(folder) in [each["id"] for each in self.call("GET", "/v1/models")["data"]]

    def load(self, folder: Path, *, alone: bool = False) -> None:
        """Make the server read new weights, and forget the prefixes that the old ones computed.

        Args:
            alone: they are adapters over its base. Each push has a name of its own, by which it keeps prefixes apart.

        Raises:
            httpx.TransportError: it went away.
            InputError: it could not read them, or did not forget.
        """
        whole = {"method": "reload_weights", "kwargs": {"weights_path": str(folder)}}
        adapters = {"lora_name": adapter_name(folder), "lora_path": str(folder)}
        try:
            if alone:
                self.call("POST", LOAD, json=adapters)
                return
            self.call("POST", "/collective_rpc", json=whole)
        except InputError as error:
            if alone and self._has(folder):  # by another of its addresses, or before a request that took too long
                return
            if self.problem() is not None:  # its engine has died, whatever the folder holds
                raise httpx.RemoteProtocolError(str(error.value)) from None
            raise InputError(
                "vllm_weights_dir",
                str(folder),
                f"the server reads the selector's weights there ({error.value})",
                "Name a folder that the trainer and all servers see under the same path, and start the server again.",
            ) from None
        for _ in range(RESETS):
            answer = self.call("POST", "/reset_prefix_cache")
            if answer is None or answer["success"]:  # early releases say nothing
                return
            time.sleep(PAUSE)
        raise InputError(
            "vllm_server_base_url",
            Phrase(f"{self.url} keeps its prefix cache"),
            "a server forgets what older weights computed, which it cannot while requests of others run",
            "Leave it to one training, and give the same command with --resume_from_checkpoint auto.",
        )


Publish = Callable[[Sequence[Server]], Path | None]
"""Brings the weights of the moment to the servers; see `ServerEngine`."""


class ServerEngine:
    """Samples with one or more vLLM servers, which share the questions.

    The same prompt, seed and weights give the same completions up to rounding: what else is in a batch can change a
    log-probability in its last digits, and seldom a token. A server that goes away and comes back in time is given the
    weights again, and asked again; one that was started again since the last push is pushed to.

    Args:
        config: the settings under `vllm_*`.
        ends: the token that ends a completion, or several of which each does.
        publish: brings the selector's weights of the moment to all servers, from all processes together. Returns the
            folder they can be read from again, None where there is none.
        adapters: what it brings, unless that is whole weights.
    """

    def __init__(
        self, config: DROConfig, ends: int | Sequence[int], publish: Publish, adapters: Adapters | None = None
    ) -> None:
        self.servers = servers_of(config)
        self._adapters = adapters
        self._config, self._ends, self._publish = config, ends, publish
        self._instances: list[str] = []
        self._pushed: int | None = None
        self._weights: Path | None = None
        self._returns = [_Returns() for _ in self.servers]

    @contextmanager
    def at(self, step: int) -> Iterator[ServerEngine]:
        """The engine with the weights that the selector has after `step` updates. All processes call it together."""
        for returns in self._returns:
            returns.lost = None
        instances = self._check()
        if self._pushed != step or instances != self._instances:
            self._weights = self._publish(self.servers)
            self._pushed, self._instances = step, instances
        yield self

    def _check(self) -> list[str]:
        """The servers' instances. One that was started again has the weights, and the flags, that it started with."""
        found: list[Any] = [None]
        if PartialState().is_main_process:
            found[0] = [server.check(self._config, self._adapters) for server in self.servers]
        return broadcast_object_list(found)[0]

    def forget(self) -> None:
        """The trainer's weights have been replaced: push before the next sample, whatever the step."""
        self._pushed = None

    def close(self) -> None:
        """Remove the folder that the servers read weights from. The next push writes another."""
        if self._weights is not None:
            if self._adapters is not None and PartialState().is_main_process:
                unload_everywhere(self.servers, self._weights)
            shutil.rmtree(self._weights, ignore_errors=True)
            with suppress(OSError):  # other things are in them, or another process was first
                self._weights.parent.rmdir()
                self._weights.parent.parent.rmdir()
        self._weights = self._pushed = None

    def samples_policy(self, sampling: SamplingParams) -> bool:
        """See `RolloutEngine.samples_policy`: another implementation computed log q, so the ratio is always taken."""
        return False

    def generate(self, request: GenerationRequest) -> list[list[Completion]]:
        """See `RolloutEngine.generate`. A question is a request; questions go to the servers in turn."""
        prompts, constraints = request.prompts, request.constraints
        model: dict[str, Any] = {}
        if self._adapters is not None and self._weights is not None:
            model["model"] = adapter_name(self._weights)

        def ask(i: int) -> list[Completion]:
            options = request_options(request, request.seeds[i], self._ends)
            if constraints is not None:
                options["vllm_xargs"] = constrained(constraints[i])
            # Each process begins with another server: one may have a single question.
            place = (i + self._config.process_index) % len(self.servers)
            asked = {"prompt": list(prompts[i]), "return_tokens_as_token_ids": True, **model, **options}
            return self._ask(place, asked)

        return at_once(ask, range(len(prompts)), CONCURRENCY)

    def _ask(self, place: int, request: dict[str, Any]) -> list[Completion]:
        server, returns = self.servers[place], self._returns[place]
        for _ in range(ATTEMPTS):
            seen = returns.count
            try:
                choices = server.call("POST", COMPLETIONS, json=request)["choices"]
                break
            except httpx.TransportError as error:
                problem = str(error) or type(error).__name__
            self._bring_back(server, returns, seen, problem)
        else:
            raise server.away(f"{ATTEMPTS} requests failed, the last with: {problem}")
        return [
            Completion(
                tuple(int(token.removeprefix("token_id:")) for token in choice["logprobs"]["tokens"]),
                tuple(choice["logprobs"]["token_logprobs"]),
            )
            for choice in sorted(choices, key=lambda choice: choice["index"])
        ]

    def _bring_back(self, server: Server, returns: _Returns, seen: int, problem: str) -> None:
        """Wait for a server that went away, once for all requests that it left, and give it the weights again."""
        with returns.lock:
            if returns.lost is not None:
                raise returns.lost
            if returns.count > seen:
                return
            logger.warning(f"the vLLM server at {server.url} went away ({problem})")
            try:
                if self._weights is None:
                    raise server.away(f"{problem}, and weights that came over NCCL cannot be given again")
                server.check(self._config, self._adapters)
                server.load(self._weights, alone=self._adapters is not None)
            except httpx.TransportError as error:
                returns.lost = server.away(str(error) or type(error).__name__)
                raise returns.lost from None
            except InputError as error:
                returns.lost = error
                raise
            returns.count += 1


class _Returns:
    """How often a server came back, and the error to end with when it did not."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.count = 0
        self.lost: InputError | None = None


def servers_of(config: DROConfig) -> list[Server]:
    """A recipe's servers, in its order."""
    key = server_key(config.vllm_server_key_file)
    return [Server(url, config.vllm_server_timeout, config.vllm_request_timeout, key) for url in config.vllm_servers]


def check_servers(config: DROConfig, adapters: Adapters | None = None) -> None:
    """Wait for all servers, and refuse settings that would make rollouts wrong or fail. Raises `InputError`."""
    for server in servers_of(config):
        server.check(config, adapters)


def taken_by_servers(config: DROConfig, adapters: Adapters) -> Adapters | None:
    """The adapters, to be sent alone from here on, where all servers were started for them; else None. All processes
    call together, after `check_servers`."""
    found: list[Any] = [None]
    if PartialState().is_main_process:
        found[0] = all(server.settings()["lora_config"] is not None for server in servers_of(config))
        if not found[0]:
            logger.info("vLLM is sent merged weights each time, not adapters alone: not all servers have --enable-lora")
    return replace(adapters, required=True) if broadcast_object_list(found)[0] else None


def adapter_name(folder: Path) -> str:
    """What servers call the adapters of a push: no other push of any run has the name."""
    return f"{folder.parent.name}-{folder.name}"


def unload_everywhere(servers: Sequence[Server], folder: Path) -> None:
    """Have all servers forget the adapters of an older push."""
    for server in servers:
        server.unload(folder)


def load_everywhere(servers: Sequence[Server], folder: Path, *, alone: bool = False) -> None:
    """Make all servers read new weights, at once; see `Server.load`.

    Raises:
        InputError: one is away, or could not read them.
    """

    def load(server: Server) -> None:
        server.wait()
        try:
            server.load(folder, alone=alone)
        except httpx.TransportError as error:
            raise server.away(f"while it read new weights: {str(error) or type(error).__name__}") from None

    with ThreadPoolExecutor(len(servers)) as pool:
        list(pool.map(load, servers))
