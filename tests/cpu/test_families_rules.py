"""Reading attention off code as it runs: every spelling, and what the notes cannot express."""

from __future__ import annotations

import importlib
import math
from pathlib import Path

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F

from hf_flashattn import FallbackError, masks
from hf_flashattn.attention import SETTINGS, Settings
from hf_flashattn.families.forward import OwnForward
from hf_flashattn.families.recognise import joined, recognise
from hf_flashattn.families.table import (
    FAMILIES,
    NO_ATTENTION,
    OUT_OF_REACH,
    WITHOUT_WEIGHTS,
    Family,
    family_of,
    is_no_attention,
    out_of_reach,
)
from hf_flashattn.notes import begin_forward
from hf_flashattn.report import calls_of

BATCH, HEADS, ROWS, DIM = 2, 4, 7, 8
COVERAGE = Path(__file__).parents[2] / "docs" / "coverage.md"
A_HOLDER = "siglip.SiglipMultiheadAttentionPoolingHead"
LOWEST = torch.finfo(torch.float32).min


class Spelled(nn.Module):
    """Self-attention whose middle is `spell(q, k, v, mask)`, (B, H, S, D) each."""

    num_attention_heads, attention_head_size = HEADS, DIM

    def __init__(self, spell):
        super().__init__()
        self.spell = spell
        self.qkv = nn.Linear(HEADS * DIM, 3 * HEADS * DIM)
        self.bias = nn.Buffer(torch.ones(16, 16, dtype=torch.bool).tril()[None, None])

    def forward(self, x, mask=None, output_attentions=False):
        q, k, v = self.qkv(x).view(*x.shape[:2], 3, HEADS, DIM).permute(2, 0, 3, 1, 4)
        out, weights = self.spell(self, q, k, v, mask)
        return out, weights if output_attentions else None


def flat(x: Tensor) -> Tensor:
    return x.reshape(BATCH * HEADS, *x.shape[2:])


def plain(m, q, k, v, mask):
    weights = F.softmax(torch.matmul(q, k.transpose(-1, -2)) / math.sqrt(DIM) + mask, dim=-1)
    return weights @ v, weights


def in_place(m, q, k, v, mask):
    scores = q @ k.mT
    scores /= math.sqrt(DIM)
    scores += mask
    return torch.softmax(scores, -1).matmul(v), None


def in_place_under_two_names(m, q, k, v, mask):
    scores = q @ k.mT
    same = scores
    same *= DIM**-0.5
    same += mask
    return torch.softmax(scores, -1).matmul(v), None


def folded(m, q, k, v, mask):
    scores = torch.bmm(flat(q * DIM**-0.5), flat(k).transpose(1, 2))
    assert scores.size() == (BATCH * HEADS, ROWS, ROWS) and scores.shape[-1] == scores.size(2)
    scores = scores.view(BATCH, HEADS, ROWS, ROWS) + mask
    weights = scores.view(BATCH * HEADS, ROWS, ROWS).softmax(dim=-1, dtype=torch.float32)
    out = torch.bmm(weights.to(v.dtype), flat(v))
    return out.view(BATCH, HEADS, ROWS, DIM), weights


def added_product(m, q, k, v, mask):
    bias = torch.zeros(BATCH * HEADS, 1, ROWS)
    scores = bias.baddbmm(batch1=flat(q), batch2=flat(k).mT, beta=1.0, alpha=DIM**-0.5)
    scores = scores.view(BATCH, HEADS, ROWS, -1) + mask
    return nn.Softmax(dim=-1)(scores.float()).type_as(v) @ v, None


def einsum(m, q, k, v, mask):
    scores = torch.einsum("bsij,bsjk->bsik", q, k.mT) * DIM**-0.5 + mask
    return torch.einsum("bsij,bsjk->bsik", scores.softmax(-1), v), None


def filled(m, q, k, v, mask):
    scores = q @ k.mT * DIM**-0.5
    hidden = (mask < 0).expand_as(scores)
    scores.masked_fill_(hidden, LOWEST)
    return scores.softmax(-1) @ v, None


