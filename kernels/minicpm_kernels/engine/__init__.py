"""The compiled engine of a CPU: one function for a whole step of the decoder, on threads that stay.

In the order in which they build on one another: `llvm` (a vocabulary), `memory`, `compiling`; `formats` (how weights
are stored), `weights` (a model as one stream), `instruction_sets`, `operands` (activations on their way into a
product), `products`, `embedding`; `attention` (over the cache), `threads`; `state` and `step` (everything together);
and `decoder`, which is what `minicpm_ref.engine.cpu_executor` uses.
"""

from minicpm_kernels.engine.decoder import CompiledDecoder, Segment, Sizes
from minicpm_kernels.engine.weights import Codes, LayerMatrices

__all__ = ["Codes", "CompiledDecoder", "LayerMatrices", "Segment", "Sizes"]
