"""patch_model on BERT and GPT-2 with the kernels: as close to fp32 eager as 16-bit eager is."""

import copy

import pytest
import torch
from transformers import (
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    StaticCache,
)

from hf_flashattn import patch_model, patched

VOCABULARY = 200


def bert(**config):
    sizes = {"hidden_size": 128, "num_attention_heads": 2, "num_hidden_layers": 2}
    return BertForMaskedLM(
        BertConfig(vocab_size=VOCABULARY, intermediate_size=128, **sizes, **config)
    )


def gpt2(**config):
    sizes = {"n_embd": 128, "n_head": 2, "n_layer": 2}
    return GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, **sizes, **config))


def llama(**config):
    sizes = {"hidden_size": 128, "num_attention_heads": 2, "num_hidden_layers": 2}
    grouped = {"num_key_value_heads": 1, "head_dim": 128, "intermediate_size": 128}
    return LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, **sizes, **grouped, **config))


MODELS = {
    "bert": bert,
    "bert_decoder": lambda **c: bert(is_decoder=True, **c),
    "gpt2": gpt2,
    "llama": llama,
    "gpt2_inverse_layer": lambda **c: gpt2(scale_attn_by_inverse_layer_idx=True, **c),
}


def masks(length):
    right = torch.ones(3, length, dtype=torch.long)
    right[1, length // 2 :] = 0
    right[2, 7:] = 0
    holed = torch.ones(3, length, dtype=torch.long)
    holed[0, 5:9] = 0
    holed[1, : length // 3] = 0
    return {"none": None, "right": right, "left": right.flip(1), "holed": holed}


def no_dropout(kind):
    if kind.startswith("bert"):
        return {"attention_probs_dropout_prob": 0.0, "hidden_dropout_prob": 0.0}
    if kind == "llama":
        return {}
    return {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}


def run(model, ids, mask, labels):
    model.zero_grad()
    output = model(input_ids=ids, attention_mask=mask, labels=labels)
    output.loss.backward()
    valid = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
    flat = torch.cat([p.grad.float().flatten() for p in model.parameters() if p.grad is not None])
    return output.logits.float()[valid], flat


def labels_for(ids, mask):
    """A causal model predicts a token from the one before: what stands at a pad is anybody's."""
    if mask is None:
        return ids
    seen = mask.bool() & torch.nn.functional.pad(mask, (1, 0), value=1)[:, :-1].bool()
    return ids.masked_fill(~seen, -100)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("padding", ["none", "right", "left", "holed"])
@pytest.mark.parametrize("kind", MODELS)
def test_close_to_eager(kind, padding, dtype):
    torch.manual_seed(0)
    exact = MODELS[kind](**no_dropout(kind)).cuda().train()
    exact.set_attn_implementation("eager")
    low = copy.deepcopy(exact).to(dtype)
    fast = copy.deepcopy(low)
    report = patch_model(fast)
    ids = torch.randint(VOCABULARY, (3, 150), device="cuda")
    mask = masks(150)[padding]
    mask = None if mask is None else mask.cuda()
    labels = labels_for(ids, mask)
    want, eager, got = (run(m, ids, mask, labels) for m in (exact, low, fast))
    for w, e, g in zip(want, eager, got, strict=True):
        assert torch.isfinite(g).all()
        assert (g - w).norm() <= 2 * (e - w).norm() + 1e-6
    report.assert_all_on_kernel()


@pytest.mark.parametrize("kind", ["bert", "gpt2"])
def test_autocast_training_with_dropout(kind):
    """A few steps of autocast training: on the kernel in every layer, and the loss falls."""
    torch.manual_seed(0)
    model = MODELS[kind]().cuda().train()
    report = patch_model(model, strict=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    ids = torch.randint(VOCABULARY, (4, 130), device="cuda")
    losses = []
    for _ in range(30):
        with torch.autocast("cuda", dtype=torch.bfloat16):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    report.assert_all_on_kernel()
    assert losses[-1] < 0.9 * losses[0]


def test_fp32_falls_back_and_says_why():
    model = bert().cuda().eval()
    report = patch_model(model)
    with torch.no_grad():
        model(input_ids=torch.randint(VOCABULARY, (2, 20), device="cuda"))
    assert "float32" in str(report)
    with pytest.raises(Exception, match="float32"):
        report.assert_all_on_kernel()


def test_generate_matches_eager():
    """Greedy tokens with left padding, where the two best logits are not within rounding."""
    torch.manual_seed(0)
    model = gpt2().cuda().eval().half()
    model.generation_config.pad_token_id = 0
    ids = torch.randint(1, VOCABULARY, (3, 12), device="cuda")
    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    options = {"attention_mask": mask, "max_new_tokens": 12, "do_sample": False,
               "output_logits": True, "return_dict_in_generate": True}  # fmt: skip
    model.set_attn_implementation("eager")
    want = model.generate(ids, **options)
    with patched(model):
        got = model.generate(ids, **options)
    for step, (a, b) in enumerate(zip(want.logits, got.logits, strict=True)):
        torch.testing.assert_close(a, b, rtol=2e-2, atol=2e-2)
        chosen = slice(0, ids.shape[1] + step + 1)
        if not torch.equal(want.sequences[:, chosen], got.sequences[:, chosen]):
            best = a.topk(2).values
            assert (best[:, 0] - best[:, 1]).min() < 2e-2, "tokens differ without a near tie"
            break


@pytest.mark.parametrize("kind", ["bert", "gpt2"])
def test_compile_fullgraph(kind):
    torch.manual_seed(0)
    model = MODELS[kind]().cuda().eval().to(torch.bfloat16)
    patch_model(model)
    ids = torch.randint(VOCABULARY, (2, 64), device="cuda")
    mask = masks(64)["left"][:2].cuda()
    with torch.no_grad():
        want = model(input_ids=ids, attention_mask=mask).logits
        compiled = torch.compile(model, fullgraph=True)
        got = compiled(input_ids=ids, attention_mask=mask).logits
    valid = mask.bool()
    torch.testing.assert_close(got[valid], want[valid], rtol=5e-2, atol=5e-2)


def packed(lengths):
    """Inputs of one row that holds documents, with what a flattening collator says of them."""
    cu = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32).cuda()
    return {
        "input_ids": torch.randint(VOCABULARY, (1, sum(lengths)), device="cuda"),
        "position_ids": torch.cat([torch.arange(n) for n in lengths])[None].cuda(),
        "cu_seq_lens_q": cu,
        "cu_seq_lens_k": cu,
        "max_length_q": max(lengths),
        "max_length_k": max(lengths),
    }


def low_for_compile(kind):
    model = MODELS[kind](**no_dropout(kind)).cuda().to(torch.bfloat16)
    # GPT-2 states no loss type, and what Transformers 5.17 says to that breaks the graph.
    model.loss_type = "ForCausalLM" if kind == "gpt2" else model.loss_type
    return model


@pytest.mark.parametrize("kind", ["bert", "gpt2"])
def test_compiled_packing_stays_on_the_kernels(kind):
    model = low_for_compile(kind)
    report = patch_model(model, strict=True)
    compiled = torch.compile(model, fullgraph=True)
    for lengths in ([40, 24], [7, 50, 7], [20, 12, 32]):
        inputs = packed(lengths)
        labels = inputs["input_ids"]
        grads = []
        for run_ in (model, compiled):
            model.zero_grad()
            out = run_(**inputs, labels=labels)
            out.loss.backward()
            grads.append((out.logits, next(model.parameters()).grad.clone()))
        for want, got in zip(*grads, strict=True):
            torch.testing.assert_close(got, want, rtol=5e-2, atol=5e-2)
    assert all(row.runs == "kernel" for row in report.rows if row.calls.total), report


@pytest.mark.parametrize("padding", ["right", "left", "holed"])
@pytest.mark.parametrize("kind", ["bert", "gpt2", "llama"])
def test_compiled_training_with_padding(kind, padding):
    """A 2-D mask becomes bits that the kernels read: on them, with eager's gradients."""
    model = low_for_compile(kind)
    report = patch_model(model, strict=True)
    ids, mask = torch.randint(VOCABULARY, (3, 200), device="cuda"), masks(200)[padding].cuda()
    labels = labels_for(ids, mask)
    want_logits, want = run(model, ids, mask, labels)
    got_logits, got = run(torch.compile(model, fullgraph=True), ids, mask, labels)
    torch.testing.assert_close(got_logits, want_logits, rtol=5e-2, atol=5e-2)
    assert (got - want).norm() < 2e-2 * want.norm()
    assert all(row.runs == "kernel" for row in report.rows if row.calls.total), report


@pytest.mark.parametrize("padding", ["none", "left", "holed"])
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_compiled_chunks_in_a_static_cache(kind, padding):
    """Keys are turned on the device: the last one that exists is the last of all."""
    model = MODELS[kind](**no_dropout(kind)).cuda().eval().to(torch.bfloat16)
    ids, mask = torch.randint(VOCABULARY, (3, 200), device="cuda"), masks(200)[padding]

    def logits(run_):
        cache = StaticCache(model.config, max_cache_len=260)
        model(input_ids=ids[:, :8], past_key_values=cache, use_cache=True)
        cache.reset()  # it has memory now: where the queries start is a tensor
        rows, start = [], 0
        for stop in (70, 130, 200):
            inputs = {"input_ids": ids[:, start:stop], "past_key_values": cache, "use_cache": True}
            inputs["position_ids"] = torch.arange(start, stop, device="cuda").expand(3, -1)
            if mask is not None:
                inputs["attention_mask"] = mask[:, :stop].cuda()
            rows.append(run_(**inputs).logits.float())
            start = stop
        return torch.cat(rows, dim=1)

    torch._dynamo.reset()
    with torch.no_grad():
        want = logits(model)
        with patched(model, strict=True) as report:
            got = logits(torch.compile(model, fullgraph=True))
            assert all(row.runs == "kernel" for row in report.rows if row.calls.total), report
    rows = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool().cuda()
    torch.testing.assert_close(got[rows], want[rows], rtol=5e-2, atol=5e-2)


@pytest.mark.parametrize("kind", ["bert", "gpt2", "llama"])
def test_a_captured_forward_with_padding(kind):
    """A CUDA graph of the whole model, with its mask: nothing in it reads the device, and a replay
    has the padding of its own time."""
    model = MODELS[kind](**no_dropout(kind)).cuda().eval().to(torch.bfloat16)
    options = {} if kind == "bert" else {"use_cache": False}
    patch_model(model, strict=True)
    inputs = {"input_ids": torch.randint(VOCABULARY, (3, 200), device="cuda")}
    inputs["attention_mask"] = masks(200)["right"].cuda()
    with torch.no_grad():
        for _ in range(2):
            model(**inputs, **options)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            got = model(**inputs, **options).logits
        for padding in ("holed", "left", "right"):
            mask = masks(200)[padding].cuda()
            inputs["attention_mask"].copy_(mask)
            graph.replay()
            want = model(**inputs, **options).logits
            rows = mask.bool()
            torch.testing.assert_close(got[rows], want[rows], rtol=5e-2, atol=5e-2)


@pytest.mark.parametrize("kind", ["bert", "gpt2"])
def test_a_captured_forward_with_packed_lengths(kind):
    """A CUDA graph of the whole model: nothing in it reads the device."""
    model = MODELS[kind](**no_dropout(kind)).cuda().eval().to(torch.bfloat16)
    options = {} if kind == "bert" else {"use_cache": False}
    patch_model(model, strict=True)
    inputs = packed([40, 24])
    with torch.no_grad():
        for _ in range(2):
            model(**inputs, **options)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            got = model(**inputs, **options).logits
        inputs["input_ids"].copy_(torch.randint_like(inputs["input_ids"], VOCABULARY))
        graph.replay()
        torch.testing.assert_close(got, model(**inputs, **options).logits, rtol=5e-2, atol=5e-2)