def mask_before_scale(m, q, k, v, mask):
    return ((q @ k.mT + mask) / math.sqrt(DIM)).softmax(-1) @ v, None


def einsum_of_rows(m, q, k, v, mask):
    scores = torch.einsum("bhlk,bhtk->bhlt", [q, k]) * DIM**-0.5 + mask
    return torch.einsum("bhlt,bhtv->bhlv", [scores.softmax(-1), v]), None


def scaled_by_a_tensor(m, q, k, v, mask):
    return ((q @ k.mT) * torch.tensor(0.3) + mask).softmax(-1) @ v, None


def scaled_by_head(m, q, k, v, mask):
    factor = torch.linspace(0.1, 0.5, HEADS).view(HEADS, 1, 1)
    return ((q @ k.mT) * factor + mask).softmax(-1) @ v, None


def zeros_after_softmax(m, q, k, v, mask):
    hidden = mask < 0
    weights = (q @ k.mT).masked_fill(hidden, LOWEST).softmax(-1).masked_fill(hidden, 0.0)
    return weights @ v, None


def values_first(m, q, k, v, mask):
    """As convolutions have them, (B, D, S), of folded heads."""
    keys = mask.expand(BATCH, HEADS, 1, ROWS).reshape(BATCH * HEADS, 1, ROWS)
    weights = (torch.bmm(flat(q), flat(k).mT) * DIM**-0.5 + keys).softmax(dim=2)
    out = torch.bmm(flat(v).permute(0, 2, 1), weights.permute(0, 2, 1)).permute(0, 2, 1)
    return out.view(BATCH, HEADS, ROWS, DIM), None


def in_one_call(m, q, k, v, mask):
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=0.5), None


def in_one_call_boolean(m, q, k, v, mask):
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask == 0), None


SPELLINGS = [
    plain,
    in_place,
    in_place_under_two_names,
    folded,
    added_product,
    einsum,
    filled,
    mask_before_scale,
    einsum_of_rows,
    scaled_by_a_tensor,
    scaled_by_head,
    zeros_after_softmax,
    values_first,
    in_one_call,
    in_one_call_boolean,
]


def triangle_where(m, q, k, v, mask):
    scores = torch.matmul(q, k.mT)
    seen = m.bias[:, :, :ROWS, :ROWS]
    scores = torch.where(seen, scores, torch.tensor(LOWEST))
    return (scores + mask).softmax(-1) @ v, None


def triangle_times(m, q, k, v, mask):
    scores = q @ k.mT
    b = m.bias[:, :, : scores.size(-2), : scores.size(-1)]
    scores = scores * b + -1e4 * (~b)
    return (scores + mask).softmax(-1) @ v, None


# What the notes cannot express: computed as written.


def capped(m, q, k, v, mask):
    return (torch.tanh(q @ k.mT / 5) * 5 + mask).softmax(-1) @ v, None


def gated(m, q, k, v, mask):
    weights = (q @ k.mT + mask).softmax(-1)
    return (weights * 0.5) @ v, weights


def indexed(m, q, k, v, mask):
    weights = (q @ k.mT + mask).softmax(-1)
    return weights[:, :, :, :4] @ v[:, :, :4], weights


def scaled_by_key(m, q, k, v, mask):
    return ((q @ k.mT) * torch.linspace(0.1, 0.5, ROWS) + mask).softmax(-1) @ v, None


def scaled_by_head_of_folded(m, q, k, v, mask):
    scores = torch.bmm(flat(q), flat(k).mT).view(BATCH, HEADS, ROWS, ROWS)
    factor = torch.linspace(0.1, 0.5, HEADS).view(HEADS, 1, 1)
    return (scores * factor + mask).softmax(-1) @ v, None


def heads_first(m, q, k, v, mask):
    """Numbers of heads and rows of the batch in each other's places."""
    scores = (q @ k.mT).view(HEADS, BATCH, ROWS, ROWS)
    scores = scores + torch.arange(HEADS).view(HEADS, 1, 1, 1)
    return scores.view(BATCH, HEADS, ROWS, ROWS).softmax(-1) @ v, None


