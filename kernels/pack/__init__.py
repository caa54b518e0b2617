"""Prune key and value vectors and pack them into pages, and the way back."""
