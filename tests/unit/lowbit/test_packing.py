"""Codes to bytes and back, in files and in the kernels' layout, and what is refused on the way."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from minicpm_ref.cases import PACK, PackCase
from minicpm_ref.lowbit.packing import (
    PACKINGS,
    TernaryTensor,
    from_lanes,
    pack,
    pack_tensors,
    scales_from_lanes,
    scales_to_lanes,
    size_report,
    to_lanes,
    unpack,
    unpack_tensors,
)


def random_codes(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(-1, 2, (rows, columns), generator=torch.Generator().manual_seed(seed), dtype=torch.int8)


def matrix(rows: int = 32, columns: int = 256, group_size: int = 128, seed: int = 0) -> TernaryTensor:
    scales = 0.01 + 0.01 * torch.rand(rows, columns // group_size, generator=torch.Generator().manual_seed(seed))
    return TernaryTensor(random_codes(rows, columns, seed), scales.half(), group_size)


def test_one_byte_by_hand() -> None:
    assert pack(torch.tensor([[-1, 0, 1, -1]], dtype=torch.int8), "2bit").tolist() == [[0b00_10_01_00]]
    assert pack(torch.tensor([[-1, 0, 1, -1, 1]], dtype=torch.int8), "base3").tolist() == [
        0 + 1 * 3 + 2 * 9 + 0 + 2 * 81
    ]
    assert pack(torch.tensor([[1]], dtype=torch.int8), "base3").tolist() == [2 + 3 + 9 + 27 + 81]  # four zero weights


def test_one_word_by_hand() -> None:
    """Row 1, columns 0 to 15: byte b holds in its bit pair p the code of column 4p + b."""
    codes = torch.zeros(16, 16, dtype=torch.int8)
    codes[1, 4 * 2 + 3] = 1
    expected = torch.full((1, 1, 16, 4), 0b01_01_01_01, dtype=torch.uint8)
    expected[0, 0, 1, 3] = 0b01_10_01_01
    assert torch.equal(to_lanes(codes), expected)


@pytest.mark.parametrize("case", PACK, ids=lambda case: case.name)
def test_round_trip_of_the_rows(case: PackCase) -> None:
    codes, packing = case.build()
    packed = pack(codes, packing)
    assert packed.dtype == torch.uint8
    assert packed.numel() == (codes.numel() // 4 if packing == "2bit" else -(-codes.numel() // 5))
    assert torch.equal(unpack(packed, tuple(codes.shape), packing), codes)


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_round_trip(data: st.DataObject) -> None:
    packing = data.draw(st.sampled_from(sorted(PACKINGS)))
    rows = data.draw(st.integers(1, 9))
    columns = data.draw(st.integers(1, 9)) * PACKINGS[packing]
    values = data.draw(st.lists(st.integers(-1, 1), min_size=rows * columns, max_size=rows * columns))
    codes = torch.tensor(values, dtype=torch.int8).view(rows, columns)
    packed = pack(codes, packing)
    assert torch.equal(unpack(packed, (rows, columns), packing), codes)


@given(seed=st.integers(0, 2**31), blocks=st.integers(1, 3), chunks=st.integers(1, 3), groups=st.integers(1, 3))
@settings(max_examples=30, deadline=None)
def test_lanes_round_trip(seed: int, blocks: int, chunks: int, groups: int) -> None:
    codes = random_codes(16 * blocks, 16 * chunks, seed)
    packed = to_lanes(codes)
    assert packed.shape == (blocks, chunks, 16, 4)
    assert torch.equal(from_lanes(packed), codes)
    scales = torch.rand(16 * blocks, groups)
    assert torch.equal(scales_from_lanes(scales_to_lanes(scales)), scales)


@pytest.mark.parametrize("packing", PACKINGS)
def test_every_byte_is_read_or_refused(packing: str) -> None:
    """All 256 values: those of valid digits come back the same, the others raise."""
    valid = 0
    for byte in range(256):
        packed = torch.tensor([[byte]] if packing == "2bit" else [byte], dtype=torch.uint8)
        shape = (1, 4) if packing == "2bit" else (1, 5)
        try:
            codes = unpack(packed, shape, packing, "layer.codes")
        except ValueError as error:
            assert f"layer.codes: byte {byte} at" in str(error)  # noqa: PT017  # both outcomes are right for some byte
        else:
            assert torch.equal(pack(codes, packing), packed)
            valid += 1
    assert valid == (3**4 if packing == "2bit" else 3**5)


def test_padding_must_be_zero() -> None:
    packed = pack(random_codes(1, 7), "base3")
    packed[-1] += 81 if packed[-1] < 162 else -81
    with pytest.raises(ValueError, match="codes: the last byte is .* padding"):
        unpack(packed, (1, 7), "base3")


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: pack(torch.full((1, 4), 2, dtype=torch.int8)), "code 2, expected -1, 0 or 1"),
        (lambda: pack(torch.full((1, 4), -128, dtype=torch.int8)), "code -128"),
        (lambda: pack(torch.zeros(1, 4)), r"torch.float32 \[1, 4\], expected int8"),
        (lambda: pack(random_codes(2, 6)), "6 columns packed as 2bit: expected a multiple of 4"),
        (lambda: pack(random_codes(2, 8), "base4"), "packing 'base4': expected one of 2bit, base3"),
        (lambda: unpack(torch.zeros(2, 3, dtype=torch.uint8), (2, 8)), r"uint8 \[2, 3\], expected uint8 \[2, 2\]"),
        (lambda: to_lanes(random_codes(16, 24), "q_proj"), "q_proj: 16 x 24, expected multiples of 16"),
        (lambda: to_lanes(random_codes(8, 16), "q_proj"), "q_proj: 8 x 16"),
        (
            lambda: scales_to_lanes(torch.full((16, 2), -1.0)),
            r"scales: -1.0 at \[0, 0\], expected a finite scale, not neg",
        ),
        (lambda: scales_to_lanes(torch.full((16, 2), torch.nan)), r"scales: nan at \[0, 0\]"),
        (
            lambda: from_lanes(torch.zeros(1, 1, 4, 16, dtype=torch.uint8)),
            r"expected uint8 \[out / 16, in / 16, 16, 4\]",
        ),
    ],
)
def test_refusals(call, words: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match=words):
        call()


@pytest.mark.parametrize("packing", PACKINGS)
def test_a_file_round_trip(packing: str, tmp_path: Path) -> None:
    matrices = {"layers.0.q_proj": matrix(), "layers.0.down_proj": matrix(16, 384, seed=1)}
    tensors, metadata = pack_tensors(matrices, packing)
    assert tensors["layers.0.q_proj.scales"].shape == (32, 2)
    save_file(tensors | {"norm.weight": torch.ones(4)}, tmp_path / "model.safetensors", metadata)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        read = dict(unpack_tensors(load_file(tmp_path / "model.safetensors"), file.metadata()))
    assert list(read) == list(matrices)
    for name, original in matrices.items():
        assert torch.equal(read[name].codes, original.codes)
        assert torch.equal(read[name].scales, original.scales)
        assert read[name].group_size == original.group_size


def test_files_without_ternary_metadata_hold_nothing_ternary() -> None:
    assert list(unpack_tensors({"a.codes": torch.ones(1)}, None)) == []
    assert list(unpack_tensors({"a.codes": torch.ones(1)}, {"format": "pt"})) == []


def test_damaged_files_are_refused() -> None:
    tensors, metadata = pack_tensors({"q": matrix()}, "2bit")
    with pytest.raises(ValueError, match="q.scales is missing"):
        list(unpack_tensors({"q.codes": tensors["q.codes"]}, metadata))
    scales = tensors["q.scales"].clone()
    scales[3, 1] = torch.inf
    with pytest.raises(ValueError, match=r"q.scales: inf at \[3, 1\]"):
        list(unpack_tensors(tensors | {"q.scales": scales}, metadata))
    with pytest.raises(ValueError, match="q.codes: byte 255 at"):
        list(unpack_tensors(tensors | {"q.codes": torch.full_like(tensors["q.codes"], 255)}, metadata))
    with pytest.raises(ValueError, match=r"q.scales: torch.float32 \[32, 2\], expected float16"):
        list(unpack_tensors(tensors | {"q.scales": tensors["q.scales"].float()}, metadata))
    layout = json.loads(metadata["ternary"])
    layout["matrices"]["q"]["group_size"] = 100
    with pytest.raises(ValueError, match="q: 256 columns are not a multiple of group_size 100"):
        list(unpack_tensors(tensors, {"ternary": json.dumps(layout)}))


@pytest.mark.parametrize(
    ("described", "message"),
    [
        ("[]", "expected a JSON object"),
        ('{"matrices": {}}', "packing = None"),
        ('{"packing": "2bit", "matrices": 5}', "matrices = 5"),
        ('{"packing": "2bit", "matrices": {"q": {"shape": [32]}}}', r"q.shape = \[32\]"),
        ('{"packing": "2bit", "matrices": {"q": {"shape": [32, "256"], "group_size": 128}}}', r"q.shape\[1\] = '256'"),
        ('{"packing": "2bit", "matrices": {"q": {"shape": [32, 256]}}}', "q.group_size = None"),
    ],
)
def test_damaged_metadata_is_refused_by_key(described: str, message: str) -> None:
    with pytest.raises(ValueError, match=f"metadata 'ternary': {message}"):
        list(unpack_tensors({}, {"ternary": described}))


def test_groups_must_fill_bytes() -> None:
    odd = TernaryTensor(random_codes(16, 12), torch.ones(16, 2).half(), 6)
    with pytest.raises(ValueError, match="q: group_size 6, expected a multiple of 4"):
        pack_tensors({"q": odd}, "2bit")
    assert pack_tensors({"q": odd}, "base3")


def test_sizes_come_from_the_files(tmp_path: Path) -> None:
    for packing, bits in (("2bit", 2.125), ("base3", 1.725)):
        tensors, metadata = pack_tensors({"q": matrix(80, 1280), "v": matrix(16, 1280)}, packing)
        path = tmp_path / packing / "model.safetensors"
        path.parent.mkdir()
        save_file(tensors | {"embed": torch.ones(10, 7)}, path, metadata)
        report = size_report(path.parent)
        assert report == size_report(path)
        assert report.ternary_weights == 96 * 1280
        assert report.bits_per_weight == pytest.approx(bits, abs=1e-3)
        assert report.other_weights == 70
        assert report.other_bytes == 280
        assert report.file_bytes == path.stat().st_size
        assert report.float16_bytes == 2 * (96 * 1280 + 70)
        assert report.fraction_of_float16 == report.file_bytes / report.float16_bytes
        assert bits / 16 < report.fraction_of_float16 < bits / 16 + 0.01


def test_sizes_need_a_packed_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no .safetensors file"):
        size_report(tmp_path)
    save_file({"w": torch.ones(2)}, tmp_path / "dense.safetensors")
    with pytest.raises(ValueError, match=r"no packed ternary matrix in .*dense.safetensors"):
        size_report(tmp_path)
