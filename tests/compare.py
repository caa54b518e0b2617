"""What attention and bytes should be against what they are."""

from __future__ import annotations

import torch
from helpers import REFERENCE, Case, Ops


def attention_error(case: Case, ops: Ops = REFERENCE) -> float:
    """Largest |out - expected|; NaN where anything poisoned leaked."""
    error = (case.attend(ops).double().cpu() - case.expected).abs()
    return error.max().item() if error.numel() else 0.0


def assert_attention(
    case: Case, ops: Ops = REFERENCE, slack: float = 3e-6, rounds_weights: bool = False
) -> None:
    """Every element within half a unit in the last place of ``out``, plus ``slack``.

    The default slack is what float32 arithmetic needs on these cases; a kernel that multiplies in
    a narrower type needs more. One that rounds the softmax's weights to the dtype may be off by
    what such roundings add up to at most, and in the root mean square by what two roundings make.
    """
    eps = torch.finfo(case.spec.dtype).eps
    error = (case.attend(ops).double().cpu() - case.expected).abs()
    excess = error - eps / 2 * case.expected.abs()
    if rounds_weights:
        excess -= eps / 2 * case.magnitudes
        rounded = case.expected.to(case.spec.dtype).double() - case.expected
        assert error.square().mean() <= 4 * rounded.square().mean() + slack**2, case.spec
    wrong = (~(excess <= slack)).nonzero()
    assert not len(wrong), (
        f"{case.spec}: {len(wrong)} of {error.numel()} elements off, "
        f"by at most {excess.max():.3g}, first (token, head, element) {wrong[0].tolist()}"
    )


def assert_same_bytes(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal bit for bit, NaNs included."""
    assert actual.shape == expected.shape and actual.dtype == expected.dtype
    actual, expected = (t.cpu().contiguous().view(torch.uint8) for t in (actual, expected))
    wrong = (actual != expected).nonzero()
    assert not len(wrong), (
        f"{len(wrong)} of {actual.numel()} bytes differ, first at {wrong[0].tolist()}"
    )
