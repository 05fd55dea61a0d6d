"""Continuous batching on the kernels: by index, with and without CUDA graphs.

With graphs in a process of its own, `python tests/gpu/test_paged.py WAY KIND`: an assertion on the
device, also one of Transformers' own, ends every later call of its process.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import (
    ContinuousBatchingConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)

from hf_flashattn import attention_report, patch_model

VOCABULARY, NEW = 200, 12
BLOCK, BLOCKS = 16, 128
POSITIONS = BLOCK * BLOCKS  # Transformers warms its graphs up with one request that fills the cache
SMALL = {
    "hidden_size": 256,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
    "intermediate_size": 256,
    "vocab_size": VOCABULARY,
    "initializer_range": 0.1,
    "max_position_embeddings": POSITIONS,
}
MODELS = {
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(
            n_embd=256,
            n_head=4,
            n_layer=2,
            n_positions=POSITIONS,  # learned: an index beyond them is an assertion on the device
            vocab_size=VOCABULARY,
            initializer_range=0.1,
        )
    ),
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SMALL)),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**SMALL, sliding_window=32)),
}
PROMPTS = [list(range(5, 5 + n)) for n in (7, 90, 1, 33, 150)]


def logits_along(model, prompt, generated):
    """fp32 logits (NEW, vocabulary) of eager at each generated token."""
    ids = torch.tensor([prompt + generated], device="cuda")
    return model(ids).logits[0, len(prompt) - 1 : -1].float()


def check(way, kind, graphs):
    """Each token is what eager would say there, or within rounding of it."""
    torch.manual_seed(0)
    model = MODELS[kind]().cuda().eval().to(torch.bfloat16)
    model.set_attn_implementation("eager")
    if way == "name":
        model.set_attn_implementation("hf_flashattn")
        report = attention_report(model)
    else:
        report = patch_model(model)
    generation = model.generation_config
    generation.update(max_new_tokens=NEW, do_sample=False, eos_token_id=-1, pad_token_id=0)
    batching = ContinuousBatchingConfig(
        block_size=BLOCK, num_blocks=BLOCKS, max_batch_tokens=64, use_cuda_graph=graphs
    )
    outputs = model.generate_batch(
        PROMPTS,
        generation_config=generation,
        continuous_batching_config=batching,
        progress_bar=False,
    )
    if kind != "mistral":
        report.assert_all_on_kernel()
    else:
        assert all("sliding window" in row.why for row in report.rows)
    model.set_attn_implementation("eager")
    numbered = sorted(outputs.values(), key=lambda x: int(x.request_id.rpartition("_")[2]))
    with torch.no_grad():
        for prompt, result in zip(PROMPTS, numbered, strict=True):
            assert len(result.generated_tokens) == NEW, result.error
            logits = logits_along(model, prompt, result.generated_tokens)
            chosen = logits.gather(1, torch.tensor(result.generated_tokens, device="cuda")[:, None])
            assert (logits.amax(1) - chosen[:, 0]).max() < 5e-2 * logits.abs().max()


@pytest.mark.parametrize("graphs", [False, True], ids=["plain", "graphs"])
@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("way", ["name", "patch"])
def test_tokens_are_eagers_best(way, kind, graphs):
    if not graphs:
        check(way, kind, graphs=False)
        return
    root = str(Path(__file__).parents[2])
    paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
    done = subprocess.run(
        [sys.executable, __file__, way, kind],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    assert "Failed to warm up" not in done.stdout + done.stderr  # no graph was captured then


if __name__ == "__main__":
    check(*sys.argv[1:3], graphs=True)
