"""The model: Block AttnRes Qwen3, its reads, and the way from a path to verified weights."""
