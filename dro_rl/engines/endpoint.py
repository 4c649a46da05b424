"""A frozen generator behind an HTTP endpoint in OpenAI's style: `/models` and `/completions`, prompts as token ids.

Answers are written by a plain completion. Their likelihood is read off a completion that echoes its prompt with
log-probabilities (`echo`, `logprobs`), where the endpoint gives them: vLLM does.
"""

from __future__ import annotations

import logging
import math
import os
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import httpx
import torch
from torch import Tensor

from dro_rl.config import DROConfig
from dro_rl.engines.answers import Written
from dro_rl.engines.requests import Item, Result, at_once
from dro_rl.errors import InputError, Phrase, did_you_mean
from dro_rl.likelihood.packing import Row
from dro_rl.prompts import Prompter
from dro_rl.proposal import SamplingParams
from dro_rl.selection.thinking import without_thinking

logger = logging.getLogger(__name__)

KEY = "DRO_RL_ENDPOINT_KEY"
"""Environment variable with the key that the endpoint asks for. It is written nowhere."""
PLACE = "generator_endpoint"
PASSING = frozenset({408, 409, 425, 429, 500, 502, 503, 504})
"""Statuses that pass: the endpoint is starting, has too much to do, or stumbled."""
FIRST_PAUSE, LONGEST_PAUSE = 1.0, 30.0
"""Seconds between two attempts: each pause is twice the one before, up to the longest."""
GO_ON = "Bring it back, and give the same command with --resume_from_checkpoint auto."
PLAIN = {"top_p": 1.0, "top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0}
"""Said in each request, so that defaults of the server's own have no part in what is drawn."""
LOOPBACK = frozenset({"localhost", "127.0.0.1", "::1"})


@dataclass(frozen=True, slots=True)
class EndpointSettings:
    """Where a generator is served, and how patiently it is asked.

    Args:
        url: the address of the API, `http://127.0.0.1:8001/v1`.
        model: its name there; None for the only one.
        timeout: seconds to go on asking an endpoint that is away.
        request_timeout: seconds that it may take over one request.
        concurrency: requests of this process in flight at once.
    """

    url: str
    model: str | None = None
    timeout: float = 240.0
    request_timeout: float = 120.0
    concurrency: int = 32

    @classmethod
    def of(cls, config: DROConfig) -> EndpointSettings | None:
        """The recipe's; None where the generator's weights are here."""
        if config.generator_endpoint is None:
            return None
        return cls(
            config.generator_endpoint,
            config.generator_endpoint_model,
            config.generator_endpoint_timeout,
            config.generator_endpoint_request_timeout,
            config.generator_endpoint_concurrency,
        )


class Endpoint:
    """The HTTP side: requests with retries, several at once."""

    def __init__(self, settings: EndpointSettings) -> None:
        self.settings, self.url = settings, settings.url.rstrip("/")
        self._key = os.environ.get(KEY, "").strip()
        self._client = httpx.Client(
            base_url=self.url,
            timeout=httpx.Timeout(settings.request_timeout, connect=min(10.0, settings.request_timeout), pool=None),
            limits=httpx.Limits(max_connections=settings.concurrency),
            headers={"Authorization": f"Bearer {self._key}"} if self._key else None,
            trust_env=urlsplit(self.url).hostname not in LOOPBACK,  # a proxy is on the way to the internet alone
        )
        self._stopped = threading.Event()

    def call(self, method: str, path: str, body: dict[str, Any] | None = None, fix: str = GO_ON) -> Any:
        """What it answers, read as JSON: asked again, after longer and longer pauses, while it is away.

        Raises:
            InputError: it was away for `timeout` seconds, or answers that it cannot.
        """
        deadline, pause, said = time.monotonic() + self.settings.timeout, FIRST_PAUSE, False
        while True:
            try:
                answer = self._client.request(method, path, json=body)
            except httpx.RequestError as error:
                problem = str(error) or type(error).__name__
            else:
                if answer.status_code not in PASSING:
                    return self._read(answer, path)
                problem = f"status {answer.status_code}: {self._text(answer)}"
            if time.monotonic() + pause > deadline or self._stopped.is_set():
                raise InputError(
                    PLACE,
                    Phrase(f"{self.url}: no answer for {self.settings.timeout:g} s ({problem})"),
                    "an endpoint in OpenAI's style answers there",
                    fix,
                )
            if not said:
                logger.warning(f"{self.url}: {problem}; asking again, for {self.settings.timeout:g} s at most")
                said = True
            self._stopped.wait(pause)
            pause = min(2 * pause, LONGEST_PAUSE)

    def _read(self, answer: httpx.Response, path: str) -> Any:
        if answer.status_code in (401, 403):
            raise InputError(
                PLACE,
                Phrase(f"{self.url} answered {answer.status_code}: {self._text(answer)}"),
                "the endpoint takes the key that it is given",
                f"Set {KEY} in the environment, never in a recipe.",
            )
        if answer.status_code != 200:
            raise Unable(
                PLACE,
                Phrase(f"{self.url}{path} answered {answer.status_code}: {self._text(answer)}"),
                "the endpoint does what OpenAI's does",
                "Check its address, which ends in /v1 as a rule, and its log.",
            )
        try:
            return answer.json()
        except ValueError:
            raise self.unlike(path, self._text(answer)) from None

    def _text(self, answer: httpx.Response) -> str:
        """The beginning of what was answered, less the key, which some repeat."""
        text = answer.text[:300]
        return text.replace(self._key, "…") if self._key else text

    def unlike(self, path: str, found: object) -> InputError:
        """The error for an answer of another shape."""
        return InputError(
            PLACE, Phrase(f"{self.url}{path} answered {found}"), "it answers as OpenAI's does", "Check the address."
        )

    def models(self) -> list[dict[str, Any]]:
        """The models that it serves. Waits for one that is not up."""
        match self.call("GET", "/models", fix="Start it, or correct the address."):
            case {"data": [*models]} if models and all(isinstance(each, dict) and "id" in each for each in models):
                return models
            case other:
                raise self.unlike("/models", other)

    def complete(self, body: dict[str, Any]) -> dict[str, Any]:
        """The one choice of a completion."""
        match self.call("POST", "/completions", body):
            case {"choices": [{"text": str()} as choice, *_]}:
                return choice
            case other:
                raise self.unlike("/completions", other)

    def each(self, ask: Callable[[Item], Result], items: Sequence[Item]) -> list[Result]:
        """`ask` of each, several at once, in order. The first error ends the others' retries."""
        self._stopped.clear()
        return at_once(ask, items, self.settings.concurrency, self._stopped.set)


class Unable(InputError):
    """The endpoint refuses a request: what it cannot do, or how it was asked."""


class EndpointAnswerer:
    """The generator behind an endpoint; see `Answerer`.

    The same prompt and seed give the same answer as far as the server promises that.

    Args:
        settings: where it is.
        prompter: its prompts, with the tokenizer of what is served.
        needs_likelihoods: whether log-probabilities are needed; where they are not, and the endpoint has none, they are
            NaN.
    """

    def __init__(self, settings: EndpointSettings, prompter: Prompter, *, needs_likelihoods: bool = False) -> None:
        self.endpoint, self._prompter, self._needs = Endpoint(settings), prompter, needs_likelihoods
        self._served: dict[str, Any] | None = None
        self._scores: bool | None = None

    @property
    def served(self) -> dict[str, Any]:
        """What the endpoint says of the model. Raises `InputError` where it does not serve it."""
        if self._served is None:
            wanted, models = self.endpoint.settings.model, self.endpoint.models()
            names = [str(each["id"]) for each in models]
            if wanted not in names and (wanted is not None or len(names) > 1):
                raise InputError(
                    f"{PLACE}_model",
                    wanted,
                    f"{self.endpoint.url} serves {', '.join(names)}",
                    did_you_mean(wanted or "", names, "Name one of them."),
                )
            self._served = models[0 if wanted is None else names.index(wanted)]
        return self._served

    def check(self, row: Row) -> None:
        """Have it write and score once, and refuse what would not carry a run.

        Args:
            row: a prompt with an accepted answer.

        Raises:
            InputError: it is away, does not serve the model, reads other tokens, or has no log-probabilities where
                they are needed.
        """
        self.score([row])
        self.write([row.prompt], SamplingParams(1, temperature=0.0), [0])

    def positions(self) -> tuple[int | None, str]:
        """See `Answerer.positions`: what vLLM says of the model; others say nothing."""
        length = self.served.get("max_model_len")
        what = f"tokens (max_model_len at {self.endpoint.url}, less the one that an echo writes)"
        return (length - 1 if isinstance(length, int) else None), what

    def forget(self) -> None:
        """It is frozen."""

    def close(self) -> None:
        """It leaves nothing."""

    def write(self, prompts: Sequence[Sequence[int]], sampling: SamplingParams, seeds: Sequence[int]) -> list[Written]:
        """See `Answerer.write`."""

        def ask(place: int) -> Written:
            body = {
                **PLAIN,
                "model": self.served["id"],
                "prompt": list(prompts[place]),
                "max_tokens": sampling.max_completion_length,
                "temperature": sampling.temperature,
                "seed": seeds[place] % 2**31,
            }
            choice = self.endpoint.complete({**body, "logprobs": 1} if self._scores else body)
            logps = _numbers(choice, "token_logprobs")
            return Written(without_thinking(choice["text"]).strip(), sum(logps) if logps else math.nan)

        if self._scores is None and prompts:
            self._try(Row(prompts[0], [(self._prompter.eos_token_id,)]))
        return self.endpoint.each(ask, range(len(prompts)))

    def score(self, rows: Sequence[Row]) -> list[list[Tensor]]:
        """See `Answerer.score`. NaN where the endpoint has no log-probabilities and nothing needs them."""
        if self._scores is None and rows:
            self._try(rows[0])
        pairs = [(row.prompt, completion) for row in rows for completion in row.completions]
        if self._scores:
            scored = iter(self.endpoint.each(lambda pair: self._logps(*pair), pairs))
        else:
            scored = (torch.full((len(completion),), math.nan) for _, completion in pairs)
        return [[next(scored) for _ in row.completions] for row in rows]

    def _try(self, row: Row) -> None:
        """Find out whether the endpoint has log-probabilities of a prompt, and whether it reads our tokens."""
        _ = self.served  # an address or a model that is wrong is not what an echo is refused for
        try:
            choice = self._echoed(row.prompt, row.completions[0])
        except Unable as error:
            self._scores = self._without(str(error.value))
            return
        if len(_numbers(choice, "token_logprobs")) < 2:
            self._scores = self._without("an echo without log-probabilities of the prompt")
            return
        self._logps_of(choice, row.prompt, row.completions[0])
        self._check_tokens(choice, [*row.prompt, *row.completions[0]])
        self._scores = True

    def _without(self, found: str) -> bool:
        if self._needs:
            raise InputError(
                PLACE,
                Phrase(f"{self.endpoint.url}: {found}"),
                "the likelihood of an answer is read off /completions with echo and logprobs",
                "Serve the generator by vLLM, or use a reward without likelihood, such as f1.",
            )
        logger.warning(f"{self.endpoint.url} has no log-probabilities of a prompt: answer_logp is not known")
        return False

    def _echoed(self, prompt: Sequence[int], completion: Sequence[int]) -> dict[str, Any]:
        """Prompt and completion read, and one token more, since not every server takes none for none."""
        ids = [*prompt, *completion]
        asked = {"model": self.served["id"], "prompt": ids, "max_tokens": 1, "temperature": 0.0}
        return self.endpoint.complete({**asked, "echo": True, "logprobs": 1})

    def _logps(self, prompt: Sequence[int], completion: Sequence[int]) -> Tensor:
        return self._logps_of(self._echoed(prompt, completion), prompt, completion)

    def _logps_of(self, choice: dict[str, Any], prompt: Sequence[int], completion: Sequence[int]) -> Tensor:
        """(tokens of the completion,) log-probabilities, off an echo."""
        values, whole = _numbers(choice, "token_logprobs"), len(prompt) + len(completion)
        if len(values) not in (whole, whole + 1):
            raise self._other_tokens(f"it read {len(values) - 1} tokens where {whole} were sent")
        logps = torch.tensor(values[len(prompt) : whole], dtype=torch.float32)
        if logps.isnan().any():
            raise self.endpoint.unlike("/completions", "no log-probability of some tokens")
        return logps

    def _check_tokens(self, choice: dict[str, Any], ids: Sequence[int]) -> None:
        """Refuse a vocabulary in which an id is another word. What is not plain text on both sides passes."""
        tokenizer = self._prompter.tokenizer
        special = set(tokenizer.all_special_ids)
        for given, token in zip((choice.get("logprobs") or {}).get("tokens") or [], ids, strict=False):
            here, there = str(tokenizer.decode([token])).strip(), str(given).strip()
            plain = all(text and text.isascii() and text.isprintable() for text in (here, there))
            if token in special or not plain or there.startswith(("token_id:", "bytes:")):
                continue
            if here != there:
                raise self._other_tokens(f"token {token} is {there!r} there and {here!r} here")

    def _other_tokens(self, found: str) -> InputError:
        return InputError(
            "generator_model_name_or_path",
            Phrase(f"{self.endpoint.url}: {found}"),
            "this names the tokenizer of the model that the endpoint serves",
            "Name that model, or serve another.",
        )


def _numbers(choice: dict[str, Any], name: str) -> list[float]:
    """A list of a choice's `logprobs`, NaN for what is no number; empty where there is none."""
    found = (choice.get("logprobs") or {}).get(name)
    values = found if isinstance(found, list) else []
    return [float(value) if isinstance(value, int | float) else math.nan for value in values]
