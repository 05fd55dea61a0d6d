"""Continuous batching on the kernels: by index, with and without CUDA graphs."""

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
SMALL = {
    "hidden_size": 256,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
    "intermediate_size": 256,
    "vocab_size": VOCABULARY,
    "initializer_range": 0.1,
}
MODELS = {
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(n_embd=256, n_head=4, n_layer=2, vocab_size=VOCABULARY, initializer_range=0.1)
    ),
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SMALL)),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**SMALL, sliding_window=32)),
}
PROMPTS = [list(range(5, 5 + n)) for n in (7, 90, 1, 33, 150)]


def logits_along(model, prompt, generated):
    """fp32 logits (NEW, vocabulary) of eager at each generated token."""
    ids = torch.tensor([prompt + generated], device="cuda")
    return model(ids).logits[0, len(prompt) - 1 : -1].float()


@pytest.mark.parametrize("graphs", [False, True], ids=["plain", "graphs"])
@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("way", ["name", "patch"])
def test_tokens_are_eagers_best(kind, way, graphs):
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
        block_size=16, num_blocks=128, max_batch_tokens=64, use_cuda_graph=graphs
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
            assert len(result.generated_tokens) == NEW
            logits = logits_along(model, prompt, result.generated_tokens)
            chosen = logits.gather(1, torch.tensor(result.generated_tokens, device="cuda")[:, None])
            assert (logits.amax(1) - chosen[:, 0]).max() < 5e-2 * logits.abs().max()
