"""A model walked module by module over the hidden states of all rows; this room knows nothing of quantization."""
