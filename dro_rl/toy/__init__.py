"""The toy world and the tiny models that read it: no network, no GPU."""
