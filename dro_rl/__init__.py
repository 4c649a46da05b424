"""Direct retrieval-augmented optimization: a selector and a generator trained together."""

import os

# TRL and the hub client report usage unless told not to. Nothing here reports anything; set it to 0 to allow theirs.
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

__version__ = "0.1.0"
