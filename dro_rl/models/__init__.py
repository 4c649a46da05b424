"""Both language models: one module that trains, loading, saving, sharding. Tensors and files, not rollouts."""
