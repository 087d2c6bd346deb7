"""Ternary layers: a decoder made quantization-aware for training, and packed for inference.

The problem: the quantizer of `ternary` is a function of one matrix; a model has dozens, and what is trained, what is
stored and what is multiplied must be the same numbers. The idea: three replacements of `nn.Linear`, none of which
renames a tensor of the checkpoint.

- `QuantizationAwareLinear` keeps the float32 parameter and multiplies by its rounded self:
  `quantization_aware(model)`.
- `TernaryLinear` holds packed codes and scales and nothing else: `to_ternary(model)`, `install_ternary` from a file.
- `MergedTernaryLinear` answers q, k and v (or gate and up) in one kernel call: they read the same x, so one call
  quantizes x once and enters one parallel region where three would. It takes effect in modules that ask for it: their
  `merges` names the attribute to fill and the linears to merge.

How QAT and packed inference agree: codes and scales are identical for float32 parameters (see `ternary`), so with
float activations the outputs differ by the order of a float32 sum. With int8 activations, which the CPU kernel uses,
they differ by the rounding of the activations, 0.6 % of the output on Gaussian data.

Left out: training on packed weights. The straight-through estimator needs the float32 ones.
Source: MiniCPM4 technical report (arXiv 2506.07900) section 3.3.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minicpm_ref import backend
from minicpm_ref.lowbit.packing import (
    LANES,
    TernaryTensor,
    from_lanes,
    pack_tensors,
    scales_from_lanes,
    scales_to_lanes,
    to_lanes,
)
from minicpm_ref.lowbit.ternary import fake_quantize, find_grid, quantize, recover_ternary, split_groups

KERNEL_GROUP_SIZE = 128  # what the fast kernels are compiled for, and what the published models use


class QuantizationAwareLinear(nn.Linear):
    """A linear layer whose forward pass sees its weight through `fake_quantize`; its only parameter is `weight`."""

    def __init__(self, linear: nn.Linear, group_size: int, grid: str):
        super().__init__(linear.in_features, linear.out_features, bias=False, device="meta")
        self.weight = linear.weight  # the same Parameter, so optimisers and state dicts do not notice
        self.group_size = group_size
        self.grid = grid

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] -> [..., out]."""
        return F.linear(x, fake_quantize(self.weight, self.group_size, self.grid))


