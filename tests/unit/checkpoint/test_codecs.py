"""FP4 and FP8 codecs: every code and scale against the formats' definitions, and exact round trips."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from fullweight.checkpoint import fp4, fp8, native
from fullweight.core.errors import CheckpointError
from fullweight.ops.native import find_compiler

from .formats import E2M1, dequantised, e2m1, e4m3

SHAPES = [(1, 2), (3, 32), (5, 34), (128, 128), (130, 262), (257, 96), (2, 1030)]
DECODERS = ["torch", pytest.param("compiled", marks=pytest.mark.skipif(not find_compiler(), reason="no compiler"))]


@pytest.fixture(params=DECODERS)
def decoder(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setenv(native.VARIABLE, request.param)
    native.decoder_name.cache_clear()
    yield request.param
    native.decoder_name.cache_clear()


def draw_fp4(rows: int, columns: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    packed = torch.randint(-128, 128, (rows, columns // 2), dtype=torch.int8, generator=generator)
    scales = torch.randint(0, 252, (rows, -(-columns // 32)), dtype=torch.uint8, generator=generator)
    return packed, scales.view(torch.float8_e8m0fnu)


def draw_fp8(rows: int, columns: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 256, (rows, columns), dtype=torch.uint8, generator=generator)
    codes[(codes & 0x7F) == 0x7F] = 5
    blocks = (-(-rows // 128), -(-columns // 128))
    scales = torch.randint(20, 240, blocks, dtype=torch.uint8, generator=generator)
    return codes.view(torch.float8_e4m3fn), scales.view(torch.float8_e8m0fnu)


def bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(torch.uint8)


# ---- decoding ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_fp4_decodes_to_its_definition(decoder: str, shape: tuple[int, int], dtype: torch.dtype) -> None:
    """Both decoders give every value exactly, in fp32 and bf16, signs of zero included."""
    packed, scales = draw_fp4(*shape)
    out = torch.full(shape, 9.0, dtype=dtype)
    fp4.decode(packed, scales, out)
    expected = dequantised(packed, scales)
    assert torch.equal(out.double(), expected)
    assert torch.equal(torch.signbit(out), torch.signbit(expected))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_fp8_decodes_to_its_definition(decoder: str, shape: tuple[int, int], dtype: torch.dtype) -> None:
    """Blocks at ragged edges included; bf16 holds every value under a power of two."""
    codes, scales = draw_fp8(*shape)
    out = torch.full(shape, 9.0, dtype=dtype)
    fp8.decode(codes, scales, out)
    expected = dequantised(codes, scales)
    assert torch.equal(out.double(), expected)
    assert torch.equal(torch.signbit(out), torch.signbit(expected))


def test_every_fp8_code_under_every_scale(decoder: str) -> None:
    """256 codes x 255 scales: values in fp32's range are exact, subnormals too, and the code NaN stays NaN."""
    codes = torch.arange(256, dtype=torch.uint8).repeat(128, 1).view(torch.float8_e4m3fn)
    exact = torch.tensor([e4m3(c) for c in range(256)], dtype=torch.float64)
    for byte in range(247):  # 448 * 2^119 is the last below fp32's largest
        scales = torch.full((1, 2), byte, dtype=torch.uint8).view(torch.float8_e8m0fnu)
        for dtype in (torch.float32, torch.bfloat16):
            out = torch.empty(128, 256, dtype=dtype)
            fp8.decode(codes, scales, out)
            found, expected = out[77].double(), exact * 2.0 ** (byte - 127)
            nan = torch.tensor([c & 0x7F == 0x7F for c in range(256)])
            assert out[:, nan].isnan().all()
            # below 2^-133 bf16 and below 2^-149 fp32 have no values; rounding there is to the nearest
            assert torch.equal(found[~nan], expected[~nan].to(torch.float32).to(dtype).double()), byte


def test_every_fp4_byte_under_every_scale(decoder: str) -> None:
    """256 bytes x 252 scales against the definition."""
    packed = torch.arange(256, dtype=torch.uint8).view(torch.int8).repeat(253, 1)
    scales = torch.arange(253, dtype=torch.uint8).unsqueeze(1).repeat(1, 16).view(torch.float8_e8m0fnu)
    values = torch.tensor([[e2m1(b & 15), e2m1(b >> 4)] for b in range(256)], dtype=torch.float64).flatten()
    expected = values * torch.exp2(torch.arange(253, dtype=torch.float64) - 127).unsqueeze(1)
    for dtype in (torch.float32, torch.bfloat16):
        out = torch.empty(253, 512, dtype=dtype)
        fp4.decode(packed, scales, out)
        assert torch.equal(out.double(), expected)


def test_decoding_some_rows_or_into_a_part_of_a_row(decoder: str) -> None:
    """A rank's rows begin anywhere in a block, and its target may be part of a wider tensor."""
    codes, scales = draw_fp8(400, 200)
    wide = torch.zeros(300, 333)
    fp8.decode(codes[150:390], scales[1:], wide[7:247, 11:211], first_row=150 % 128)
    assert torch.equal(wide[7:247, 11:211].double(), dequantised(codes, scales)[150:390])
    assert not wide[:, :11].any()
    assert not wide[:, 211:].any()
    packed, small = draw_fp4(400, 200)
    wide = torch.zeros(300, 333, dtype=torch.bfloat16)
    fp4.decode(packed[150:390], small[150:390], wide[7:247, 11:211])
    assert torch.equal(wide[7:247, 11:211].double(), dequantised(packed, small)[150:390])
    assert not wide[:, 211:].any()


