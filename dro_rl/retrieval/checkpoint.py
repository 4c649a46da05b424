"""Where an encoder's files are: in a folder, or fetched from a hub."""

from __future__ import annotations

from pathlib import Path

from dro_rl.errors import InputError, first_line
from dro_rl.hub import look_up


def checkpoint_folder(name: str, what: str, revision: str | None = None) -> Path:
    """The folder of a checkpoint; one of the hub is fetched: configuration, tokenizer, and weights as safetensors.

    Args:
        name: a folder, or a hub name.
        what: what it is a checkpoint of: `a ColBERT checkpoint`.
        revision: a commit, a tag or a branch of the hub's.

    Raises:
        InputError: it is neither, or the hub has no such name or is out of reach.
    """
    path = Path(name).expanduser()
    if name and path.is_dir():
        return path.absolute()
    if not name or path.is_absolute() or name.startswith(".") or name.count("/") != 1:
        raise InputError("checkpoint", name, f"this is {what}: a folder or hub name", "Name one.")
    from huggingface_hub import snapshot_download

    look_up("model", name, revision)
    try:
        return Path(
            snapshot_download(
                name,
                revision=revision,
                allow_patterns=["*.json", "*.txt", "*.model", "*.safetensors", "*.metadata"],
                ignore_patterns=["onnx/*", "openvino/*"],
            )
        )
    except Exception as error:
        # Between us and the hub stand several libraries with errors of their own; all mean that it is not to be had.
        raise InputError(
            "checkpoint",
            name,
            f"this is a folder, or a hub name within reach ({first_line(error)})",
            "Check the name and the network, or name a folder.",
        ) from None
