"""The model families whose attention is standard but never asks Transformers for a function.

A line here is enough for a class whose forward does `softmax(scale * q @ k^T + mask) @ v` in any
spelling (see deferred.py). What is truly another attention has its reason here instead.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn


def _never(module: nn.Module) -> str | None:
    return None


@dataclass(frozen=True)
class Family:
    """What is particular to the attention code of a class.

    heads, head_dim: the attributes that hold them, or a function of the module.
    bias: what it adds to the scores besides masks, said of one module, or None.
    refuses: why a module of it stays as it is, or None.
    own_masks: its model computes with the masks, so they stay as the model makes them.
    triangle: the attribute with its causal pattern. window: of that pattern, itself included.
    clamps, zeros, skips: see deferred.Deferral.
    """

    heads: str = "num_attention_heads"
    head_dim: str | Callable[[nn.Module], int] = "attention_head_size"
    bias: Callable[[nn.Module], str | None] = _never
    refuses: Callable[[nn.Module], str | None] = _never
    own_masks: bool | Callable[[nn.Module], bool] = False
    triangle: str | None = None
    window: Callable[[nn.Module], int | None] = _never
    clamps: bool = False
    zeros: bool = False
    skips: int = 0

    def head_dim_of(self, module: nn.Module) -> int:
        if callable(self.head_dim):
            return self.head_dim(module)
        return getattr(module, self.head_dim)

    def keeps_masks(self, module: nn.Module) -> bool:
        return self.own_masks(module) if callable(self.own_masks) else self.own_masks

    def triangle_of(self, module: nn.Module) -> Tensor | None:
        return None if self.triangle is None else getattr(module, self.triangle, None)


def _alibi(module: nn.Module) -> str | None:
    return "ALiBi"


def _falcon_alibi(module: nn.Module) -> str | None:
    return "ALiBi" if module.config.alibi else None


def _local_window(module: nn.Module) -> int | None:
    return module.config.window_size if module.attention_type == "local" else None


def _layoutlmv2_bias(module: nn.Module) -> str | None:
    biased = module.has_relative_attention_bias or module.has_spatial_attention_bias
    return "relative positions" if biased else None


def _quantised(module: nn.Module) -> str | None:
    return "its softmax counts in integers (quant_mode)" if module.quant_mode else None


_BERT = Family()
_BART = Family(heads="num_heads", head_dim="head_dim")
_XLM = Family(heads="n_heads", head_dim="head_dim", own_masks=True)
_GPT = Family(heads="num_attention_heads", head_dim="head_dim")

# module and class, without "transformers.models." and "modeling_"
FAMILIES: dict[str, Family] = {
    "gptj.GPTJAttention": _GPT,
    "codegen.CodeGenAttention": _GPT,
    "gpt_neo.GPTNeoSelfAttention": Family(
        "num_heads", "head_dim", triangle="bias", window=_local_window
    ),
    "gpt_neox_japanese.GPTNeoXJapaneseAttention": Family(head_dim="head_size", zeros=True),
    "falcon.FalconAttention": Family(
        "num_heads",
        "head_dim",
        bias=_falcon_alibi,
        own_masks=lambda module: module.config.alibi,
    ),
    "bloom.BloomAttention": Family("num_heads", "head_dim", bias=_alibi),
    "mpt.MptAttention": Family("n_heads", "head_dim", bias=_alibi, own_masks=True),
    "openai.Attention": Family(
        "n_head", lambda module: module.split_size // module.n_head, triangle="bias", own_masks=True
    ),
    "xglm.XGLMAttention": Family("num_heads", "head_dim", clamps=True),
    "trocr.TrOCRAttention": _BART,
    "mvp.MvpAttention": _BART,
    "fsmt.Attention": Family("num_heads", "head_dim", own_masks=True),
    "prophetnet.ProphetNetAttention": Family("num_attn_heads", "head_dim", own_masks=True),
    "xlm.MultiHeadAttention": _XLM,
    "flaubert.MultiHeadAttention": _XLM,
    "megatron_bert.MegatronBertSelfAttention": _BERT,
    "rembert.RemBertSelfAttention": _BERT,
    "roformer.RoFormerSelfAttention": _BERT,
    "tapas.TapasSelfAttention": _BERT,
    "git.GitSelfAttention": _BERT,
    "luke.LukeSelfAttention": _BERT,
    "ibert.IBertSelfAttention": Family(refuses=_quantised),
    "squeezebert.SqueezeBertSelfAttention": _BERT,
    "convbert.ConvBertSelfAttention": Family(skips=1),
    "visual_bert.VisualBertSelfAttention": _BERT,
    "mpnet.MPNetSelfAttention": Family(bias=lambda module: "relative positions"),
    "layoutlmv2.LayoutLMv2SelfAttention": Family(bias=_layoutlmv2_bias, own_masks=True),
}

OUT_OF_REACH: dict[str, str] = {
    "deberta.DisentangledSelfAttention": "adds products of queries and keys with positions",
    "deberta_v2.DisentangledSelfAttention": "adds products of queries and keys with positions",
    "longformer.LongformerSelfAttention": "slides a window beside global tokens",
    "led.LEDEncoderSelfAttention": "slides a window beside global tokens",
    "big_bird.BigBirdBlockSparseAttention": "attends to chosen blocks and random ones",
    "bigbird_pegasus.BigBirdPegasusBlockSparseAttention": (
        "attends to chosen blocks and random ones"
    ),
    "longt5.LongT5LocalAttention": "attends within blocks, with a position bias",
    "longt5.LongT5TransientGlobalAttention": "attends within blocks and to their sums",
    "pegasus_x.PegasusXGlobalLocalAttention": "attends within blocks beside global tokens",
    "xlnet.XLNetRelativeAttention": "adds products of queries with relative positions",
    "funnel.FunnelRelMultiheadAttention": "adds products of queries with relative positions",
    "prophetnet.ProphetNetNgramSelfAttention": "predicts several tokens by streams of its own",
    "reformer.LocalSelfAttention": "attends within chunks",
    "reformer.LSHSelfAttention": "attends within hash buckets",
    "nystromformer.NystromformerSelfAttention": "approximates the softmax by landmarks (Nystrom)",
    "mra.MraSelfAttention": "approximates the softmax at several resolutions",
    "yoso.YosoSelfAttention": "samples the softmax by hashing",
    "rwkv.RwkvSelfAttention": "is a recurrence, without a softmax",
    "cpmant.CpmAntAttention": "masks its probabilities after the softmax",
    "minimax.MiniMaxLightningAttention": "is linear, without a softmax",
    "kimi_linear.KimiLinearDeltaAttention": "is linear, without a softmax",
}


def _key(cls: type[nn.Module]) -> str:
    home, _, module = cls.__module__.rpartition(".modeling_")
    inside = home.startswith("transformers.models.")
    return f"{module}.{cls.__name__}" if inside else ""


def family_of(cls: type[nn.Module]) -> Family | None:
    """The family of a class with attention code of its own, or None."""
    return FAMILIES.get(_key(cls))


def out_of_reach(cls: type[nn.Module]) -> str:
    """One line: why attention code of its own stays as it is."""
    return f"{cls.__name__} {OUT_OF_REACH.get(_key(cls), 'has attention code of its own')}"