def test_fp8_under_fp32_scales(decoder: str) -> None:
    """The Base releases' scales: the product is rounded once, to fp32, then to bf16 where that is asked."""
    codes, _ = draw_fp8(200, 300)
    scales = torch.rand(2, 3, generator=torch.Generator().manual_seed(1)) + 1e-3
    expected = dequantised(codes, scales).to(torch.float32)
    for dtype in (torch.float32, torch.bfloat16):
        out = torch.empty(200, 300, dtype=dtype)
        fp8.decode(codes, scales, out)
        assert torch.equal(out, expected.to(dtype))


# ---- encoding ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_fp4_returns_byte_for_byte(shape: tuple[int, int], dtype: torch.dtype) -> None:
    """Under the source's scales every byte comes back, whatever the blocks hold."""
    packed, scales = draw_fp4(*shape)
    packed[0, :16] = 0
    packed[-1, -16:] = -120  # 0x88: minus zeros
    values = torch.empty(shape, dtype=dtype)
    fp4.decode(packed, scales, values)
    found = fp4.encode(values, scales)
    assert torch.equal(found.codes, packed)
    assert torch.equal(bits(found.scales), bits(scales))
    assert (found.reused_blocks, found.rule_blocks, found.max_error) == (scales.numel(), 0, 0.0)


@pytest.mark.parametrize("scale_dtype", ["F8_E8M0", "F32"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_fp8_returns_byte_for_byte(shape: tuple[int, int], dtype: torch.dtype, scale_dtype: str) -> None:
    """Also under fp32 scales, whose values are rounded in either dtype."""
    codes, scales = draw_fp8(*shape)
    if scale_dtype == "F32":
        scales = torch.rand(scales.shape, generator=torch.Generator().manual_seed(1)) * 1e-2
    values = torch.empty(shape, dtype=dtype)
    fp8.decode(codes, scales, values)
    found = fp8.encode(values, scales, dtype=scale_dtype)
    assert torch.equal(bits(found.codes), bits(codes))
    assert torch.equal(bits(found.scales), bits(scales))
    assert (found.reused_blocks, found.rule_blocks, found.max_error) == (scales.numel(), 0, 0.0)


def nearest(value: float, grid: list[float]) -> int:
    """Index of the nearest grid value; of two, the even one."""
    distances = [abs(abs(value) - g) for g in grid]
    best = min(distances)
    return min((i for i, d in enumerate(distances) if d == best), key=lambda i: i % 2)


def test_fp4_rounds_to_nearest_even_under_the_rule() -> None:
    """Scale 2^ceil(log2(amax / 6)) and the nearest code of every value, ties to even, by scalar arithmetic."""
    generator = torch.Generator().manual_seed(3)
    values = torch.randn(40, 96, generator=generator) * torch.exp2(
        torch.randint(-30, 30, (40, 1), generator=generator).float()
    )
    ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 6.0])
    values[0, :8], values[0, 8:32] = ties, -0.25
    values[1, :32] = torch.nextafter(ties, torch.tensor(9.0)).repeat(4)  # amax just above 6: the next scale
    found = fp4.encode(values)
    for row in range(40):
        for block in range(3):
            part = values[row, 32 * block : 32 * block + 32].double().tolist()
            power = math.ceil(math.log2(max(map(abs, part)) / 6))
            assert found.scales[row, block] == power + 127
            bytes_ = found.codes.view(torch.uint8)[row, 16 * block : 16 * block + 16].tolist()
            codes = [c for byte in bytes_ for c in (byte & 15, byte >> 4)]
            expected = [nearest(v / 2.0**power, E2M1) | (8 if v < 0 else 0) for v in part]
            assert codes == expected
    assert found.reused_blocks == 0
    assert found.rule_blocks == 120


def test_fp8_rounds_to_nearest_even_under_the_rule() -> None:
    """Scale 2^ceil(log2(amax / 448)), nearest code, ties to even; ragged blocks have their own amax."""
    values = torch.randn(140, 150, generator=torch.Generator().manual_seed(4)) * 3e-3
    values[0, 0], values[139, 149] = 448 * 2.0**-9, 448.001 * 2.0**-9
    found = fp8.encode(values)
    grid = [e4m3(c) for c in range(127)]
    for i in (0, 1):
        for j in (0, 1):
            part = values[128 * i : 128 * i + 128, 128 * j : 128 * j + 128].double()
            power = math.ceil(math.log2(float(part.abs().max()) / 448))
            assert found.scales[i, j] == power + 127
            codes = found.codes.view(torch.uint8)[128 * i : 128 * i + 128, 128 * j : 128 * j + 128]
            for value, code in list(zip(part.flatten().tolist(), codes.flatten().tolist(), strict=True))[::37]:
                assert code == nearest(value / 2.0**power, grid) | (0x80 if value < 0 else 0)


