"""What the real binding hands to the kernels for each layout, seen by launchers that do nothing.

The library takes the CPU's place for a whole process, so all that is seen comes from one of its
own: this file, run as a program, prints it as JSON.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch

from hf_flashattn import (
    build,
    flash_attn_func,
    flash_attn_varlen_func,
    key_bits_of,
    masks,
    ops,
)
from hf_flashattn.attention import attention_forward

ROOT = Path(__file__).resolve().parents[2]
B, S, H, HKV, D = 2, 6, 4, 2, 16


def heads_first(seqlen=S, heads=H):
    """(B, H, S, D) as a projection leaves it: in memory (B, S, H, D)."""
    return torch.randn(B, seqlen, heads, D, dtype=torch.bfloat16).transpose(1, 2)


def show(x):
    """What the kernel should be given for x (B, H, S, D)."""
    batch, head, seq, _ = x.stride()
    return {"data": x.data_ptr(), "strides": [batch, seq, head]}


def observe():
    """Case -> what the launcher saw, and what it should have."""
    import host_binding

    def launch():
        last = host_binding.last_launch()
        return {
            name: vars(x) if isinstance(x, host_binding.View) else x for name, x in last.items()
        }

    seen = {}

    def note(case, result, **wanted):
        seen[case] = {"out": [*result.shape], "strides": [*result.stride()], "launch": launch()}
        seen[case]["wanted"] = {name: show(x) for name, x in wanted.items()}

    layer = torch.nn.Module()
    layer.is_causal = False
    q, k, v = heads_first(), heads_first(9, HKV), heads_first(9, HKV)
    last = [x.transpose(1, 2) for x in (q, k, v)]
    out = flash_attn_func(*last)
    note("flash_attn_func", out, q=q, k=k, v=v, out=out.transpose(1, 2))
    out = attention_forward(layer, q, k, v, None)[0]
    note("layer", out, q=q, k=k, v=v, out=out.transpose(1, 2))
    block = [x.contiguous() for x in (q, k, v)]  # a cache's layout
    out = attention_forward(layer, *block, None)[0]
    note("layer, heads in blocks", out, **dict(zip("qkv", block, strict=True)))
    fused = torch.randn(B, S, 3, H, D, dtype=torch.bfloat16).transpose(1, 3)
    parts = fused.unbind(2)
    out = attention_forward(layer, *parts, None)[0]
    note("layer, fused", out, **dict(zip("qkv", parts, strict=True)))

    base = torch.randn(B * H * S * D + 1, dtype=torch.bfloat16)
    unaligned = base[1:].view(B, S, H, D).transpose(1, 2)
    odd = torch.randn(B, S, H, D + 1, dtype=torch.bfloat16)[..., :D].transpose(1, 2)
    expanded = heads_first(heads=1).expand(-1, H, -1, -1)
    out = attention_forward(layer, unaligned, odd, expanded, None)[0]
    note("layer, copied", out)
    seen["layer, copied"]["inputs"] = [x.data_ptr() for x in (unaligned, odd, expanded)]
    for name, bad in (("unaligned", unaligned), ("odd", odd)):
        good = [x.transpose(1, 2) for x in (q, q)]
        try:
            flash_attn_func(bad.transpose(1, 2), *good)
            seen[name] = "no error"
        except RuntimeError as error:  # the library's; Python's checks look at real CUDA tensors
            seen[name] = str(error)

    start, length = (torch.tensor(x, dtype=torch.int32) for x in ([0, 1], [5, 3]))
    ops.call_dense(q, k, v, 0.25, False, True, start, length, 0.0, False)
    seen["range"] = {"launch": launch(), "wanted": [start.data_ptr(), length.data_ptr()]}
    ops.call_dense(q, k, v, 0.25, False, True, None, length, 0.0, False)
    seen["length alone"] = {"launch": launch(), "wanted": [0, length.data_ptr()]}

    kept = torch.rand(B, 9) < 0.5
    start, length, bits = key_bits_of(kept)
    wide = torch.cat([bits, bits, bits], dim=1)[:, 1:2]  # words of a carrier are no neighbours
    for case, words in (("bits", bits), ("bits of a carrier", wide)):
        learnt = [x.detach().requires_grad_() for x in last]
        keys = {"key_start": start, "key_len": length, "key_bits": words}
        out = flash_attn_func(*learnt, **keys)
        seen[case] = {"launches": [launch()], "wanted": [x.data_ptr() for x in keys.values()]}
        seen[case]["wanted"].append(words.stride(0))
        torch.autograd.grad(out, learnt, torch.ones_like(out))
        seen[case]["launches"].append(launch())
    mask = masks.encode_bits(kept, causal=False)
    attention_forward(layer, q, k, v, mask)
    seen["layer, bits"] = launch()["key_bits"] == masks.recall(mask).bits.data_ptr()
    for case, bad in (
        ("bits alone", {"key_bits": bits}),
        ("bits of 64 bits", {"key_bits": bits.long(), "key_start": start, "key_len": length}),
        (
            "bits of more keys",
            {"key_bits": bits.repeat(1, 2), "key_start": start, "key_len": length},
        ),
        ("bits of columns", {"key_bits": bits[:, 0], "key_start": start, "key_len": length}),
    ):
        try:
            ops.forward(*last, softmax_scale=0.25, **bad)
            seen[f"error: {case}"] = ""
        except RuntimeError as error:
            seen[f"error: {case}"] = str(error)

    for case, first in (("gradients", False), ("gradients, heads first", True)):
        learnt = [x.detach().requires_grad_() for x in ((q, k, v) if first else last)]
        out = ops.call_dense(*learnt, 0.25, False, first, None, None, 0.0, False)
        grads = torch.autograd.grad(out, learnt, torch.ones_like(out))
        shown = grads if first else [x.transpose(1, 2) for x in grads]
        note(case, out, **dict(zip(("dq", "dk", "dv"), shown, strict=True)))
        seen[case]["like"] = [g.shape == x.shape for g, x in zip(grads, learnt, strict=True)]
        seen[case]["in memory"] = [x.transpose(1, 2).is_contiguous() for x in shown]
    offsets = torch.tensor([0, 2, S], dtype=torch.int32)
    packed = [x.transpose(1, 2)[0] for x in (q, q, q)]
    out = flash_attn_varlen_func(*packed, offsets, offsets, 4, 4)
    note("packed", out)
    for case, bad in (
        ("k and v differ", (q, k, v[:, :, :-1])),
        ("heads", (q[:, :3], k, v)),
        ("batch", (q[:1], k, v)),
        ("head_dim", (q[..., :8], k, v)),
        ("dtype", (q, k.half(), v)),
        ("dimensions", (q[0], k[0], v[0])),
    ):
        try:
            ops.call_dense(*bad, 0.25, False, True, None, None, 0.0, False)
            seen[f"error: {case}"] = ""
        except RuntimeError as error:
            seen[f"error: {case}"] = str(error)
    return seen


@pytest.fixture(scope="module")
def seen():
    """What observe() found in a process of its own."""
    env = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tools'}"}
    done = subprocess.run(
        [sys.executable, __file__], env=env, capture_output=True, text=True, check=False
    )
    if done.returncode == 77:
        pytest.skip(done.stderr)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize(
    "case", ["flash_attn_func", "layer", "layer, heads in blocks", "layer, fused"]
)
def test_views_are_those_of_the_tensors(seen, case):
    found = seen[case]
    for name, view in found["wanted"].items():
        assert found["launch"][name] == view, name
    assert found["out"] == [B, S, H, D]
    assert found["strides"] == [S * H * D, H * D, D, 1]
    assert found["launch"]["seqlen_q"] == S and found["launch"]["heads_q"] == H


def test_sizes(seen):
    for case in ("flash_attn_func", "layer"):
        launch = seen[case]["launch"]
        sizes = [launch[x] for x in ("batch", "seqlen_k", "heads_k", "head_dim")]
        assert sizes == [B, 9, HKV, D]


def test_a_layers_tensors_are_copied_where_tma_cannot_load_them(seen):
    found = seen["layer, copied"]
    for name, data in zip("qkv", found["inputs"], strict=True):
        view = found["launch"][name]
        assert view["data"] != data and view["data"] % 16 == 0
        assert all(stride > 0 and stride % 8 == 0 for stride in view["strides"])


def test_elsewhere_they_are_refused(seen):
    assert "contiguous" in seen["odd"] and "aligned" in seen["unaligned"]


def test_key_ranges(seen):
    for case in ("range", "length alone"):
        launch = seen[case]["launch"]
        assert [launch["key_start"], launch["key_len"]] == seen[case]["wanted"]


@pytest.mark.parametrize("case", ["bits", "bits of a carrier"])
def test_key_bits(seen, case):
    """Both directions get them as they are, from the first word on."""
    for launch in seen[case]["launches"]:
        keys = [launch[x] for x in ("key_start", "key_len", "key_bits", "key_bits_stride")]
        assert keys == seen[case]["wanted"]
    assert seen["layer, bits"]


@pytest.mark.parametrize("case", ["gradients", "gradients, heads first"])
def test_gradients_lie_as_projections_want_them(seen, case):
    found = seen[case]
    for name, view in found["wanted"].items():
        assert found["launch"][name] == view, name
    assert all(found["like"]) and all(found["in memory"])


def test_packed(seen):
    launch = seen["packed"]["launch"]
    assert launch["batch"] == 2 and launch["seqlen_q"] == 4
    assert launch["q"]["strides"][1:] == [H * D, D] and seen["packed"]["out"] == [S, H, D]


@pytest.mark.parametrize(
    "case, words",
    [
        ("k and v differ", "k and v of one shape"),
        ("heads", "multiple"),
        ("batch", "one batch size"),
        ("head_dim", "one head_dim"),
        ("dtype", "dtype of q"),
        ("dimensions", "(batch, heads, seqlen, head_dim), heads first"),
        ("bits alone", "key_bits: expected key_start and key_len with it"),
        ("bits of 64 bits", "key_bits: expected dtype int32"),
        ("bits of more keys", "key_bits: expected contiguous words of shape (2, 1), got (2, 2)"),
        ("bits of columns", "key_bits: expected contiguous words of shape (2, 1), got (2)"),
    ],
)
def test_what_does_not_fit_together_is_refused(seen, case, words):
    assert words in seen[f"error: {case}"]


def main():
    import host_binding

    with tempfile.TemporaryDirectory() as folder:
        try:
            library = host_binding.compile(Path(folder))
        except build.BuildError as error:
            print(error, file=sys.stderr)
            return 77
        with host_binding.as_gpu(library):
            print(json.dumps(observe()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
