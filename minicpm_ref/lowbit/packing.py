"""Ternary weights as bytes: in files, and in memory for the kernels.

The problem: a weight in {-1, 0, 1} carries log2(3) = 1.58 bits, and bytes have eight. How it is laid out decides the
size of the file and the speed of the product, and the two want different things.

Three layouts of codes [out, in], all of them storing u = code + 1 in {0, 1, 2}:

- `"2bit"`   (files) four codes to a byte: byte i of a row holds codes 4i .. 4i+3, the first in its low bits. 2 bits.
- `"base3"`  (files) five codes to a byte: u0 + 3 u1 + 9 u2 + 27 u3 + 81 u4 <= 242. 1.6 bits. The whole tensor is one
  stream, row after row, filled up with at most four zero weights. Decoding needs divisions (or a table), so this is
  for files.
- *rows in lanes* (memory) two bits, in the order in which a vector machine wants them. Sixteen output rows stand side
  by side, one 32-bit lane each: a 64-byte chunk holds sixteen codes of each of the sixteen rows, and chunks follow
  each other along the row, so one stream of memory feeds sixteen sums and no sum is ever taken across lanes. In the
  word of a row, byte b holds in its bit pair p the code of column 4p + b: one shift and one mask leave, in the word's
  four bytes, the codes of four neighbouring columns, which meet four neighbouring int8 activations in one dot-product
  instruction.

With one float16 scale for g = 128 weights: 2.125 and 1.725 bits a weight, against 16 (ggml's TQ2_0 and TQ1_0 have one
scale for 256 weights: 2.0625 and 1.6875).

A ternary file is safetensors: `<name>.codes` (uint8) and `<name>.scales` (float16 [out, in / g]) for each matrix,
with packing, g and original shapes in the file's metadata under `ternary`.

Left out: entropy coding. A third of the weights is zero, so the codes are close to uniform and nothing is left to
gain. Sources: MiniCPM4 technical report (arXiv 2506.07900) section 3.3; the layout of ggml's TQ1_0 for the five
trits.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from safetensors import safe_open
from torch import Tensor

from minicpm_ref.published import parse_json, require, require_list

PACKINGS = {"2bit": 4, "base3": 1}  # name -> columns that share a byte and so must be a divisor of the group size
LANES = 16  # output rows in one vector of 32-bit lanes; also the codes in one lane
METADATA_KEY = "ternary"
_POWERS_OF_3 = (1, 3, 9, 27, 81)


def pack(codes: Tensor, packing: str = "2bit") -> Tensor:
    """Codes [out, in] (int8 in {-1, 0, 1}) as bytes: uint8 [out, in / 4] for "2bit", [ceil(out * in / 5)] for
    "base3".

    Raises ValueError for an unknown packing, a code that is not -1, 0 or 1, or columns that do not fill the bytes.
    """
    _check_packing(packing, codes.shape[-1])
    digits = _digits(codes)
    if packing == "2bit":
        return _merge_bits(rearrange(digits, "out (byte pair) -> out byte pair", pair=4))  # [out, in / 4]
    padded = torch.ones(-(-digits.numel() // 5) * 5, dtype=torch.uint8, device=digits.device)  # digit 1 is weight 0
    padded[: digits.numel()] = digits.flatten()
    powers = torch.tensor(_POWERS_OF_3, dtype=torch.uint8, device=digits.device)
    return (padded.view(-1, 5) * powers).sum(1, dtype=torch.uint8)  # [ceil(out * in / 5)]


def unpack(packed: Tensor, shape: tuple[int, int], packing: str = "2bit", name: str = "codes") -> Tensor:
    """The inverse of `pack`: int8 codes of `shape` [out, in].

    Raises ValueError, naming the tensor `name`, for a wrong dtype or size and for a byte that no codes pack to.
    """
    _check_packing(packing, shape[1])
    rows, columns = shape
    expected = (rows, columns // 4) if packing == "2bit" else (-(-rows * columns // 5),)
    if packed.dtype != torch.uint8 or tuple(packed.shape) != expected:
        raise ValueError(
            f"{name}: {packed.dtype} {list(packed.shape)}, expected uint8 {list(expected)} for {rows} x {columns} "
            f"codes packed as {packing}"
        )
    if packing == "2bit":
        digits = _split_bits(packed)  # [out, in / 4, 4]
        _check_digits(digits, packed, name)
    else:
        _refuse_byte(packed > 242, packed, name, "a byte of five base-3 digits is at most 242")
        digits = _TRITS.to(packed.device)[packed.int()].flatten()  # [5 * bytes]
        if bool((digits[rows * columns :] != 1).any()):
            raise ValueError(
                f"{name}: the last byte is {int(packed[-1])}, whose padding past the last weight is not zero"
            )
        digits = digits[: rows * columns]
    return (digits.reshape(shape).to(torch.int8) - 1).contiguous()


def to_lanes(codes: Tensor, name: str = "codes") -> Tensor:
    """Codes [out, in] (int8 in {-1, 0, 1}) in the kernels' layout: uint8 [out / 16, in / 16, 16 rows, 4 bytes].

    Raises ValueError for a code that is not -1, 0 or 1, and for an `out` or `in` that is not a multiple of 16.
    """
    _check_lanes(codes.shape[0], codes.shape[1], name)
    return _merge_bits(
        rearrange(
            _digits(codes, name),
            "(block row) (chunk pair byte) -> block chunk row byte pair",
            row=LANES,
            pair=4,
            byte=4,
        )
    )


def from_lanes(packed: Tensor, name: str = "codes") -> Tensor:
    """The inverse of `to_lanes`: int8 codes [out, in]. Raises ValueError, naming the tensor, for what it cannot be."""
    if packed.dtype != torch.uint8 or packed.ndim != 4 or packed.shape[2:] != (LANES, 4):
        raise ValueError(f"{name}: {packed.dtype} {list(packed.shape)}, expected uint8 [out / 16, in / 16, 16, 4]")
    digits = _split_bits(packed)
    _check_digits(digits, packed, name)
    rows = rearrange(digits, "block chunk row byte pair -> (block row) (chunk pair byte)")  # [out, in]
    return rows.to(torch.int8) - 1


def scales_to_lanes(scales: Tensor, name: str = "scales") -> Tensor:
    """Scales [out, in / g] in the kernels' layout [out / 16, in / g, 16]: those of one group are one vector.

    Raises ValueError, naming the tensor, for a scale that is negative or not finite: kernels do not look at the sign
    bit.
    """
    _check_lanes(scales.shape[0], LANES, name)
    _refuse_scale(scales, name)
    return rearrange(scales, "(block row) group -> block group row", row=LANES).contiguous()


def scales_from_lanes(scales: Tensor) -> Tensor:
    """The inverse of `scales_to_lanes`: [out, in / g]."""
    return rearrange(scales, "block group row -> (block row) group")


@dataclass(frozen=True)
class TernaryTensor:
    """One matrix: codes int8 [out, in] and float16 scales [out, in / group_size]."""

    codes: Tensor
    scales: Tensor
    group_size: int


def pack_tensors(
    matrices: Mapping[str, TernaryTensor], packing: str = "base3"
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """What a safetensors file holds for `matrices`: (tensors, metadata), ready for `safetensors.torch.save_file`.

    Raises ValueError, naming the tensor, for scales that are not finite float16 of the right shape, and for what
    `pack` refuses.
    """
    tensors: dict[str, Tensor] = {}
    layout = {}
    for name, matrix in matrices.items():
        rows, columns = matrix.codes.shape
        _check_group(matrix.group_size, columns, PACKINGS.get(packing, 1), name)
        _check_scales(matrix.scales, (rows, columns // matrix.group_size), f"{name}.scales")
        tensors[f"{name}.codes"] = pack(matrix.codes, packing)
        tensors[f"{name}.scales"] = matrix.scales.contiguous()
        layout[name] = {"shape": [rows, columns], "group_size": matrix.group_size}
    return tensors, {METADATA_KEY: json.dumps({"packing": packing, "matrices": layout})}


def unpack_tensors(
    tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None
) -> Iterator[tuple[str, TernaryTensor]]:
    """The inverse of `pack_tensors`, a matrix at a time: a byte a code is five times what the file needs, so a loader
    must not hold all of them. Tensors that the metadata does not list are not looked at.

    Nothing for a file without ternary metadata. Raises ValueError, naming the tensor, for a missing or damaged one.
    """
    packing, layout = _layout(metadata)
    for name, entry in layout.items():
        (rows, columns), group_size = entry["shape"], entry["group_size"]
        for part in (f"{name}.codes", f"{name}.scales"):
            if part not in tensors:
                raise ValueError(f"{part} is missing: the file's metadata lists {name} as packed ternary")
        _check_group(group_size, columns, PACKINGS.get(packing, 1), name)
        scales = tensors[f"{name}.scales"]
        _check_scales(scales, (rows, columns // group_size), f"{name}.scales")
        codes = unpack(tensors[f"{name}.codes"], (rows, columns), packing, f"{name}.codes")
        yield name, TernaryTensor(codes, scales, group_size)


@dataclass(frozen=True)
class SizeReport:
    """Sizes read from the files themselves. Bytes, except where the name says otherwise."""

    ternary_weights: int  # how many weights are packed
    ternary_bytes: int  # their codes and scales
    other_weights: int  # embeddings, norms, output matrix
    other_bytes: int
    file_bytes: int  # on disk, headers included

    @property
    def bits_per_weight(self) -> float:
        """Of the ternary part, scales included."""
        return 8 * self.ternary_bytes / self.ternary_weights

    @property
    def float16_bytes(self) -> int:
        """What all the weights would take in float16."""
        return 2 * (self.ternary_weights + self.other_weights)

    @property
    def fraction_of_float16(self) -> float:
        """File size divided by `float16_bytes`."""
        return self.file_bytes / self.float16_bytes


def size_report(*paths: str | Path) -> SizeReport:
    """Sizes of a packed checkpoint, counted from its .safetensors files; a folder stands for all it holds.

    Raises FileNotFoundError when there is none, ValueError when none holds a packed ternary matrix.
    """
    files = [file for path in paths for file in _safetensors_files(Path(path))]
    layout: dict[str, Any] = {}
    tensors: dict[str, Tensor] = {}
    for file in files:
        with safe_open(file, framework="pt") as reader:
            layout |= _layout(reader.metadata())[1]  # every shard of a checkpoint repeats it
            tensors |= {name: reader.get_tensor(name) for name in reader.keys()}  # noqa: SIM118  # not a mapping
    packed = {f"{name}.{part}" for name in layout for part in ("codes", "scales")}
    others = [tensor for name, tensor in tensors.items() if name not in packed]
    ternary_weights = sum(entry["shape"][0] * entry["shape"][1] for entry in layout.values())
    ternary_bytes = sum(tensors[name].nbytes for name in packed)
    other_weights, other_bytes = sum(t.numel() for t in others), sum(t.nbytes for t in others)
    if not ternary_weights:
        raise ValueError(f"no packed ternary matrix in {', '.join(str(file) for file in files)}")
    file_bytes = sum(file.stat().st_size for file in files)
    return SizeReport(ternary_weights, ternary_bytes, other_weights, other_bytes, file_bytes)


def _safetensors_files(path: Path) -> Iterable[Path]:
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path] if path.is_file() else []
    if not files:
        raise FileNotFoundError(f"{path}: no .safetensors file there")
    return files


def _layout(metadata: Mapping[str, str] | None) -> tuple[str, dict[str, Any]]:
    """Packing and {name: {"shape": [rows, columns], "group_size": g}} of a file's metadata, checked."""
    if not metadata or METADATA_KEY not in metadata:
        return "2bit", {}
    try:
        described = parse_json(metadata[METADATA_KEY])
        packing = require("packing", described.get("packing"), str)
        layout = require("matrices", described.get("matrices"), dict)
        for name, entry in layout.items():
            require(name, entry, dict)
            shape = require_list(f"{name}.shape", entry.get("shape"), int, low=1, high=2**31 - 1)
            if len(shape) != 2:
                raise ValueError(f"{name}.shape = {shape}: expected [rows, columns]")
            require(f"{name}.group_size", entry.get("group_size"), int, low=1, high=2**31 - 1)
    except ValueError as error:
        raise ValueError(f"metadata {METADATA_KEY!r}: {error}") from error
    return packing, layout