def thinned(m, q, k, v, mask):
    weights = (q @ k.mT + mask).softmax(-1)
    return weights.masked_fill(torch.eye(ROWS, dtype=torch.bool), 0.0) @ v, None


def sink(m, q, k, v, mask):
    scores = torch.cat([q @ k.mT + mask, torch.zeros(BATCH, HEADS, ROWS, 1)], dim=-1)
    return scores.softmax(-1)[..., :-1] @ v, None


UNKNOWN = {
    capped: "tanh",
    gated: "mul",
    indexed: "getitem",
    scaled_by_key: "mul",
    scaled_by_head_of_folded: "mul",
    heads_first: "view",
    thinned: "masked_fill",
    sink: "cat",
}


def padded_keys() -> Tensor:
    """Additive (B, 1, 1, S): the first row's last two keys are hidden."""
    mask = torch.zeros(BATCH, 1, 1, ROWS)
    mask[0, ..., -2:] = LOWEST
    return mask


def run(spell, mask, *, family=None, strict=False, fallback="sdpa", **options):
    """(patched, plain, the module) on the same input, with gradients."""
    torch.manual_seed(0)
    module = Spelled(spell)
    x = torch.randn(BATCH, ROWS, HEADS * DIM, requires_grad=True)
    results = []
    for own in (False, True):
        if own:
            module.__dict__[SETTINGS] = Settings("it", fallback, strict)
            OwnForward(module, family or Family(own_masks=True))
        out, weights = module(x, mask, **options)
        (grad,) = torch.autograd.grad(out.square().sum(), x)
        results.append((out, grad, weights))
    return results[1], results[0], module


def assert_equal(got, expected):
    for a, b in zip(got, expected, strict=True):
        if b is not None:
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("spell", SPELLINGS, ids=lambda x: x.__name__)
def test_every_spelling_runs_on_the_kernel(spell):
    got, expected, module = run(spell, padded_keys(), strict=True)
    assert_equal(got, expected)
    assert calls_of(module).cpu == 1 and calls_of(module).total == 1


@pytest.mark.parametrize("spell", [triangle_where, triangle_times], ids=lambda x: x.__name__)
def test_a_causal_pattern_in_a_buffer(spell):
    family = Family(own_masks=True, triangle="bias")
    got, expected, module = run(spell, padded_keys(), family=family, strict=True)
    assert_equal(got, expected)
    assert calls_of(module).cpu == 1


@pytest.mark.parametrize("spell", UNKNOWN, ids=lambda x: x.__name__)
def test_what_is_not_known_is_computed_as_written(spell):
    got, expected, module = run(spell, padded_keys())
    assert all(torch.equal(a, b) for a, b in zip(got[:2], expected[:2], strict=True))
    (reason,) = calls_of(module).reasons
    assert UNKNOWN[spell] in reason and calls_of(module).fallback == 1
    with pytest.raises(FallbackError, match=UNKNOWN[spell]):
        run(spell, padded_keys(), strict=True)


def test_the_wish_for_weights_runs_the_own_code():
    got, expected, module = run(plain, padded_keys(), output_attentions=True)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    (reason,) = calls_of(module).reasons
    assert "output_attentions" in reason


def test_fallback_eager_is_the_own_code():
    mask = torch.randn(BATCH, HEADS, ROWS, ROWS)  # a bias
    got, expected, module = run(plain, mask, fallback="eager")
    assert torch.equal(got[0], expected[0]) and calls_of(module).fallback == 1


def test_a_bias_of_integers():
    for mask in (torch.arange(ROWS)[None, None, None], (padded_keys() < 0).long() * -10000):
        got, expected, module = run(plain, mask)
        assert_equal(got, expected)
        assert calls_of(module).total == 1


def test_a_bias_is_scaled_with_the_scores():
    got, expected, module = run(mask_before_scale, torch.randn(BATCH, HEADS, ROWS, ROWS))
    assert_equal(got, expected)
    assert calls_of(module).fallback == 1


