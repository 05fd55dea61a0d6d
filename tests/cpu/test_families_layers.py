"""Single attention modules of models too large or odd to build whole: patched equals their code.

Forward, and gradients of inputs and weights; where it ran is counted.
"""

from __future__ import annotations

import importlib

import pytest
import torch
import transformers as tf
from torch import Tensor, nn

import hf_flashattn
from hf_flashattn.families.forward import OwnForward
from hf_flashattn.families.table import family_of
from hf_flashattn.report import calls_of

BATCH, LENGTH, WIDTH, HEADS = 2, 6, 32, 4
SIZES = {
    "hidden_size": WIDTH,
    "num_attention_heads": HEADS,
    "attention_probs_dropout_prob": 0.0,
}


def states(length: int = LENGTH, seed: int = 1) -> Tensor:
    """fp32 (BATCH, length, WIDTH)."""
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(BATCH, length, WIDTH, generator=draw).requires_grad_()


def image(side: int = 4) -> Tensor:
    """fp32 (BATCH, side, side, WIDTH): patches in their places."""
    draw = torch.Generator().manual_seed(1)
    return torch.randn(BATCH, side, side, WIDTH, generator=draw).requires_grad_()


def padding(length: int = LENGTH) -> Tensor:
    """Additive (BATCH, 1, 1, length): the first row's last two keys are hidden."""
    mask = torch.zeros(BATCH, 1, 1, length)
    mask[0, ..., -2:] = torch.finfo(torch.float32).min
    return mask


def sam(folder: str, prefix: str, kind: str) -> tuple:
    options = {**SIZES, "image_size": 16, "patch_size": 4, "use_rel_pos": True, "qkv_bias": True}
    config = tf.SamVisionConfig(**options)
    return f"{folder}.{prefix}{kind}", lambda cls: cls(config, window_size=0), (image(),), {}


def grounded(folder: str, prefix: str) -> tuple:
    config = tf.GroundingDinoConfig(d_model=WIDTH, attention_dropout=0.0)
    keys = states(5, 2)
    build = lambda cls: cls(config, num_attention_heads=HEADS)  # noqa: E731
    return (
        f"{folder}.{prefix}MultiheadAttention",
        build,
        (states(), keys, keys),
        {"attention_mask": padding(5)},
    )


def segmented(folder: str, prefix: str) -> tuple:
    """Tokens first; with positions added to queries and keys."""
    tokens = {
        "hidden_states": states().transpose(0, 1),
        "position_embeddings": states(seed=3).mT.permute(2, 0, 1),
    }
    return f"{folder}.{prefix}Attention", lambda cls: cls(WIDTH, HEADS), (), tokens


TVP = tf.TvpConfig(**SIZES)
BARK = tf.BarkSemanticConfig(hidden_size=WIDTH, num_heads=HEADS, block_size=16, dropout=0.0)
CLVP = tf.ClvpEncoderConfig(**SIZES, attention_dropout=0.0)
BIRD = tf.BigBirdPegasusConfig(**{**SIZES, "attention_probs_dropout_prob": 0.0}, d_model=WIDTH)
GLUE = tf.SuperGlueConfig(**SIZES)
DATA = {"image_size": 8, "patch_size": 4, **SIZES}
DATA2VEC = tf.Data2VecVisionConfig(**DATA)
DATA2VEC_BIASED = tf.Data2VecVisionConfig(**DATA, use_relative_position_bias=True)

