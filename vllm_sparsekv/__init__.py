"""vllm_sparsekv: a vLLM attention backend whose KV cache is pruned, bitmap-indexed pages."""

__version__ = "0.1.0"
