"""The model: depth plan, families of sources, Block AttnRes Qwen3, and loading."""