def _trit_table() -> Tensor:
    """Digits [256, 5] of every byte; rows above 242 are never read."""
    return (
        torch.arange(256)[:, None].div(torch.tensor(_POWERS_OF_3), rounding_mode="floor").remainder(3).to(torch.uint8)
    )


_TRITS = _trit_table()


def _digits(codes: Tensor, name: str = "codes") -> Tensor:
    """u = code + 1 as uint8, after checking that every code is -1, 0 or 1."""
    wrong = (codes < -1) | (codes > 1)
    if codes.dtype != torch.int8 or codes.ndim != 2:
        raise ValueError(f"{name}: {codes.dtype} {list(codes.shape)}, expected int8 [out, in]")
    if bool(wrong.any()):
        raise ValueError(f"{name}: code {int(codes[wrong][0])}, expected -1, 0 or 1")
    return (codes + 1).to(torch.uint8)


def _merge_bits(digits: Tensor) -> Tensor:
    """Four digits [..., 4] to one byte [...], the first in the low bits."""
    d0, d1, d2, d3 = digits.unbind(-1)
    return (d0 | d1 << 2 | d2 << 4 | d3 << 6).contiguous()


def _split_bits(packed: Tensor) -> Tensor:
    """The inverse of `_merge_bits`: [...] to [..., 4]."""
    return torch.stack([packed >> shift & 3 for shift in (0, 2, 4, 6)], dim=-1)