class TernaryLinear(nn.Module):
    """A linear layer on packed ternary weights, for inference: 2.125 bits a weight and no dense copy.

    Buffers in the kernels' layout (`ternary_packing`): `codes` uint8 [out / 16, in / 16, 16, 4] and `scales` float16
    [out / 16, in / g, 16]. `scales` stays float16 under `.to(dtype)`: rounded to bfloat16 it would be another matrix.

    `activations`: "float" (`ternary_matmul`), "int8" (`ternary_matmul_int8`), or None for int8 where a numba kernel
    does it and float elsewhere. Where x needs a gradient, the torch reference runs.
    """

    codes: Tensor
    scales: Tensor

    def __init__(self, matrix: TernaryTensor, activations: str | None = None, name: str = "weight"):
        super().__init__()
        if activations not in (None, "float", "int8"):
            raise ValueError(f'activations {activations!r}: expected "float", "int8" or None')
        self.out_features, self.in_features = matrix.codes.shape
        self.group_size = matrix.group_size
        self.activations = activations
        self.register_buffer("codes", to_lanes(matrix.codes, name))
        self.register_buffer("scales", scales_to_lanes(matrix.scales, f"scales of {name}"))

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] -> [..., out]."""
        return _multiply(x, self.codes, self.scales, self.group_size, self.activations)

    def matrix(self) -> TernaryTensor:
        """Codes int8 [out, in] and scales [out, in / g]: the layer, unpacked."""
        return TernaryTensor(from_lanes(self.codes), scales_from_lanes(self.scales).contiguous(), self.group_size)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, group_size={self.group_size}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> TernaryLinear:
        return _keep_float16(self, fn, super()._apply, recurse)


class MergedTernaryLinear(nn.Module):
    """Several `TernaryLinear`s that read the same x, answered by one kernel call.

    It holds their codes and scales end to end, and theirs become views of it: nothing is stored twice, and the state
    dict keeps the names of the parts. Raises ValueError for parts of different width or group size.
    """

    codes: Tensor
    scales: Tensor

    def __init__(self, parts: Sequence[TernaryLinear]):
        super().__init__()
        kinds = {(part.in_features, part.group_size, part.activations) for part in parts}
        if len(kinds) != 1:
            raise ValueError(
                f"linears of (in_features, group_size, activations) {sorted(map(str, kinds))} cannot be merged"
            )
        (_, self.group_size, self.activations) = kinds.pop()
        self.parts = tuple(parts)  # a tuple is not registered: the parts stay children of their own parent
        self.register_buffer("codes", torch.cat([part.codes for part in parts]), persistent=False)
        self.register_buffer("scales", torch.cat([part.scales for part in parts]), persistent=False)
        self._share()

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """x [..., in] -> one [..., out] for each part."""
        y = _multiply(x, self.codes, self.scales, self.group_size, self.activations)
        return y.split([part.out_features for part in self.parts], dim=-1)

    def _share(self) -> None:
        blocks = [part.out_features // LANES for part in self.parts]
        for part, codes, scales in zip(self.parts, self.codes.split(blocks), self.scales.split(blocks), strict=True):
            part.codes, part.scales = codes, scales

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> MergedTernaryLinear:
        _keep_float16(self, fn, super()._apply, recurse)
        self._share()  # a move copies views one by one
        return self


def quantization_aware(model: nn.Module, group_size: int = 128, grid: str = "ternary") -> nn.Module:
    """Make every linear inside `model.model.layers` quantization-aware, in place; returns the model.

    Parameters stay the same objects under the same names. Raises ValueError, naming the layer, for one that cannot
    be.
    """
    find_grid(grid)
    linears = list(_block_linears(model))
    for name, _, _, linear in linears:
        split_groups(linear.weight, group_size, name)
    for _, parent, attribute, linear in linears:
        setattr(parent, attribute, QuantizationAwareLinear(linear, group_size, grid))
    return model


@torch.no_grad()
def to_ternary(model: nn.Module, group_size: int = 128, recover: bool = False) -> nn.Module:
    """Replace every linear inside `model.model.layers` by a `TernaryLinear`, in place; returns the model.

    Weights are quantized, or with `recover` taken as already fake-quantized (published BitCPM4). A quantization-aware
    linear is packed with its own group size. Raises ValueError, naming the layer, as `quantize` or `recover_ternary`
    does.
    """
    packed = []
    for name, parent, attribute, linear in _block_linears(model):
        size = group_size
        if isinstance(linear, QuantizationAwareLinear):
            size = linear.group_size
            if linear.grid != "ternary":
                raise ValueError(f"{name}: trained on the grid {linear.grid!r}, only ternary weights can be packed")
        codes, scales = (recover_ternary if recover else quantize)(linear.weight, size, name)
        packed.append((parent, attribute, TernaryLinear(TernaryTensor(codes, scales, size), name=name)))
    for parent, attribute, layer in packed:  # all or none: an error above leaves the model as it was
        setattr(parent, attribute, layer)
    _merge(model)
    return model


def ternary_state(model: nn.Module, packing: str = "base3") -> tuple[dict[str, Tensor], dict[str, str]]:
    """The packed layers of `model` as a file holds them: (tensors, metadata) of `ternary_packing.pack_tensors`."""
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, TernaryLinear)}
    return pack_tensors({name: layer.matrix() for name, layer in layers.items()}, packing)


def install_ternary(model: nn.Module, matrices: Iterable[tuple[str, TernaryTensor]]) -> list[str]:
    """Replace the linears that a file holds packed by `TernaryLinear`s, in place; returns the names of the tensors
    that hold them now. `matrices` come one by one (`unpack_tensors`), so that only one is unpacked at a time.

    Raises ValueError, naming the tensor, for a damaged file or one that does not fit the model.
    """
    linears = {name: (parent, attribute, linear) for name, parent, attribute, linear in _block_linears(model)}
    packed = {}
    for name, matrix in matrices:
        if name not in linears:
            raise ValueError(f"{name}: packed ternary in the file, but the model has no such linear in its layers")
        _, _, linear = linears[name]
        if matrix.codes.shape != linear.weight.shape:
            raise ValueError(f"{name}: {list(matrix.codes.shape)} in the file, expected {list(linear.weight.shape)}")
        packed[name] = TernaryLinear(matrix, name=name)  # two bits a code again
        del matrix
    for name, layer in packed.items():
        parent, attribute, _ = linears[name]
        setattr(parent, attribute, layer)
    _merge(model)
    return [f"{name}.{part}" for name in packed for part in ("codes", "scales")]


def copy_packed(model: nn.Module, other: nn.Module) -> None:
    """Give `other`, a decoder of the same layers, copies of the packed layers of `model`."""
    for name, layer in model.named_modules():
        if isinstance(layer, TernaryLinear):
            parent, _, attribute = name.rpartition(".")
            setattr(other.get_submodule(parent), attribute, copy.deepcopy(layer))
    _merge(other)


def _multiply(x: Tensor, codes: Tensor, scales: Tensor, group_size: int, activations: str | None) -> Tensor:
    """x times the packed matrix, by the implementation that can do it and is the fastest here."""
    obstacle = "" if group_size == KERNEL_GROUP_SIZE else f"group_size {group_size}"
    operation = "ternary_matmul" if activations == "float" else "ternary_matmul_int8"
    chosen = backend.choose_for(operation, x, obstacle=obstacle)
    if activations is None and chosen != "numba":  # elsewhere rounding the activations gains nothing
        operation = "ternary_matmul"
        chosen = backend.choose_for(operation, x, obstacle=obstacle)
    return cast(Tensor, backend.kernel(operation, chosen)(x, codes, scales, group_size))


def _block_linears(model: nn.Module) -> Iterator[tuple[str, nn.Module, str, nn.Linear]]:
    """(full name, parent, attribute, layer) of every nn.Linear inside `model.model.layers`."""
    layers = model.get_submodule("model.layers")
    found = False
    for path, parent in layers.named_modules(prefix="model.layers"):
        for attribute, child in parent.named_children():
            if isinstance(child, nn.Linear):
                found = True
                if child.bias is not None:
                    raise ValueError(f"{path}.{attribute} has a bias: ternary layers have none")
                yield f"{path}.{attribute}", parent, attribute, child
    if not found:
        raise ValueError("model.model.layers holds no nn.Linear: is the model ternary already?")


def _merge(model: nn.Module) -> None:
    """Fill the attributes that a module's `merges` names, where all the parts are packed."""
    for parent in model.modules():
        for attribute, names in getattr(parent, "merges", {}).items():
            parts = [getattr(parent, name) for name in names]
            if all(isinstance(part, TernaryLinear) for part in parts):
                setattr(parent, attribute, MergedTernaryLinear(cast(list[TernaryLinear], parts)))


def _keep_float16(module: Any, fn: Callable[[Tensor], Tensor], apply: Callable[..., Any], recurse: bool) -> Any:
    """Apply `fn` (a move or a cast) to a module's buffers, but take back what it does to the dtype of `scales`."""
    scales = module.scales
    apply(fn, recurse)
    if module.scales.dtype != scales.dtype:
        module.scales = scales.to(module.scales.device)
    return module
