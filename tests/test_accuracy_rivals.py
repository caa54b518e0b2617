"""The evaluator's rivals: what they lose, and what they cost."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

from quality.attention import rule_attention  # noqa: E402
from quality.eviction import HeavyHitters  # noqa: E402
from quality.methods import DENSE, Shape, build_methods  # noqa: E402
from quality.rivals import hadamard, kvarn, lloyd_max, turboquant  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_torch_thread")

SHAPE = Shape(head_size=64, num_kv_heads=2, num_layers=6)
METHODS = build_methods(SHAPE, torch.bfloat16)


def vectors(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(7))


def relative_error(x: torch.Tensor, cached: torch.Tensor) -> float:
    return ((cached - x.float()).square().mean() / x.float().square().mean()).item()


@pytest.mark.parametrize(("bits", "error"), [(1, 0.3634), (2, 0.1175), (3, 0.03454), (4, 0.009497)])
def test_lloyd_max_reaches_the_known_error(bits, error):
    """Max, "Quantizing for minimum distortion" (1960), table I."""
    levels = lloyd_max(bits).double()
    assert torch.allclose(levels, -levels.flip(0), atol=1e-4)
    x = torch.linspace(-6, 6, 100_001, dtype=torch.float64)
    weight = (-x.square() / 2).exp()
    nearest = (x.unsqueeze(1) - levels).abs().amin(1).square()
    assert (nearest * weight).sum() / weight.sum() == pytest.approx(error, rel=2e-3)


def test_hadamard_is_orthogonal_and_refuses_other_sizes():
    for size, entry in ((64, 0.125), (256, 0.0625)):
        basis = hadamard(size)
        assert (basis @ basis.T - torch.eye(size)).abs().max() < 1e-6
        assert basis.abs().max() == basis.abs().min() == entry
    with pytest.raises(ValueError, match="head_size=80: a Hadamard rotation needs a power of two"):
        hadamard(80)


@pytest.mark.parametrize(
    ("name", "low", "high"),
    [
        ("dense", 0, 0),
        ("fp8", 3e-4, 1e-3),
        ("int8-token-head", 1e-5, 1e-4),
        ("int4-token-head", 0.007, 0.012),
        ("int4-plain", 0.007, 0.012),
        ("turboquant-4", 0.008, 0.0105),
        ("turboquant-3", 0.030, 0.037),
        ("mustafar-50", 0.060, 0.080),
        ("mustafar-70", 0.20, 0.26),
        ("sparsekv-quality", 0.0075, 0.0095),
        ("sparsekv-capacity", 0.029, 0.034),
    ],
)
def test_relative_squared_error_on_normal_vectors(name, low, high):
    x = vectors(2, 500, 64).bfloat16()
    method = METHODS[name]
    for cached in (method.key(x, None), method.value(x)):
        assert low <= relative_error(x, cached) <= high


def test_think_keeps_the_channels_that_matter():
    key, query = vectors(2, 40, 64).abs() + 1, torch.ones(4, 40, 64)
    query[:, :, 1::2] = 0.01
    kept = METHODS["think-50"].key(key, query)
    assert torch.equal(kept[..., ::2], key[..., ::2])
    assert not kept[..., 1::2].any()


def assert_largest(x: torch.Tensor, kept: torch.Tensor, count: int, axis: int) -> None:
    """Along the axis ``count`` elements are as in x, none of the others, now 0, is larger."""
    survives = kept != 0
    assert torch.equal(kept[survives], x[survives])
    assert (survives.sum(axis) == count).all()
    least = kept.abs().masked_fill(~survives, torch.inf).amin(axis)
    assert (x.abs().masked_fill(survives, 0).amax(axis) <= least).all()


def test_policies_that_look_at_the_whole_text():
    """40 tokens are a group of 32 and one of 8; half of each channel of either survives."""
    x, query = vectors(2, 40, 64), torch.ones(4, 40, 64)
    query[:2, :, ::2] = 1e6
    kept = METHODS["output-aware-50"].key(x, query)
    even = torch.arange(64) % 2 == 0
    assert torch.equal(kept[0] != 0, even.expand(40, 64))
    assert_largest(x[1], kept[1], 32, -1)
    assert_largest(x, METHODS["output-aware-50"].value(x), 32, -1)
    kept = METHODS["per-channel-50"].value(x)
    assert_largest(x[:, :32], kept[:, :32], 16, 1)
    assert_largest(x[:, 32:], kept[:, 32:], 4, 1)
    assert METHODS["per-channel-50"].evaluation_only and not METHODS["mustafar-50"].evaluation_only


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("dense", 256),
        ("fp8", 128 + 64 * 264 / 4096),
        ("int8-token-head", 136 + 4.125),
        ("int4-token-head", 72 + 4.125),
        ("turboquant-4", 68 + 4.125),
        ("turboquant-3", 52 + 4.125),
        ("think-50", 192 + 32 * 264 / 4096),
        ("mustafar-50", 144 + 32 * 264 / 4096),
        ("output-aware-50", 144 + 32 * 264 / 4096),
        ("per-channel-50", 144 + 32 * 264 / 4096),
        ("turboquant_k8v4", (2 * (100 + 4.125) + 4 * 256) / 6),
        ("turboquant_4bit_nc", (2 * (70 + 4.125) + 4 * 256) / 6),
        ("turboquant_3bit_nc", (2 * (54 + 4.125) + 4 * 256) / 6),
        ("ultraquant_4bit", (2 * (68 + 4.125) + 4 * 256) / 6),
        ("nvfp4", 72 + 4.125),
        ("kvarn_k4v2_g128", 57 + 4.125 + 128 * (256 - 57) / 4096),
        ("2-of-4", 144 + 32 * 264 / 4096),
        ("sparsekv-30-50-int4", 8 + 24 + 2 + 8 + 16 + 2 + 70 * 264 / 4096),
        ("sparsekv-50-auto", 144 + 68 * 264 / 4096),
        ("sparsekv-sparse-50", 80 + 76 * 264 / 4096),
        ("sparsekv-quality", 68 + 128 * 136 / 4096),
        ("sparsekv-balanced", 60 + 112 * 136 / 4096),
        ("sparsekv-capacity", 52 + 144 * 136 / 4096),
    ],
)
def test_bytes_count_scales_bitmaps_and_the_window(name, size):
    assert METHODS[name].token_bytes(256, 4096) == pytest.approx(size)


FP4 = [0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.5, -1, -1.5, -2, -3, -4, -6, 0]
BETWEEN = [0.2, 0.6, 1.2, 1.7, 2.4, 3.4, 4.9, 6, -0.3, -0.8, -1.3, -2.4, -2.6, -3.6, -5.1, 0.1]
NEAREST = [0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.5, -1, -1.5, -2, -3, -4, -6, 0]


def test_nvfp4_scales_each_16_by_its_largest():
    """Scales are sixths of the largest in e4m3: 1 of 6, 0.5 of 3, 0.09375 of 0.57, at most 448."""
    exact = torch.tensor(FP4)
    x = torch.cat([exact, exact / 2, exact * 0.095, exact * 1000]).expand(1, 1, 64)
    expected = torch.cat([exact, exact / 2, exact * 0.09375, exact * 448])
    expected[-16:] = torch.tensor(
        [0, 448, 896, 1344, 1792, 2688, 2688, 2688, *(-448 * x for x in (1, 2, 3, 4, 6, 6, 6)), 0]
    )
    for cached in (METHODS["nvfp4"].key(x, None), METHODS["nvfp4"].value(x)):
        assert torch.equal(cached[0, 0], expected)
    nearest = METHODS["nvfp4"].value(torch.tensor(BETWEEN).repeat(4).expand(1, 1, 64))
    assert torch.equal(nearest[0, 0], torch.tensor(NEAREST).repeat(4))


def test_ultraquant_scales_each_32_by_a_power_of_two():
    """0.156 of the largest is 0.94 or 1.4, so 1, of 6 or 9; 0.0065 of 0.042, so 2 ** -7."""
    exact = torch.tensor(FP4).repeat(2)
    x = torch.cat([exact, exact * 2**-7]).expand(1, 1, 64)
    assert torch.equal(METHODS["ultraquant_4bit"].value(x), x)
    large = x.clone()
    large[..., 7] = 9
    expected = x.clone()
    expected[..., 7] = 6
    assert torch.equal(METHODS["ultraquant_4bit"].value(large), expected)
    basis = hadamard(64)
    cached = METHODS["ultraquant_4bit"].key(x @ basis.T, None)
    assert (cached @ basis - x).abs().max() < 1e-5


def test_norm_correction_keeps_lengths():
    x = vectors(2, 500, 64)
    cached = METHODS["turboquant_4bit_nc"].key(x, None)
    assert (cached.norm(dim=-1) / x.norm(dim=-1) - 1).abs().max() < 5e-4
    wide = vectors(1, 100, 1024)
    error = relative_error(wide, turboquant(wide, 4, unit=True))
    assert error == pytest.approx(2 - 2 * (1 - 0.009497) ** 0.5, rel=0.02)
    plain = METHODS["turboquant-4"].key(x, None)
    assert (plain.norm(dim=-1) / x.norm(dim=-1) - 1).abs().max() > 5e-3


@pytest.mark.parametrize(
    ("bits", "axis", "size", "squared_range"), [(4, -2, 512, 27.28), (2, -1, 64, 22.38)]
)
def test_kvarn_loses_what_integers_of_its_tiles_lose(bits, axis, size, squared_range):
    """A twelfth of a squared step but at both ends; the ranges are those of 128 and 64 normals."""
    x = vectors(2, 10 * 128 + 70, size)
    cached = kvarn(x, bits, axis)
    assert torch.equal(cached[:, :128], x[:, :128])
    assert torch.equal(cached[:, 1280:], x[:, 1280:])
    count = 128 if axis == -2 else size
    error = squared_range / (2**bits - 1) ** 2 / 12 * (1 - 2 / count)
    assert relative_error(x[:, 128:1280], cached[:, 128:1280]) == pytest.approx(error, rel=0.03)


def test_kvarn_does_not_see_how_large_tokens_are():
    x = vectors(2, 384, 64)
    size = 2.0 ** vectors(384, 1).abs().mul(3).round()
    method = METHODS["kvarn_k4v2_g128"]
    for read in (lambda y: method.key(y, None), method.value):
        scaled = read(x * size) / size
        assert relative_error(x, scaled) == pytest.approx(relative_error(x, read(x)), rel=0.1)


def test_kvarn_survives_large_means():
    """Channels far from 0 make each scaling undo the other; the loss is that of their spread."""
    x = vectors(2, 384, 64) + 8 * vectors(64)
    cached = kvarn(x, 4, -2)[:, 128:256]
    error = (cached - x[:, 128:256]).square().mean().item()
    assert error == pytest.approx(27.28 / 15**2 / 12, rel=0.2)


def test_two_of_four_neighbours_survive():
    x = vectors(2, 40, 64)
    kept = METHODS["2-of-4"].key(x, None)
    assert_largest(x.unflatten(-1, (16, 4)), kept.unflatten(-1, (16, 4)), 2, -1)
    assert torch.equal(METHODS["2-of-4"].value(x), kept)
    # The two largest of four normals hold 0.8675 of their squares.
    assert relative_error(x, kept) == pytest.approx(0.1325, rel=0.05)


def test_heavy_hitters_and_the_newest_tokens_stay():
    query, key = (vectors(n, 20, 8) for n in (4, 2))
    gone = HeavyHitters(recent=0.2, heavy=0.3).gone(query, key, scale=0.5)
    for head in range(2):
        there, received = [], {}
        for step in range(20):
            there.append(step)
            assert (~gone[head, step, : step + 1]).nonzero().flatten().tolist() == there
            for q in query[2 * head : 2 * head + 2, step]:
                p = torch.stack([q @ key[head, j] * 0.5 for j in there]).softmax(0)
                for j, share in zip(there, p.tolist(), strict=True):
                    received[j] = received.get(j, 0) + share
            if len(there) > 10:
                there.remove(min(there[:-4], key=received.__getitem__))
    assert not gone[:, :, -1].any() and not gone.triu(1).any()


def test_what_left_is_neither_read_nor_counted():
    query, (key, value) = vectors(4, 20, 8), vectors(2, 2, 20, 8)
    eviction = HeavyHitters(recent=0.2, heavy=0.3)
    method = replace(DENSE, eviction=eviction, vector_bytes=32)
    out = rule_attention(query, key, value, method, torch.float32, 0.5)
    gone = eviction.gone(query, key, 0.5)
    seen = ~gone & torch.ones(20, 20).tril().bool()
    repeated = (x.repeat_interleave(2, 0) for x in (key, value))
    exact = scaled_dot_product_attention(
        query, *repeated, attn_mask=seen.repeat_interleave(2, 0), scale=0.5
    )
    torch.testing.assert_close(out, exact)
    assert (out - rule_attention(query, key, value, DENSE, torch.float32, 0.5)).abs().max() > 0.01
    assert method.token_bytes(32, 4096) == 16
    assert method.codec(SHAPE, torch.bfloat16) != DENSE.codec(SHAPE, torch.bfloat16)


def test_edge_layers_stay_dense():
    x = vectors(2, 40, 64)
    layers = METHODS["turboquant_3bit_nc"].layers
    lost = [relative_error(x, layer.key(x, None)) for layer in layers]
    assert lost[0] == lost[1] == lost[4] == lost[5] == 0
    assert lost[2] == lost[3] == pytest.approx(0.0345, rel=0.1)
    few = build_methods(Shape(64, 2, 3), torch.bfloat16)["turboquant_3bit_nc"]
    assert [layer.window for layer in few.layers] == [0, 64, 0]


def test_codec_of_a_method_is_that_of_what_it_does():
    same = build_methods(SHAPE, torch.bfloat16)
    codecs = {name: method.codec(SHAPE, torch.bfloat16) for name, method in METHODS.items()}
    assert codecs == {name: method.codec(SHAPE, torch.bfloat16) for name, method in same.items()}
    assert all(len(bytes.fromhex(codec)) == 4 for codec in codecs.values())
    assert len(set(codecs.values())) == len(codecs)
    method = METHODS["sparsekv-balanced"]

    def worse(key: torch.Tensor, query: torch.Tensor) -> torch.Tensor:
        return method.key(key, query) * 1.001

    changed = (
        replace(method, key=worse),
        replace(method, value=METHODS["sparsekv-quality"].value),
        replace(method, vector_bytes=61),
        replace(method, layers=(method, replace(method, key=worse))),
    )
    for other in changed:
        assert other.codec(SHAPE, torch.bfloat16) != codecs["sparsekv-balanced"]
