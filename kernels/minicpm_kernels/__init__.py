"""Fast twins of functions in `minicpm_ref`: same names, same signatures, written in Triton and numba.

`minicpm_ref` derives and is the oracle; a module here is swapped in for one of its functions by
`minicpm_ref.backend`, the one place that decides. Importing this package imports neither triton nor numba, so that it
works where they are not installed; the submodules do.

Kernels:

- `rms_norm`   RMSNorm, alone and fused with the residual add
- `sparse_select`, `sparse_attention`   InfLLM-V2: choosing blocks, and attending to them; the latter's kernels are in
  `sparse_token` (one token), `sparse_union` (prompts) and `sparse_backward`, what they share in `sparse_arguments`
- `sparse_cpu`   both stages on a CPU, for inference; its machine code is put together in `_sparse_cpu_codegen`
- `ternary_triton`, `ternary_triton_int8`   BitCPM on a GPU: packed ternary weights times floats, or times activations
  rounded to int8; the former's assembly is in `_ternary_triton_asm`
- `ternary_cpu`   the same on a CPU, in int8; its machine code is put together in `_ternary_cpu_codegen`

What they rest on:

- `registry`   which kernel stands for which reference, and with which settings it must compile
- `checks`     what a wrapper asks of its arguments before it launches a kernel
- `cpu_threads`   how many threads a kernel on the CPU uses
- `testing`    how a kernel is judged: poisoned outputs, guarded inputs, error relative to the reference
- `aot`        ahead-of-time compilation for GPUs that are not here: shared memory, registers, spills, PTX
"""
