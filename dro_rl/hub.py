"""A hub that is out of reach is asked once, for seconds: its client would try again for most of a minute, each time."""

from __future__ import annotations

import logging
from typing import Literal

import httpx
from huggingface_hub import HfApi, constants

logger = logging.getLogger(__name__)

SECONDS = 5


def look_up(kind: Literal["model", "dataset"], name: str, revision: str | None = None) -> None:
    """Ask the hub for a name. Where it is out of reach, libraries look into its cache from then on and nowhere else.

    What the hub answers is for the library to say that asks it next.
    """
    if constants.HF_HUB_OFFLINE:
        return
    ask = HfApi().model_info if kind == "model" else HfApi().dataset_info
    try:
        ask(name, revision=revision, timeout=SECONDS)
    except (httpx.TransportError, ConnectionError) as error:
        logger.warning(f"no hub within {SECONDS} s ({error}): {name} is looked up in its cache")
        constants.HF_HUB_OFFLINE = True
    except (httpx.HTTPError, OSError, ValueError):
        pass