def test_a_bias_finer_than_the_scores_is_not_rounded():
    """MPT's ALiBi is fp32 in a model of bf16: SDPA would take it in bf16 only."""

    def spell(m, q, k, v, mask):
        weights = (q @ k.mT + mask).float().softmax(-1).to(v.dtype)
        return weights @ v, None

    module = Spelled(spell).to(torch.bfloat16)
    x = torch.randn(BATCH, ROWS, HEADS * DIM, dtype=torch.bfloat16)
    bias = torch.randn(BATCH, HEADS, ROWS, ROWS) * 100
    expected = module(x, bias)[0]
    OwnForward(module, Family(own_masks=True))
    assert torch.equal(module(x, bias)[0], expected)
    assert calls_of(module).fallback == 1


def test_a_bias_gets_its_gradient():
    bias = torch.randn(1, HEADS, ROWS, ROWS, requires_grad=True)
    module = Spelled(plain)
    x = torch.randn(BATCH, ROWS, HEADS * DIM)
    (want,) = torch.autograd.grad(module(x, bias)[0].square().sum(), bias)
    OwnForward(module, Family(own_masks=True))
    (got,) = torch.autograd.grad(module(x, bias)[0].square().sum(), bias)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_products_before_the_scores_are_skipped():
    def spell(m, q, k, v, mask):
        gate = torch.matmul(q.mT, k)
        return plain(m, q @ gate.softmax(-1).detach(), k, v, mask)

    got, expected, module = run(spell, padded_keys(), family=Family(own_masks=True, skips=2))
    assert_equal(got, expected)
    assert calls_of(module).cpu == 1


def test_it_stands_aside_for_what_came_before_and_after():
    """Accelerate wraps a forward that is there, and may be there first."""

    def wrap(module, log, name):
        inner = module.forward

        def wrapped(*args, **kwargs):
            log.append(name)
            return inner(*args, **kwargs)

        module.forward = wrapped
        return wrapped

    module, log = Spelled(plain), []
    x, mask = torch.randn(BATCH, ROWS, HEADS * DIM), padded_keys()
    expected = module(x, mask)[0]
    first = wrap(module, log, "before")
    own = OwnForward(module, Family(own_masks=True))
    last = wrap(module, log, "after")
    torch.testing.assert_close(module(x, mask)[0], expected, rtol=1e-5, atol=1e-5)
    assert log == ["after", "before"] and calls_of(module).total == 1
    own.remove()
    assert torch.equal(module(x, mask)[0], expected)
    assert module.__dict__["forward"] is last and calls_of(module).total == 1
    module.forward = own
    own.remove()
    assert module.__dict__["forward"] is first


# ---- masks ---------------------------------------------------------------------------------------


def test_recognised_masks():
    keys = padded_keys()
    pattern = recognise(keys)
    assert pattern.kept.equal(keys[:, 0, 0] == 0) and not pattern.causal
    assert recognise(keys) is pattern and recognise(keys.expand(-1, 4, ROWS, -1)) is pattern
    assert pattern.carrier(BATCH, ROWS) is pattern.carrier(BATCH, ROWS)
    below = torch.ones(ROWS, ROWS, dtype=torch.bool).tril()
    causal = (keys == 0) & below
    for found in (
        recognise(causal),
        recognise(~causal, hides=True),
        recognise(torch.zeros(BATCH, 1, ROWS, ROWS).masked_fill(~causal, -1e4)),
        joined([recognise(keys), recognise(below[None, None])]),
    ):
        assert found.causal and found.kept.expand(BATCH, -1).equal(keys[:, 0, 0] == 0)
    everything = recognise(torch.zeros(1, 1, ROWS, ROWS))
    assert not everything.causal and everything.carrier(BATCH, ROWS) is None


def test_a_mask_that_was_written_to_is_read_again():
    keys = padded_keys()
    first = recognise(keys)
    keys[1, ..., 0] = LOWEST
    assert recognise(keys) is not first and not recognise(keys).kept[1, 0]


