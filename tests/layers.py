"""Layers and batches of whole steps, from cases of ``histories.py``."""

from __future__ import annotations

import torch
from helpers import Case, CaseSpec

from vllm_sparsekv.format.basis import Basis, LayerBasis
from vllm_sparsekv.kernels import api


def layer_of(spec: CaseSpec, calibrated: bool, device: str = "cpu") -> api.Layer:
    """In the model's own basis, or in one with means and readers."""
    basis = Basis.of(spec.format, device)
    if calibrated:
        generator = torch.Generator().manual_seed(3)
        shape = (2, spec.num_kv_heads, spec.head_size, spec.head_size)
        turned = torch.linalg.qr(torch.randn(shape, generator=generator)).Q
        means = torch.randn(shape[:-1], generator=generator)
        if spec.sinks or spec.soft_cap:
            means.zero_()
        readers = torch.randn(means.shape, generator=generator).exp()
        scaled = turned * torch.logspace(-0.5, 0.5, spec.head_size)
        layer = LayerBasis(*scaled, *means, *readers)
        basis = Basis.calibrated(spec.format, layer, device)
    return api.Layer(spec.format, basis, 0.1, spec.sliding_window, spec.soft_cap)


def batch_of(case: Case) -> api.Batch:
    return api.Batch(
        case.query_start_loc,
        case.seq_lens,
        case.block_table,
        case.slot_mapping,
        case.window_block_table,
    )
