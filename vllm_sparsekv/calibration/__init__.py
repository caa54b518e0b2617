"""Calibration: from what a model computes to the basis its cache is stored in."""
