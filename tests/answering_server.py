"""A server in OpenAI's style for tests: `/v1/models` and `/v1/completions` over a model at hand, with ways to fail."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from dro_rl.engines.decoding import Decoder
from dro_rl.engines.protocol import GenerationRequest
from dro_rl.likelihood import completion_logps
from dro_rl.proposal import SamplingParams


class AnsweringServer:
    """What it serves, and how it behaves.

    Args:
        folder: the model's.
        name: the model's name in the API.
    """

    def __init__(self, folder: Path, name: str = "tiny") -> None:
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.names, self.length = [name], 0
        self.key = ""
        """What it asks for; it repeats a wrong one, as some do."""
        self.echo = "all"
        """`all` log-probabilities of a prompt, those of what was `written` alone, or it is `refused`."""
        self.spells: dict[int, str] = {}
        """Tokens that are other words here."""
        self.begins = False
        """Puts a token before each prompt."""
        self.failing = 0
        """How many of the next requests are answered with 503; below 0, all."""
        self.good = -1
        """How many completions are answered before all fail; below 0, all of them are."""
        self.requests: list[dict[str, Any]] = []
        self.url = ""
        self._lock = threading.Lock()

    def answer(self, path: str, key: str, body: dict[str, Any] | None) -> tuple[int, Any]:
        with self._lock:
            if self.failing:
                self.failing -= 1
                return 503, {"error": "loading"}
            if self.key and key != f"Bearer {self.key}":
                return 401, {"error": f"Incorrect API key provided: {key.removeprefix('Bearer ')}"}
            if path == "/v1/models":
                extra = {"max_model_len": self.length} if self.length else {}
                return 200, {"object": "list", "data": [{"id": name, **extra} for name in self.names]}
            if path != "/v1/completions":
                return 404, {"detail": "Not Found"}
            if self.good == 0:
                return 503, {"error": "gone"}
            self.good -= 1
            assert body is not None
            self.requests.append(body)
            if body["model"] not in self.names:
                return 404, {"error": "no such model"}
            return self._complete(body)

    @torch.no_grad()
    def _complete(self, body: dict[str, Any]) -> tuple[int, Any]:
        prompt = [1] * self.begins + body["prompt"]
        if body.get("echo") and self.echo == "refused":
            return 400, {"error": "Only no echo is supported"}
        sampling = SamplingParams(body["max_tokens"], body["temperature"])
        request = GenerationRequest([prompt], 1, sampling, [body.get("seed", 0)])
        ((written,),) = Decoder(self.model, self.tokenizer.eos_token_id).generate(request)
        ids, logps = list(written.ids), list(written.logps)
        if body.get("echo") and self.echo == "all":
            known = completion_logps(self.model, prompt[:1], [prompt[1:]])[0].tolist()
            ids, logps = [*prompt, *ids], [None, *known, *logps]
        text = self.tokenizer.decode(ids, skip_special_tokens=True)
        choice: dict[str, Any] = {"index": 0, "text": text, "finish_reason": "stop", "logprobs": None}
        if "logprobs" in body:
            words = [self.spells.get(token, self.tokenizer.decode([token])) for token in ids]
            choice["logprobs"] = {"tokens": words, "token_logprobs": logps}
        return 200, {"object": "text_completion", "choices": [choice]}


@contextmanager
def served(folder: Path, name: str = "tiny") -> Iterator[AnsweringServer]:
    """The server at work on a free port of loopback."""
    behaviour = AnsweringServer(folder, name)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self._answer(None)

        def do_POST(self) -> None:
            self._answer(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

        def _answer(self, body: dict[str, Any] | None) -> None:
            status, said = behaviour.answer(self.path, self.headers.get("Authorization", ""), body)
            data = json.dumps(said).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *arguments: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    behaviour.url = f"http://127.0.0.1:{server.server_address[1]}/v1"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield behaviour
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