def test_nobody_counts_what_is_written_to_an_inference_tensor():
    """Its notes last for one forward, and serve a training step as well."""
    with torch.inference_mode():
        keys = padded_keys().clone()
        first = recognise(keys)
        assert recognise(keys) is first
        carrier = first.carrier(BATCH, ROWS)
        begin_forward()
        keys[1, ..., 0] = LOWEST
        assert recognise(keys) is not first and not recognise(keys).kept[1, 0]
    assert not carrier.is_inference() and not masks.recall(carrier).start.is_inference()


@pytest.mark.parametrize(
    "mask",
    [
        torch.randn(BATCH, 1, ROWS, ROWS),
        torch.zeros(BATCH, 1, ROWS, ROWS, requires_grad=True),
        torch.zeros(BATCH, 1, 1, ROWS).index_fill(3, torch.tensor(1), -5.0),
        torch.ones(1, 1, ROWS, ROWS, dtype=torch.bool).tril(1),
        torch.rand(1, HEADS, ROWS, ROWS) > 0.5,
        torch.zeros(BATCH, ROWS, ROWS),
    ],
    ids=["bias", "learned", "weak", "one_ahead", "by_head", "3d"],
)
def test_other_masks_are_not_recognised(mask):
    assert recognise(mask) is None


# ---- the table -----------------------------------------------------------------------------------


def class_of(key: str) -> type | None:
    """The class of a line; its module may lie in the folder of a larger model, as blip_text does.

    None, or skipped, in another Transformers than docs/coverage.md was made with.
    """
    if key.startswith("timm."):
        pytest.importorskip("timm")
        home, _, name = key.rpartition(".")
        return getattr(importlib.import_module(home), name, None)
    module, name = key.split(".")
    places = list(Path(transformers.__file__).parent.glob(f"models/*/modeling_{module}.py"))
    if not places and f"Transformers {transformers.__version__}," not in COVERAGE.read_text():
        pytest.skip(f"Transformers {transformers.__version__} has no modeling_{module}")
    home = importlib.import_module(f"transformers.models.{places[0].parent.name}.modeling_{module}")
    return getattr(home, name, None)


@pytest.mark.parametrize("key", [*FAMILIES, *OUT_OF_REACH, *sorted(WITHOUT_WEIGHTS | NO_ATTENTION)])
def test_every_line_of_the_table_names_a_class(key):
    """A class that is gone, or dispatches now, is fine in one version but not in all."""
    cls = class_of(key)
    assert isinstance(cls, type), key
    if key in FAMILIES:
        assert family_of(cls) is FAMILIES[key]
    elif key in OUT_OF_REACH:
        assert family_of(cls) is None and OUT_OF_REACH[key] in out_of_reach(cls)
    elif key in WITHOUT_WEIGHTS:
        assert family_of(nn.MultiheadAttention, cls) is not None
    else:
        assert is_no_attention(cls)


# ---- attention in one call of torch --------------------------------------------------------------


def causal_in_one_call(m, q, k, v, mask):
    return F.scaled_dot_product_attention(q, k, v, is_causal=True), None


def test_one_call_that_is_causal():
    got, expected, module = run(causal_in_one_call, None, strict=True)
    assert_equal(got, expected)
    assert calls_of(module).cpu == 1


def test_one_call_with_a_bias_falls_back_and_gives_it_its_gradient():
    bias = torch.randn(1, HEADS, ROWS, ROWS, requires_grad=True)
    module = Spelled(in_one_call)
    x = torch.randn(BATCH, ROWS, HEADS * DIM)
    (want,) = torch.autograd.grad(module(x, bias)[0].square().sum(), bias)
    OwnForward(module, Family(own_masks=True))
    (got,) = torch.autograd.grad(module(x, bias)[0].square().sum(), bias)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    assert calls_of(module).fallback == 1


def test_one_call_that_torch_aligns_otherwise_is_left_to_torch():
    """Causal of fewer queries than keys: torch's first query sees the first key, ours more."""

    def spell(m, q, k, v, mask):
        return F.scaled_dot_product_attention(q[:, :, :3], k, v, is_causal=True), None

    got, expected, module = run(spell, None)
    assert torch.equal(got[0], expected[0])
    assert calls_of(module).reasons == {"its own code has no scores": 1}


