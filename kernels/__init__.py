"""Kernels on sparse pages; installed as ``vllm_sparsekv.kernels`` and never imports vLLM.

One folder per operation, one file per implementation, all with the signature of its
``reference.py``; :mod:`vllm_sparsekv.kernels.api` validates and dispatches.
"""

if __name__ == "kernels":
    raise ImportError("this folder is the package vllm_sparsekv.kernels, import it by that name")
