"""What the cache holds: byte layout, codecs, and the basis vectors are stored in; no vLLM."""
