"""Machine code that numba keeps on disk, where it finds a place for it.

Problem. With `cache=True` numba refuses to decorate a function at all when neither the package's folder nor the user's
cache folder can be written: in a read-only container, on a cluster's shared installation.

Idea. Ask for the cache, and where there is no place for one compile without: the kernels work, and every process pays
for compiling again. NUMBA_CACHE_DIR names a folder that can be written.

Left out: a folder of our own under the system's temporary one. Its name could be guessed, and what lies there is
executed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba


def cached_njit(*signature: Any, **options: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorator: `numba.njit` without Python's lock and with C's division, cached on disk where that is possible."""

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        def build(cache: bool) -> Callable[..., Any]:
            return numba.njit(*signature, cache=cache, nogil=True, error_model="numpy", **options)(function)

        try:
            return build(cache=True)
        except RuntimeError as error:
            if "no locator available" not in str(error):
                raise
            return build(cache=False)

    return decorate
