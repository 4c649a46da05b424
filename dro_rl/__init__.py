"""Direct retrieval-augmented optimization: a selector and a generator trained together."""

__version__ = "0.1.0"
