"""The vLLM side: the only folder that imports vLLM, and of it only :mod:`compat`."""
