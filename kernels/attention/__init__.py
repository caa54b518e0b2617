"""Paged attention over pruned history, the window and the step's own tokens."""
