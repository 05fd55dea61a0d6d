"""Numbers per token to cu_seqlens and back."""

from __future__ import annotations

import torch

from hf_flashattn.unpadding import packed_ids, packed_ids_unread, plan_varlen


def test_holes():
    ids = torch.tensor([[1, 0, 1, 1], [0, 0, 0, 0], [0, 1, 1, 0]])
    plan = plan_varlen(ids, ids)
    assert plan.cu_seqlens_q.tolist() == plan.cu_seqlens_k.tolist() == [0, 3, 3, 5]
    assert plan.cu_seqlens_q.dtype == torch.int32
    assert (plan.max_seqlen_q, plan.max_seqlen_k) == (3, 3)
    assert plan.index_q.tolist() == [0, 2, 3, 9, 10]
    x = torch.arange(1, 13.0).view(3, 4, 1, 1)
    packed = plan.pack_q(x)
    assert packed.flatten().tolist() == [1, 3, 4, 10, 11]
    assert torch.equal(plan.unpack(packed, 3, 4), x * (ids > 0)[..., None, None])


def test_packed_rows_are_a_view():
    ids = torch.tensor([[1, 1, 2, 3], [1, 2, 2, 2]])
    plan = plan_varlen(ids, ids)
    assert plan.cu_seqlens_q.tolist() == [0, 2, 3, 4, 5, 8, 8]
    assert plan.index_q is None and plan.max_seqlen_q == 3
    x = torch.randn(2, 4, 3, 8)
    assert plan.pack_q(x).data_ptr() == x.data_ptr()
    fused = (
        torch.randn(2, 4, 3 * 24).split(24, dim=2)[1].view(2, 4, 3, 8)
    )  # as GPT-2 cuts its projection
    assert plan.pack_q(fused).data_ptr() == fused.data_ptr()


def test_queries_and_keys_of_different_length():
    plan = plan_varlen(
        torch.ones(2, 3, dtype=torch.int32), torch.tensor([[1, 0, 1, 1, 1], [0, 0, 1, 0, 1]])
    )
    assert plan.cu_seqlens_q.tolist() == [0, 3, 6] and plan.cu_seqlens_k.tolist() == [0, 4, 6]
    assert plan.index_q is None and plan.index_k.tolist() == [0, 2, 3, 4, 7, 9]


def test_nothing_kept():
    ids = torch.zeros(2, 3, dtype=torch.long)
    plan = plan_varlen(ids, ids)
    assert plan.cu_seqlens_q.tolist() == [0, 0, 0] and plan.index_q.numel() == 0
    out = plan.unpack(plan.pack_q(torch.randn(2, 3, 1, 2)), 2, 3)
    assert out.shape == (2, 3, 1, 2) and (out == 0).all()


def test_packed_ids():
    restarting = torch.tensor([[0, 1, 2, 0, 1, 0], [0, 0, 1, 2, 3, 4]])
    expected = [[1, 1, 1, 2, 2, 3], [1, 2, 2, 2, 2, 2]]
    assert packed_ids(restarting).tolist() == packed_ids_unread(restarting).tolist() == expected
    plain, jumping, constant = (
        torch.arange(4)[None],
        torch.tensor([[0, 1, 5, 6]]),
        torch.zeros(1, 4).long(),
    )
    for not_packed in (plain, plain + 2, plain * 2, jumping, constant, restarting[:, 1:]):
        assert packed_ids(not_packed) is None
        assert (packed_ids_unread(not_packed) == 1).all()
