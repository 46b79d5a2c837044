"""FP4 and FP8 codecs: every code and scale against the formats' definitions, and exact round trips."""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from fullweight.checkpoint import blocks, fp4, fp8, native
from fullweight.checkpoint.blocks import Encoded
from fullweight.core.errors import CheckpointError
from fullweight.ops.native import find_compiler

from .formats import E2M1, dequantised, e2m1, e4m3

SHAPES = [(1, 2), (3, 32), (5, 34), (128, 128), (130, 262), (257, 96), (2, 1030)]
DECODERS = ["torch", pytest.param("compiled", marks=pytest.mark.skipif(not find_compiler(), reason="no compiler"))]


@pytest.fixture(params=DECODERS)
def decoder(request: pytest.FixtureRequest) -> Iterator[str]:
    with native.using(request.param):
        yield request.param


def draw_fp4(rows: int, columns: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    packed = torch.randint(-128, 128, (rows, columns // 2), dtype=torch.int8, generator=generator)
    scales = torch.randint(0, 252, (rows, -(-columns // 32)), dtype=torch.uint8, generator=generator)
    return packed, scales.view(torch.float8_e8m0fnu)


def draw_fp8(rows: int, columns: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 256, (rows, columns), dtype=torch.uint8, generator=generator)
    codes[(codes & 0x7F) == 0x7F] = 5
    shape = (-(-rows // 128), -(-columns // 128))
    scales = torch.randint(20, 240, shape, dtype=torch.uint8, generator=generator)
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


def test_rows_at_a_time_change_nothing(decoder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Spans of one row up to all rows give what the formats' definitions give, from any row of a block."""
    codes, scales = draw_fp8(300, 262)
    packed, small = draw_fp4(300, 262)
    for cached in (1, 1000, 262 * 77, 10**6):
        monkeypatch.setattr(blocks, "_CACHED", cached)
        for dtype in (torch.float32, torch.bfloat16):
            out = torch.empty(290, 262, dtype=dtype)
            fp8.decode(codes[10:], scales, out, first_row=10)
            assert torch.equal(out.double(), dequantised(codes, scales)[10:])
            fp4.decode(packed[10:], small[10:], out)
            assert torch.equal(out.double(), dequantised(packed, small)[10:])
            values, encoded = out.clone(), fp4.encode(out, small[10:])
            assert torch.equal(encoded.codes, packed[10:])
            assert fp8.encode(values).squared_norm == pytest.approx(float(values.double().square().sum()))


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
def test_fp4_returns_byte_for_byte(decoder: str, shape: tuple[int, int], dtype: torch.dtype) -> None:
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
def test_fp8_returns_byte_for_byte(
    decoder: str, shape: tuple[int, int], dtype: torch.dtype, scale_dtype: str
) -> None:
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


def test_fp4_rounds_to_nearest_even_under_the_rule(decoder: str) -> None:
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


def test_fp8_rounds_to_nearest_even_under_the_rule(decoder: str) -> None:
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


def test_a_changed_block_takes_the_rule_and_the_others_stay(decoder: str) -> None:
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


def test_source_scales_are_dropped_where_they_cannot_represent_the_block(decoder: str) -> None:
    """Too small a scale saturates, too large a one rounds: both blocks take the rule."""
    values = torch.tensor([[1.0, 0.5] * 16, [6.0, 1.0] * 16])
    for byte in (100, 140, 0, 254):
        found = fp4.encode(values, torch.full((2, 1), byte, dtype=torch.uint8))
        assert found.rule_blocks == 2
        assert found.max_error == 0  # the rule represents these exactly
    assert fp4.encode(values, torch.full((2, 1), 127, dtype=torch.uint8)).reused_blocks == 2


def test_zeros_and_tiny_values_have_a_scale(decoder: str) -> None:
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
    for least in (0.0, 1e-44):  # the second divided by 448 is no fp32 either; a scale of 0 would not be read back
        assert fp8.encode(values + least, dtype="F32").scales.tolist() == [[1.0]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_rounding_boundary_under_every_scale(decoder: str, dtype: torch.dtype) -> None:
    """Codes, the middles between two of them and the nearest values beside each, both signs, every E8M0 scale.

    Expected codes are found once, by scalar arithmetic: a scale is a power of two and changes no comparison.
    """
    for codec, grid, sign, width in ((fp4, E2M1, 8, 32), (fp8, [e4m3(c) for c in range(127)], 0x80, 128)):
        exact = torch.tensor(grid + [(a + b) / 2 for a, b in itertools.pairwise(grid)], dtype=dtype)
        drawn = torch.cat([exact] + [torch.nextafter(exact, torch.full_like(exact, to)) for to in (0.0, 1e9)])
        drawn = drawn[drawn <= grid[-1]]  # beyond the largest code the rule takes the next scale
        drawn = torch.cat((drawn, -drawn, drawn.new_zeros(-2 * len(drawn) % (width - 1)))).view(-1, width - 1)
        block = torch.cat((torch.full((len(drawn), 1), grid[-1], dtype=dtype), drawn), 1)
        smallest = torch.finfo(torch.float32).smallest_normal
        block = torch.where(
            block.abs() < grid[1] / 8, 0.0, block
        )  # beside 0: subnormal already, whatever the scale
        expected = [nearest(v, grid) | (sign if v < 0 else 0) for v in block.double().flatten().tolist()]
        signs = torch.signbit(block).flatten().tolist()
        expected = [code | (sign if negative else 0) for code, negative in zip(expected, signs, strict=True)]
        for byte in range(1, 255):
            scale = 2.0 ** (byte - 127)
            if grid[1] / 8 * scale < smallest or grid[-1] * scale > torch.finfo(dtype).max:
                continue
            found = codec.encode(block * scale)
            assert (found.scales == byte).all(), byte
            codes = found.codes.view(torch.uint8)
            if codec is fp4:
                codes = torch.stack((codes & 15, codes >> 4), 2)
            assert codes.flatten().tolist() == expected, byte


def hostile(shape: tuple[int, int], kind: str, dtype: torch.dtype, seed: int) -> Tensor:
    """Finite values: of a weight's size, of any bits at all, or subnormal and just above; zeros of either sign."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(-(2**31), 2**31, shape, generator=generator).to(torch.int32)
    if kind == "weights":
        values = torch.randn(shape, generator=generator) * 0.02
    else:
        values = (drawn if kind == "any" else drawn & (0x81FFFFFF - 2**32)).view(torch.float32)
    values = torch.where(drawn % 11 == 0, torch.where(drawn > 0, 0.0, -0.0), values).to(dtype)
    return torch.where(torch.isfinite(values), values, 1.0)


@pytest.mark.skipif(not find_compiler(), reason="no compiler")
@pytest.mark.parametrize("kind", ["weights", "any", "small"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_and_torch_encoders_agree_in_every_bit(dtype: torch.dtype, kind: str) -> None:
    """Codes, scales, which blocks kept the source's, and all statistics, whatever values and sources hold."""

    def encodings(values: Tensor) -> list[Encoded]:
        """Without a source, under scales that fit, that nearly do, and that are drawn from all there are."""
        generator, found = torch.Generator().manual_seed(1), []
        for encode, stored in ((fp4.encode, ""), (fp8.encode, "F8_E8M0"), (fp8.encode, "F32")):
            options = {"dtype": stored} if stored else {}
            found.append(first := encode(values, **options))
            out = torch.empty_like(values)
            decode = fp8.decode if stored else fp4.decode
            with contextlib.suppress(CheckpointError):  # said of infinities, once all is decoded
                decode(first.codes, first.scales, out)
            exact = torch.where(torch.isfinite(out), out, 1.0)
            if stored == "F32":
                sources = [first.scales, first.scales * 1e-30, torch.zeros_like(first.scales)]
                sources.append(torch.rand(first.scales.shape, generator=generator))
            else:
                sources = [first.scales, (first.scales.int() - 1).clamp(0, 254).to(torch.uint8)]
                sources.append(torch.randint(0, 255, first.scales.shape, generator=generator, dtype=torch.uint8))
            found += [encode(given, source, **options) for given in (exact, values) for source in sources]
        return found

    kept = 0
    for seed, shape in enumerate([*SHAPES, (200, 1500)]):
        values = hostile(shape, kind, dtype, seed)
        results = {}
        for name in ("compiled", "torch"):
            with native.using(name):
                results[name] = encodings(values)
        for compiled, plain in zip(*results.values(), strict=True):
            assert torch.equal(bits(compiled.codes), bits(plain.codes)), shape
            assert torch.equal(bits(compiled.scales), bits(plain.scales)), shape
            for field in ("reused_blocks", "rule_blocks", "max_error", "squared_error", "squared_norm"):
                assert getattr(compiled, field) == getattr(plain, field), (shape, field)
            kept += compiled.reused_blocks
    assert kept > 1000


def test_errors_are_those_of_decoding(decoder: str) -> None:
    """Largest error and sums of squares against float64 arithmetic on decoded values; threads change no bit."""
    values = torch.randn(300, 1030, generator=torch.Generator().manual_seed(5)) * 0.1
    for codec in (fp4, fp8):
        found = codec.encode(values)
        out = torch.empty_like(values)
        codec.decode(found.codes, found.scales, out)
        wrong = out.double() - values.double()
        assert found.max_error == pytest.approx(float(wrong.abs().max()), rel=1e-6)
        assert found.squared_error == pytest.approx(float(wrong.square().sum()), rel=1e-6)
        assert found.squared_norm == pytest.approx(float(values.double().square().sum()), rel=1e-12)
        before = torch.get_num_threads()
        torch.set_num_threads(3 - min(before, 2))
        try:
            again = codec.encode(values)
        finally:
            torch.set_num_threads(before)
        for field in ("max_error", "squared_error", "squared_norm"):
            assert getattr(again, field) == getattr(found, field)


# ---- refusals ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("codec", [fp4, fp8])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_values_without_a_code_are_refused(decoder: str, codec: object, value: float) -> None:
    """NaN and infinity are not rounded to something else."""
    for dtype in (torch.float32, torch.bfloat16):
        values = torch.ones(2, 40, dtype=dtype)
        values[1, 35] = value
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
