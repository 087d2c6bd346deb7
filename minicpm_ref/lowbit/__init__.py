"""Few bits a weight: BitCPM's -1, 0 and 1 with one scale a group, how they are packed, and the layers that hold them;
and rounding to four and eight bits."""

from minicpm_ref.lowbit.int4 import quantize_int4, quantize_int4_minimum
from minicpm_ref.lowbit.int8 import quantize_int8
from minicpm_ref.lowbit.layers import TernaryLinear, quantization_aware, to_ternary
from minicpm_ref.lowbit.packing import TernaryTensor, pack, size_report, unpack
from minicpm_ref.lowbit.ternary import dequantize, fake_quantize, quantize, ternary_matmul, ternary_matmul_int8

__all__ = [
    "TernaryLinear",
    "TernaryTensor",
    "dequantize",
    "fake_quantize",
    "pack",
    "quantization_aware",
    "quantize",
    "quantize_int4",
    "quantize_int4_minimum",
    "quantize_int8",
    "size_report",
    "ternary_matmul",
    "ternary_matmul_int8",
    "to_ternary",
    "unpack",
]