class Holder(nn.Module):
    """A class that does without the weights, as the table says of its name."""

    def __init__(self, **options):
        super().__init__()
        self.attention = nn.MultiheadAttention(HEADS * DIM, HEADS, **options)

    def forward(self, *args, **kwargs):
        return self.attention(*args, **kwargs)[0]


@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("masked", ["not", "keys", "pairs", "heads"])
def test_torchs_multihead_attention(masked, batch_first, need_weights):
    torch.manual_seed(0)
    holder = Holder(batch_first=batch_first)
    q, k = torch.randn(2, 5, HEADS * DIM, requires_grad=True), torch.randn(2, ROWS, HEADS * DIM)
    masks: dict = {"need_weights": need_weights}
    if masked == "keys":
        masks["key_padding_mask"] = torch.arange(ROWS) >= torch.tensor([[ROWS], [4]])
    elif masked == "pairs":
        masks["attn_mask"] = (torch.arange(ROWS) > 3).expand(5, ROWS)
    elif masked == "heads":
        masks["attn_mask"] = torch.randn(2 * HEADS, 5, ROWS)
    args = (q, k, k) if batch_first else (q.mT.permute(2, 0, 1), *[k.transpose(0, 1)] * 2)
    want = holder(*args, **masks)
    (want_grad,) = torch.autograd.grad(want.square().sum(), q)
    own = OwnForward(holder.attention, family_of(nn.MultiheadAttention, class_of(A_HOLDER)))
    got = holder(*args, **masks)
    (got_grad,) = torch.autograd.grad(got.square().sum(), q)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(got_grad, want_grad, rtol=1e-5, atol=1e-5)
    calls = calls_of(holder.attention)
    assert (calls.cpu, calls.fallback) == ((0, 1) if masked == "heads" else (1, 0))
    own.remove()
    assert torch.equal(holder(*args, **masks), want)


def test_torchs_multihead_attention_with_more_keys_is_left_to_torch():
    holder = Holder(add_bias_kv=True)
    x = torch.randn(ROWS, 2, HEADS * DIM)
    want = holder(x, x, x)
    OwnForward(holder.attention, family_of(nn.MultiheadAttention, class_of(A_HOLDER)))
    assert torch.equal(holder(x, x, x), want)
    assert calls_of(holder.attention).fallback == 1


def test_torchs_multihead_attention_elsewhere_says_why_not():
    assert family_of(nn.MultiheadAttention, Holder) is None
    assert "may use its attention weights" in out_of_reach(nn.MultiheadAttention)


def test_a_class_of_the_same_name_elsewhere_is_left_alone():
    other = type("BloomAttention", (nn.Module,), {"__module__": "remote.modeling_bloom"})
    assert family_of(other) is None
    assert out_of_reach(other) == "BloomAttention has attention code of its own"


@pytest.mark.parametrize("biased", [False, True])
def test_layoutlmv2s_layer(biased):
    """By itself: the model needs detectron2. Its masks are True where hidden."""
    from transformers import LayoutLMv2Config
    from transformers.models.layoutlmv2.modeling_layoutlmv2 import LayoutLMv2SelfAttention

    torch.manual_seed(0)
    config = LayoutLMv2Config(
        hidden_size=HEADS * DIM,
        num_attention_heads=HEADS,
        attention_probs_dropout_prob=0.0,
        has_relative_attention_bias=biased,
        has_spatial_attention_bias=biased,
    )
    module = LayoutLMv2SelfAttention(config).eval()
    bias = torch.randn(BATCH, HEADS, ROWS, ROWS)
    options = {"rel_pos": bias, "rel_2d_pos": bias} if biased else {}
    x, mask = torch.randn(BATCH, ROWS, HEADS * DIM), padded_keys()
    expected = module(x, mask, **options)[0]
    OwnForward(module, family_of(LayoutLMv2SelfAttention))
    torch.testing.assert_close(module(x, mask, **options)[0], expected, rtol=1e-5, atol=1e-5)
    assert calls_of(module).fallback == biased and calls_of(module).total == 1
