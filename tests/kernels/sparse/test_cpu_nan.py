"""A broken activation stays visible: NaN and infinity in q or k come out of the numba kernel where the reference has
them."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("numba", reason="numba is not installed")
from minicpm_kernels.sparse.cpu import sparse_attention  # noqa: E402  # imports numba
from minicpm_ref import sparse as reference  # noqa: E402
from minicpm_ref.cases.sparse import SparseAttentionCase  # noqa: E402


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["q", "k"])
@pytest.mark.parametrize("tokens", [1, 37])
def test_broken_inputs_come_out_as_nan(tokens: int, where: str, value: float) -> None:
    q, k, v, blocks, *rest = SparseAttentionCase("nan", tokens, 150).build()
    tensor = {"q": q, "k": k}[where]
    tensor[0, 0, 0] = value  # the first token, which every row of an initial block may read
    expected = reference.sparse_attention(q, k, v, blocks, *rest).isnan()
    assert expected.any()
    assert torch.equal(sparse_attention(q, k, v, blocks, *rest).isnan(), expected)