# class, how to make it, arguments, keywords; whether it is on the kernel
STANDARD = {
    "tvp": ("tvp.TvpAttention", lambda cls: cls(TVP), (states(), padding()), {}),
    "bark": (
        "bark.BarkSelfAttention",
        lambda cls: cls(BARK, is_causal=True, layer_idx=0),
        (states(),),
        {"attention_mask": padding()},
    ),
    "clvp": (
        "clvp.ClvpSelfAttention",
        lambda cls: cls(CLVP),
        (states(),),
        {"attention_mask": padding().expand(-1, -1, LENGTH, -1)},
    ),
    "superglue": (
        "superglue.SuperGlueSelfAttention",
        lambda cls: cls(GLUE),
        (states(), padding()),
        {},
    ),
    "superglue_cross": (
        "superglue.SuperGlueSelfAttention",
        lambda cls: cls(GLUE),
        (states(),),
        {"encoder_hidden_states": states(5, 2), "encoder_attention_mask": padding(5)},
    ),
    "grounding_dino": grounded("grounding_dino", "GroundingDino"),
    "mm_grounding_dino": grounded("mm_grounding_dino", "MMGroundingDino"),
    "omdet_turbo": (
        "omdet_turbo.OmDetTurboMultiheadAttention",
        lambda cls: cls(None, WIDTH, HEADS, 0.0),
        (states(), states(5, 2), states(5, 3), padding(5)),
        {},
    ),
    "zoedepth": (
        "zoedepth.ZoeDepthMultiheadAttention",
        lambda cls: cls(WIDTH, HEADS, 0.0),
        (states(), states(5, 2), states(5, 3)),
        {},
    ),
    "mask2former": segmented("mask2former", "Mask2Former"),
    "oneformer": segmented("oneformer", "OneFormer"),
    "bigbird_pegasus": (
        "bigbird_pegasus.BigBirdPegasusSelfAttention",
        lambda cls: cls(BIRD),
        (states(), padding()),
        {},
    ),
    "data2vec_vision_sdpa": (
        "data2vec_vision.Data2VecVisionSdpaSelfAttention",
        lambda cls: cls(DATA2VEC),
        (states(5),),
        {},
    ),
    "janus": (
        "janus.JanusVQVAEAttnBlock",
        lambda cls: cls(WIDTH),
        (image().mT.mT.permute(0, 3, 1, 2),),
        {},
    ),
    "chameleon": (
        "chameleon.ChameleonVQVAEEncoderAttnBlock",
        lambda cls: cls(WIDTH),
        (image().permute(0, 3, 1, 2),),
        {},
    ),
}
BIASED = {
    "data2vec_vision": (
        "data2vec_vision.Data2VecVisionSelfAttention",
        lambda cls: cls(DATA2VEC_BIASED, window_size=(2, 2)),
        (states(5),),
        {"resolution": (8, 8)},
    ),
    "data2vec_vision_sdpa": (
        "data2vec_vision.Data2VecVisionSdpaSelfAttention",
        lambda cls: cls(DATA2VEC_BIASED, window_size=(2, 2)),
        (states(5),),
        {"resolution": (8, 8)},
    ),
    "sam_sdpa": sam("sam", "Sam", "VisionSdpaAttention"),
    "sam_hq": sam("sam_hq", "SamHQ", "VisionAttention"),
    "sam_hq_sdpa": sam("sam_hq", "SamHQ", "VisionSdpaAttention"),
    "got_ocr2": sam("got_ocr2", "GotOcr2", "VisionAttention"),
    "deepseek_ocr2": sam("deepseek_ocr2", "DeepseekOcr2Sam", "VisionAttention"),
    "deepseek_ocr2_sdpa": sam("deepseek_ocr2", "DeepseekOcr2Sam", "VisionSdpaAttention"),
    "unlimited_ocr": sam("unlimited_ocr", "UnlimitedOcrSam", "VisionAttention"),
    "unlimited_ocr_sdpa": sam("unlimited_ocr", "UnlimitedOcrSam", "VisionSdpaAttention"),
    "pp_formulanet": sam("pp_formulanet", "PPFormulaNet", "VisionAttention"),
    "slanext": sam("slanext", "SLANeXt", "VisionAttention"),
}


def compare(case: tuple) -> nn.Module:
    """The patched module, after it was compared with itself unpatched."""
    key, build, args, kwargs = case
    module_name, name = key.split(".")
    folder = "data2vec" if module_name.startswith("data2vec") else module_name
    try:
        home = importlib.import_module(f"transformers.models.{folder}.modeling_{module_name}")
    except ModuleNotFoundError:
        pytest.skip(f"Transformers {tf.__version__} has no {module_name}")
    torch.manual_seed(0)
    return compare_module(build(getattr(home, name)).eval(), args, kwargs)


def compare_module(module: nn.Module, args: tuple, kwargs: dict) -> nn.Module:
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.2)
    wanted = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor) and x.requires_grad]
    wanted += list(module.parameters())

    def run() -> list[Tensor]:
        out = module(*args, **kwargs)
        out = out[0] if isinstance(out, tuple) else out
        return [out.detach(), *torch.autograd.grad(out.square().sum(), wanted, allow_unused=True)]

    expected = run()
    family = family_of(type(module))
    assert family.refuses(module) is None
    own = OwnForward(module, family)
    got = run()
    largest = max(y.abs().max().item() for y in expected if y is not None)
    for x, y in zip(got, expected, strict=True):
        if y is not None:  # a bias of the keys has no gradient but what rounding leaves
            torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-6 * max(1.0, largest))
    own.remove()
    return module


class Attention(nn.Module):
    """As timm's, which need not be there: one projection, torch's SDPA."""

    def __init__(self):
        super().__init__()
        self.num_heads, self.head_dim = HEADS, WIDTH // HEADS
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, self.head_dim)).permute(2, 0, 3, 1, 4)
        out = nn.functional.scaled_dot_product_attention(*qkv.unbind(0), attn_mask=attn_mask)
        return self.proj(out.transpose(1, 2).flatten(2))


Attention.__module__ = "timm.layers.attention"


@pytest.mark.parametrize("mask", [None, padding() == 0], ids=["whole", "padded"])
def test_timm(mask):
    calls = calls_of(compare_module(Attention(), (states(),), {"attn_mask": mask}))
    assert (calls.cpu, calls.fallback) == (1, 0), calls.reasons


@pytest.mark.parametrize("name", STANDARD)
def test_on_the_kernel(name):
    calls = calls_of(compare(STANDARD[name]))
    assert (calls.cpu, calls.fallback) == (1, 0), calls.reasons


@pytest.mark.parametrize("name", BIASED)
def test_a_bias_falls_back(name):
    calls = calls_of(compare(BIASED[name]))
    (reason,) = calls.reasons
    assert (calls.cpu, calls.fallback) == (0, 1) and reason.startswith("an additive bias")


def test_weights_that_are_returned_are_not_dropped():
    """OneFormer collects those of torch.nn.MultiheadAttention: that stays as it is."""
    home = importlib.import_module("transformers.models.oneformer.modeling_oneformer")
    layer = home.OneFormerTransformerDecoderCrossAttentionLayer(WIDTH, HEADS).eval()
    queries, keys = states().transpose(0, 1), states(5, 2).transpose(0, 1)
    expected = layer(queries, keys)
    with hf_flashattn.patched(layer) as report:
        got = layer(queries, keys)
    assert report.rows[0].runs == "unsupported"
    assert torch.equal(got[0], expected[0]) and torch.equal(got[1], expected[1])
