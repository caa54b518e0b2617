"""Kernels on sparse pages; installed as ``vllm_sparsekv.kernels`` and never imports vLLM.

One folder per operation, one file per implementation, all with the signature of its
``reference.py``; :mod:`vllm_sparsekv.kernels.api` validates and dispatches.

With the repository root on ``sys.path`` this folder can be found under the name ``kernels``, which
belongs to a Hugging Face package that transformers probes on import. It has no ``__version__``,
so that transformers treats it as not installed; raising here would break ``import transformers``.
"""
