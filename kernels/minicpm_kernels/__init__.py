"""Fast twins of functions in `minicpm_ref`: same names, same signatures, written in Triton and numba.

`minicpm_ref` derives and is the oracle; a module here is swapped in for one of its functions by
`minicpm_ref.backend`, the one place that decides. Importing this package imports neither triton nor numba, so that it
works where they are not installed; the submodules do.

Kernels:

- `ops`   RMSNorm, alone and fused with the residual add
- `sparse`   InfLLM-V2: `blocks` chooses, `attention` attends, `tree` does so for drafts; the kernels of the last two
  are in `one_token`, `union` (prompts) and `backward`, what they share in `arguments` and `windows`. `cpu` has both
  stages on a CPU, for inference; its machine code is put together in `_cpu_vectors`
- `lowbit`   BitCPM: `ternary_triton`, `ternary_triton_int8` multiply packed ternary weights with floats, or with
  activations rounded to int8, on a GPU; the former's assembly is in `_ternary_triton_asm`. `ternary_cpu` is the same on
  a CPU, in int8; its machine code is put together in `_ternary_cpu_codegen`
- `engine`   CPM.cu on a CPU: a whole decode step as one compiled function; `decoder` is what an executor uses

What they rest on:

- `registry`   which kernel stands for which reference, and with which settings it must compile
- `checks`     what a wrapper asks of its arguments before it launches a kernel
- `cpu_threads`   how many threads a kernel on the CPU uses
- `disk_cache`   machine code that numba keeps on disk, where it finds a place for it
- `testing`    how a kernel is judged: poisoned outputs, guarded inputs, error relative to the reference
- `aot`        ahead-of-time compilation for GPUs that are not here: shared memory, registers, spills, PTX
"""
