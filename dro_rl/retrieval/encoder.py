"""An encoder of sentence-transformers: its files, which are checked before anything is loaded, and texts to vectors."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dro_rl.errors import InputError, LackError, Phrase, first_line, is_out_of_memory
from dro_rl.files import file_sha256

READ = (".json", ".txt", ".model", ".safetensors")
"""How the files end that an encoder is made of."""


def check_encoder(folder: Path) -> None:
    """Refuse what is no encoder as sentence-transformers saves it, and what would be unpickled or run."""
    place = f"checkpoint: {folder}"
    try:
        modules = json.loads((folder / "modules.json").read_text(encoding="utf-8"))
        types, folders = [str(each["type"]) for each in modules], [str(each["path"]) for each in modules]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise InputError(
            place,
            Phrase("no modules.json" if isinstance(error, OSError) else f"modules.json: {first_line(error)}"),
            "an encoder is a folder as sentence-transformers saves it",
            "Name one, such as intfloat/e5-base-v2, or save it anew with SentenceTransformer.save_pretrained.",
        ) from None
    if foreign := [each for each in types if not each.startswith("sentence_transformers.")]:
        raise InputError(place, Phrase(foreign[0]), "code that comes with an encoder is not run", "Name another.")
    for path in (folder / each for each in folders):
        if any(path.glob("*.bin")) and not any(path.glob("*.safetensors")):
            raise InputError(
                place,
                Phrase(f"{next(path.glob('*.bin')).name} without safetensors"),
                "weights are not unpickled",
                "Save it anew with SentenceTransformer.save_pretrained, or name another.",
            )


def encoder_sha256(folder: Path) -> str:
    """Hash of the files that an encoder is made of, with their names: weights, tokenizer, pooling, prompts."""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        if path.suffix in READ and path.is_file() and not {"onnx", "openvino"} & {*name.parts}:
            digest.update(f"{name.as_posix()} {file_sha256(path)}\n".encode())
    return digest.hexdigest()


class Encoder:
    """An encoder, loaded.

    Args:
        folder: its files, which `check_encoder` has seen.
        query_prompt, passage_prompt: put before each text; None: its own.
        similarity: cosine or dot; None: its own. For cosine, vectors are made of length one.
        on_gpu: on torch's current GPU.
        half: compute in float16.

    Raises:
        InputError: its files cannot be loaded, or its own similarity is neither.

    Attributes:
        dimension: of its vectors.
        device: where it computes, by torch's name.
    """

    def __init__(
        self,
        folder: Path,
        query_prompt: str | None,
        passage_prompt: str | None,
        similarity: str | None,
        *,
        on_gpu: bool,
        half: bool,
    ) -> None:
        import torch
        from sentence_transformers import SentenceTransformer
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()  # loading is brief
        self.device = f"cuda:{torch.cuda.current_device()}" if on_gpu else "cpu"
        try:
            self._model: Any = SentenceTransformer(
                str(folder),
                device=self.device,
                local_files_only=True,
                trust_remote_code=False,
                model_kwargs={"use_safetensors": True, "dtype": torch.float16 if half else torch.float32},
            )
        except Exception as error:
            # Its parts are loaded by several libraries, each with errors of its own.
            raise InputError(
                f"checkpoint: {folder}",
                Phrase(first_line(error)),
                "sentence-transformers loads it",
                "Save it anew, or name another.",
            ) from None
        self.similarity = similarity or str(self._model.similarity_fn_name)
        if self.similarity not in ("cosine", "dot"):
            raise InputError(
                f"checkpoint: {folder}",
                self.similarity,
                "vectors are compared by cosine or dot",
                "Name another encoder.",
            )
        self.query_prompt = self._prompt(query_prompt, "query")
        self.passage_prompt = self._prompt(passage_prompt, "document", "passage", "corpus")
        self.dimension = int(self.queries(["?"], 1).shape[1])

    def _prompt(self, given: str | None, *names: str) -> str:
        """Its own prompt is the first of these names that says something, unless one is given."""
        own = next(filter(None, map(self._model.prompts.get, names)), "")
        return str(own) if given is None else given

    def facts(self) -> dict[str, Any]:
        """How texts become vectors."""
        longest = self._model.max_seq_length
        return {
            "dimension": self.dimension,
            "similarity": self.similarity,
            "query_prompt": self.query_prompt,
            "passage_prompt": self.passage_prompt,
            "max_tokens": longest if isinstance(longest, int) else None,  # a table of words has no longest
        }

    def queries(self, texts: Sequence[str], batch_size: int) -> np.ndarray:
        """(n, dimension) in float32."""
        return self._vectors(self._model.encode_query, texts, self.query_prompt, batch_size)

    def passages(self, texts: Sequence[str], batch_size: int) -> np.ndarray:
        """(n, dimension) in float32."""
        return self._vectors(self._model.encode_document, texts, self.passage_prompt, batch_size)

    def _vectors(self, encode: Any, texts: Sequence[str], prompt: str, batch_size: int) -> np.ndarray:
        try:
            found = encode(
                list(texts),
                prompt=prompt,
                batch_size=batch_size,
                normalize_embeddings=self.similarity == "cosine",
                convert_to_numpy=True,
                show_progress_bar=False,
            )
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            raise LackError(
                "batch_size",
                batch_size,
                f"so many texts at once need more memory than {self.device} has",
                "Use a smaller --batch-size: the same command goes on where it stopped.",
            ) from None
        return np.asarray(found, dtype=np.float32)
