"""The operations on sparse pages, as the attention backend calls them."""

from vllm_sparsekv.kernels.attention.reference import sparse_attention
from vllm_sparsekv.kernels.pack.reference import pack
from vllm_sparsekv.kernels.window.reference import write_window

__all__ = ["pack", "sparse_attention", "write_window"]
