"""patch_model(unpad=True) with the kernels: encoders whose layers run without padding."""

import copy
import warnings

import pytest
import torch
from test_models import VOCABULARY, bert, masks, no_dropout, run
from transformers import ModernBertConfig, ModernBertForMaskedLM

from hf_flashattn import patch_model

LENGTH = 150


def modernbert(**config):
    """A window of 32 tokens to each side in the second layer."""
    sizes = {
        "vocab_size": VOCABULARY,
        "hidden_size": 128,
        "num_attention_heads": 2,
        "num_hidden_layers": 2,
        "intermediate_size": 128,
        "local_attention": 64,
        "global_attn_every_n_layers": 2,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "cls_token_id": 1,
        "sep_token_id": 2,
    }
    return ModernBertForMaskedLM(ModernBertConfig(**(sizes | config)))


def batch(padding, rows=3):
    """(ids, mask, labels at the tokens alone) on the GPU."""
    ids = torch.randint(4, VOCABULARY, (rows, LENGTH), device="cuda")
    mask = masks(LENGTH)[padding].cuda()
    return ids, mask, ids.masked_fill(mask == 0, -100)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("padding", ["right", "left", "holed"])
@pytest.mark.parametrize("kind", ["bert", "modernbert"])
def test_close_to_eager(kind, padding, dtype):
    """Outputs at the tokens and all gradients, as near to fp32 as eager and as the padded batch."""
    torch.manual_seed(0)
    exact = (bert(**no_dropout("bert")) if kind == "bert" else modernbert()).cuda().train()
    exact.set_attn_implementation("eager")
    low = copy.deepcopy(exact).to(dtype)
    padded, unpadded = copy.deepcopy(low), copy.deepcopy(low)
    patch_model(padded)
    report = patch_model(unpadded, unpad=True)
    inputs = batch(padding)
    want, eager, before, got = (run(m, *inputs) for m in (exact, low, padded, unpadded))
    for w, e, b, g in zip(want, eager, before, got, strict=True):
        assert torch.isfinite(g).all()
        bound = 2 * (e - w).norm() + 1e-6
        assert (g - w).norm() <= bound and (g - b).norm() <= bound
    (entry,) = report.unpadding
    assert entry.unpadded == 1 and not entry.padded, str(report)
    if kind == "bert":
        report.assert_all_on_kernel()
    else:  # the windowed layer falls back, padded for its attention alone
        assert [row.runs for row in report.rows] == ["kernel", "fallback"], str(report)


def test_rows_without_tokens():
    """A row of padding alone keeps its first place, which sees nothing: finite, 0 elsewhere."""
    model = bert(**no_dropout("bert")).cuda().to(torch.bfloat16)
    report = patch_model(model, unpad=True)
    ids, mask, labels = batch("right")
    mask[0], labels[0] = 0, -100
    out = model(input_ids=ids, attention_mask=mask, labels=labels, output_hidden_states=True)
    out.loss.backward()
    assert report.unpadding[0].tokens == 1 + mask.sum()
    assert torch.isfinite(out.logits).all()
    assert all((states[0, 1:] == 0).all() for states in out.hidden_states)
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)
    report.assert_all_on_kernel()


@pytest.mark.parametrize("padding", ["right", "left", "holed"])
@pytest.mark.parametrize("kind", ["bert", "modernbert"])
def test_one_sync_per_forward(kind, padding):
    model = (bert() if kind == "bert" else modernbert()).cuda().to(torch.bfloat16).train()
    report = patch_model(model, unpad=True)
    ids, mask, _ = batch(padding)
    model(input_ids=ids, attention_mask=mask).logits.sum().backward()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            model(input_ids=ids, attention_mask=mask).logits.sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    syncs = [str(w.message) for w in caught if "synchroniz" in str(w.message)]
    assert len(syncs) == 1, syncs
    assert report.unpadding[0].unpadded == 2


@pytest.mark.parametrize("checkpointing", [False, True])
def test_autocast_training_with_dropout(checkpointing):
    """On the kernel in every layer, without padding in every step, and the loss falls."""
    torch.manual_seed(0)
    model = bert().cuda().train()
    report = patch_model(model, unpad=True, strict=True)
    if checkpointing:
        model.gradient_checkpointing_enable()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    ids, mask, labels = batch("right")
    losses = []
    for _ in range(30):
        with torch.autocast("cuda", dtype=torch.bfloat16):
            loss = model(input_ids=ids, attention_mask=mask, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    report.assert_all_on_kernel()
    assert report.unpadding[0].unpadded == 30 and not report.unpadding[0].padded
    assert losses[-1] < 0.9 * losses[0]


def test_dropout_is_reproducible():
    model = bert().cuda().to(torch.bfloat16).train()
    patch_model(model, unpad=True)
    inputs = batch("left")
    outputs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        outputs.append(run(model, *inputs)[0])
    assert torch.equal(outputs[0], outputs[1]) and not torch.equal(outputs[0], outputs[2])


def test_compiled_calls_run_padded():
    model = bert(**no_dropout("bert")).cuda().eval().to(torch.bfloat16)
    report = patch_model(model, unpad=True)
    ids, mask, _ = batch("right")
    with torch.no_grad():
        want = model(input_ids=ids, attention_mask=mask).logits
        got = torch.compile(model, fullgraph=True)(input_ids=ids, attention_mask=mask).logits
    real = mask.bool()
    torch.testing.assert_close(got[real], want[real], rtol=5e-2, atol=5e-2)
    (entry,) = report.unpadding
    assert entry.unpadded == 1 and any("torch.compile" in reason for reason in entry.padded)
