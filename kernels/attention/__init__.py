"""Paged attention over pruned history, the dense window and the step's own tokens."""