def test_a_changed_block_takes_the_rule_and_the_others_stay() -> None:
    """One trained value: its block is re-scaled, its neighbours' bytes are the source's."""
    packed, scales = draw_fp4(4, 96)
    scales = torch.full((4, 3), 120, dtype=torch.uint8).view(torch.float8_e8m0fnu)
    values = torch.empty(4, 96)
    fp4.decode(packed, scales, values)
    values[2, 40] = 6.3 * 2.0**-7
    found = fp4.encode(values, scales)
    assert (found.reused_blocks, found.rule_blocks) == (11, 1)
    assert found.scales[2, 1] == 121
    same = torch.ones(4, 48, dtype=torch.bool)
    same[2, 16:32] = False
    assert torch.equal(found.codes[same], packed[same])
    assert 0 < found.max_error <= 0.5 * 2.0**-6


def test_source_scales_are_dropped_where_they_cannot_represent_the_block() -> None:
    """Too small a scale saturates, too large a one rounds: both blocks take the rule."""
    values = torch.tensor([[1.0, 0.5] * 16, [6.0, 1.0] * 16])
    for byte in (100, 140, 0, 254):
        found = fp4.encode(values, torch.full((2, 1), byte, dtype=torch.uint8))
        assert found.rule_blocks == 2
        assert found.max_error == 0  # the rule represents these exactly
    assert fp4.encode(values, torch.full((2, 1), 127, dtype=torch.uint8)).reused_blocks == 2


def test_zeros_and_tiny_values_have_a_scale() -> None:
    """A block of zeros gets 2^-126, the rule's floor, and decodes to zeros of the same sign."""
    values = torch.zeros(2, 64)
    values[1] = -0.0
    for found in (fp4.encode(values), fp8.encode(values)):
        assert (found.scales == 1).all()
        assert found.max_error == 0
    out = torch.empty(2, 64)
    packed = fp4.encode(values)
    fp4.decode(packed.codes, packed.scales.view(torch.float8_e8m0fnu), out)
    assert torch.signbit(out[1]).all()
    tiny = torch.full((1, 32), 1e-40)
    assert fp4.encode(tiny).scales.item() == 1
    assert fp8.encode(values, dtype="F32").scales.tolist() == [[1.0]]


# ---- refusals ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("codec", [fp4, fp8])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_without_a_code_are_refused(codec: object, value: float) -> None:
    """NaN and infinity are not rounded to something else."""
    values = torch.ones(2, 32)
    values[1, 3] = value
    with pytest.raises(CheckpointError, match="w1 holds values that are not finite"):
        codec.encode(values, name="w1")  # type: ignore[attr-defined]


def test_nan_scales_are_refused(decoder: str) -> None:
    """Byte 255 is NaN; the message names tensor and block."""
    packed, scales = draw_fp4(4, 96)
    scales.view(torch.uint8)[3, 1] = 255
    with pytest.raises(CheckpointError, match=r"w1.*\[3, 1\].*255"):
        fp4.decode(packed, scales, torch.empty(4, 96), "w1")
    codes, scales = draw_fp8(200, 200)
    scales.view(torch.uint8)[1, 0] = 255
    with pytest.raises(CheckpointError, match=r"wq_a.*\[1, 0\].*255"):
        fp8.decode(codes, scales, torch.empty(200, 200), "wq_a")
    for wrong in (float("nan"), float("inf"), -1.0):
        with pytest.raises(CheckpointError, match=r"wq_a.*\[0, 1\]"):
            fp8.decode(codes, torch.tensor([[1.0, wrong], [1.0, 1.0]]), torch.empty(200, 200), "wq_a")


def test_zero_scales_over_codes_are_refused(decoder: str) -> None:
    """A known converter's fault, scales of zero, must not load as a matrix of zeros."""
    codes, _ = draw_fp8(130, 130)
    with pytest.raises(CheckpointError, match=r"wq_a.*scale of zero"):
        fp8.decode(codes, torch.zeros(2, 2), torch.empty(130, 130), "wq_a")
    fp8.decode(torch.zeros_like(codes), torch.zeros(2, 2), torch.empty(130, 130), "wq_a")


def test_values_beyond_fp32_are_refused(decoder: str) -> None:
    """6 * 2^127 has no fp32; the same scale over small codes is fine."""
    packed = torch.full((1, 16), 0x77, dtype=torch.int8)
    scales = torch.full((1, 1), 254, dtype=torch.uint8).view(torch.float8_e8m0fnu)
    with pytest.raises(CheckpointError, match="beyond float32"):
        fp4.decode(packed, scales, torch.empty(1, 32), "w1")
    out = torch.empty(1, 32)
    fp4.decode(torch.full((1, 16), 0x11, dtype=torch.int8), scales, out, "w1")
    assert (out == 2.0**126).all()
    with pytest.raises(CheckpointError, match="beyond float32"):
        fp8.decode(torch.full((1, 4), 448.0).to(torch.float8_e4m3fn), scales, torch.empty(1, 4), "w1")