def _check_digits(digits: Tensor, packed: Tensor, name: str) -> None:
    _refuse_byte((digits == 3).any(-1), packed, name, "a pair of bits is at most 2")


def _refuse_byte(wrong: Tensor, packed: Tensor, name: str, why: str) -> None:
    if bool(wrong.any()):
        position = wrong.nonzero()[0].tolist()
        raise ValueError(f"{name}: byte {int(packed[wrong][0])} at {position} is out of range: {why}")


def _check_packing(packing: str, columns: int) -> None:
    if packing not in PACKINGS:
        raise ValueError(f"packing {packing!r}: expected one of {', '.join(PACKINGS)}")
    if columns % PACKINGS[packing]:
        raise ValueError(f"{columns} columns packed as {packing}: expected a multiple of {PACKINGS[packing]}")


def _check_group(group_size: int, columns: int, unit: int, name: str) -> None:
    if group_size < 1 or columns % group_size:
        raise ValueError(f"{name}: {columns} columns are not a multiple of group_size {group_size}")
    if group_size % unit:
        raise ValueError(
            f"{name}: group_size {group_size}, expected a multiple of {unit}, the columns that share a byte"
        )


def _check_lanes(rows: int, columns: int, name: str) -> None:
    if rows % LANES or columns % LANES:
        raise ValueError(
            f"{name}: {rows} x {columns}, expected multiples of {LANES} (sixteen rows by sixteen columns a chunk)"
        )


def _check_scales(scales: Tensor, shape: tuple[int, int], name: str) -> None:
    if scales.dtype != torch.float16 or tuple(scales.shape) != shape:
        raise ValueError(f"{name}: {scales.dtype} {list(scales.shape)}, expected float16 {list(shape)}")
    _refuse_scale(scales, name)


def _refuse_scale(scales: Tensor, name: str) -> None:
    wrong = ~scales.isfinite() | (scales < 0)
    if bool(wrong.any()):
        position = wrong.nonzero()[0].tolist()
        raise ValueError(f"{name}: {float(scales[wrong][0])} at {position}, expected a finite scale, not negative")
