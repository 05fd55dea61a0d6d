"""The model families whose attention is standard but never asks Transformers for a function.

A line here is enough for a class whose forward does `softmax(scale * q @ k^T + mask) @ v` in any
spelling (see deferred.py). What is truly another attention has its reason here instead.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn


def _never(module: nn.Module) -> str | None:
    return None


@dataclass(frozen=True)
class Family:
    """What is particular to the attention code of a class.

    heads, head_dim: the attributes that hold them, or functions of the module.
    bias: what it adds to the scores besides masks, said of one module, or None.
    refuses: why a module of it stays as it is, or None.
    own_masks: its model computes with the masks, so they stay as the model makes them.
    triangle: the attribute with its causal pattern. window: of that pattern, itself included.
    clamps, zeros, skips: see deferred.Deferral.
    untold: its model collects its weights, if they are wanted, and does not tell it that they are.
    """

    heads: str | Callable[[nn.Module], int] = "num_attention_heads"
    head_dim: str | Callable[[nn.Module], int] = "attention_head_size"
    bias: Callable[[nn.Module], str | None] = _never
    refuses: Callable[[nn.Module], str | None] = _never
    own_masks: bool | Callable[[nn.Module], bool] = False
    triangle: str | None = None
    window: Callable[[nn.Module], int | None] = _never
    clamps: bool = False
    zeros: bool = False
    skips: int = 0
    untold: bool = False

    def heads_of(self, module: nn.Module) -> int:
        return self.heads(module) if callable(self.heads) else getattr(module, self.heads)

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


def _relative_positions(module: nn.Module) -> str | None:
    return "relative positions"


def _with_attribute(name: str) -> Callable[[nn.Module], str | None]:
    """Relative positions, if an attribute of the module says so."""
    return lambda module: "relative positions" if getattr(module, name) else None


def _in_views(name: str) -> Callable[[nn.Module], str | None]:
    def refuses(module: nn.Module) -> str | None:
        if not getattr(module, name):
            return None
        return f"{type(module).__name__} adds relative positions by height and by width"

    return refuses


def _pooling_dim(module: nn.Module) -> int:
    return module.hidden_size // module.num_heads


def _dim_of_qkv(module: nn.Module) -> int:
    return module.qkv.in_features // module.num_heads


def _dim_of_sam(module: nn.Module) -> int:
    return module.qkv.in_features // module.num_attention_heads


_BERT = Family()
_BART = Family(heads="num_heads", head_dim="head_dim")
_XLM = Family(heads="n_heads", head_dim="head_dim", own_masks=True)
_GPT = Family(heads="num_attention_heads", head_dim="head_dim")
_QKV = Family("num_heads", _dim_of_qkv)  # vision transformers that project to all three at once
_SAM = Family(head_dim=_dim_of_sam, bias=_with_attribute("use_rel_pos"))
_SWIN = Family(bias=_relative_positions, own_masks=True)
_LEVIT = Family(head_dim="key_dim", bias=_relative_positions)
_OWN_MASKS = Family("num_heads", "head_dim", own_masks=True)
# Of the pixels or frames of an autoencoder.
_PIXELS = Family(heads=lambda module: 1, head_dim=lambda module: module.q.out_channels)

# Of what Transformers wraps from timm: no config of ours reaches its masks.
_TIMM = Family("num_heads", "head_dim", own_masks=True)

# module and class, without "transformers.models." and "modeling_"; of timm the whole path
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
    "mpt.MptAttention": Family("n_heads", "head_dim", bias=_alibi, own_masks=True, untold=True),
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
    "mpnet.MPNetSelfAttention": Family(bias=_relative_positions),
    "layoutlmv2.LayoutLMv2SelfAttention": Family(bias=_layoutlmv2_bias, own_masks=True),
    "blip.BlipAttention": _BART,
    "blip_text.BlipTextSelfAttention": _BERT,
    "vilt.ViltSelfAttention": _BERT,
    "flava.FlavaSelfAttention": _BERT,
    "canine.CanineSelfAttention": _BERT,
    "tvp.TvpAttention": _BERT,
    "lxmert.LxmertAttention": Family(own_masks=True),
    "big_bird.BigBirdSelfAttention": Family(own_masks=True),
    "bigbird_pegasus.BigBirdPegasusSelfAttention": Family(own_masks=True),
    "superglue.SuperGlueSelfAttention": Family(own_masks=True),
    "perceiver.PerceiverSelfAttention": Family("num_heads", "qk_channels_per_head", own_masks=True),
    "imagegpt.ImageGPTAttention": Family("num_heads", "head_dim", triangle="bias", own_masks=True),
    "bark.BarkSelfAttention": _OWN_MASKS,
    "clvp.ClvpSelfAttention": _BART,
    "led.LEDDecoderAttention": _OWN_MASKS,
    "groupvit.GroupViTAttention": _BART,
    "speecht5.SpeechT5Attention": Family(
        "num_heads",
        "head_dim",
        bias=lambda module: None if module.is_decoder else "relative positions",
    ),
    "wavlm.WavLMAttention": Family(
        "num_heads", "head_dim", bias=_relative_positions, own_masks=True
    ),
    "fastspeech2_conformer.FastSpeech2ConformerAttention": Family(
        "num_heads", "head_dim", bias=_relative_positions, own_masks=True
    ),
    "bros.BrosSelfAttention": Family(bias=_relative_positions),
    "granite_speech.GraniteSpeechConformerAttention": Family(
        "num_heads", "dim_head", bias=_relative_positions, own_masks=True
    ),
    "granite_speech_plus.GraniteSpeechPlusConformerAttention": Family(
        "num_heads", "dim_head", bias=_relative_positions, own_masks=True
    ),
    "table_transformer.TableTransformerAttention": _BART,
    "dab_detr.DetrAttention": _BART,
    "dab_detr.DabDetrAttention": Family("attention_heads", "attention_head_dim"),
    "mask2former.Mask2FormerAttention": _OWN_MASKS,
    "oneformer.OneFormerAttention": _OWN_MASKS,
    "grounding_dino.GroundingDinoMultiheadAttention": Family(own_masks=True),
    "mm_grounding_dino.MMGroundingDinoMultiheadAttention": Family(own_masks=True),
    "omdet_turbo.OmDetTurboMultiheadAttention": Family(own_masks=True),
    "zoedepth.ZoeDepthMultiheadAttention": Family(own_masks=True),
    "pvt.PvtEfficientSelfAttention": _BERT,
    "pvt_v2.PvtV2SelfAttention": _BERT,
    "glpn.GLPNEfficientSelfAttention": _BERT,
    "mobilevit.MobileViTSelfAttention": _BERT,
    "mgp_str.MgpstrAttention": Family("num_heads", _dim_of_qkv, untold=True),
    "timesformer.TimesformerSelfAttention": _QKV,
    "vitdet.VitDetAttention": Family(
        "num_heads", _dim_of_qkv, refuses=_in_views("use_relative_position_embeddings")
    ),
    "seggpt.SegGptAttention": Family(
        head_dim=_dim_of_sam,
        refuses=_in_views("use_relative_position_embeddings"),
    ),
    "cvt.CvtSelfAttention": Family(
        "num_heads", lambda module: module.embed_dim // module.num_heads
    ),
    "levit.LevitAttention": _LEVIT,
    "levit.LevitAttentionSubsample": _LEVIT,
    "data2vec_vision.Data2VecVisionSelfAttention": Family(
        bias=_with_attribute("has_relative_position_bias")
    ),
    "data2vec_vision.Data2VecVisionSdpaSelfAttention": Family(
        bias=_with_attribute("has_relative_position_bias")
    ),
    "donut_swin.DonutSwinSelfAttention": _SWIN,
    "maskformer_swin.MaskFormerSwinSelfAttention": _SWIN,
    "clap.ClapAudioSelfAttention": _SWIN,
    "swinv2.Swinv2SelfAttention": _SWIN,
    "swin2sr.Swin2SRSelfAttention": _SWIN,
    "sam.SamVisionAttention": _SAM,
    "sam.SamVisionSdpaAttention": _SAM,
    "sam_hq.SamHQVisionAttention": _SAM,
    "sam_hq.SamHQVisionSdpaAttention": _SAM,
    "deepseek_ocr2.DeepseekOcr2SamVisionAttention": _SAM,
    "deepseek_ocr2.DeepseekOcr2SamVisionSdpaAttention": _SAM,
    "unlimited_ocr.UnlimitedOcrSamVisionAttention": _SAM,
    "unlimited_ocr.UnlimitedOcrSamVisionSdpaAttention": _SAM,
    "got_ocr2.GotOcr2VisionAttention": _SAM,
    "pp_formulanet.PPFormulaNetVisionAttention": _SAM,
    "slanext.SLANeXtVisionAttention": _SAM,
    "aimv2.Aimv2AttentionPoolingHead": Family("num_heads", _pooling_dim),
    "janus.JanusVQVAEAttnBlock": _PIXELS,
    "chameleon.ChameleonVQVAEEncoderAttnBlock": _PIXELS,
    "apertus1p5.Apertus1p5VisionTokenizerAttnBlock": _PIXELS,
    "wavtokenizer.WavTokenizerVocosAttention": _PIXELS,
    "timm.layers.attention.Attention": _TIMM,
    "timm.layers.attention.AttentionRope": _TIMM,
    "timm.models.eva.EvaAttention": _TIMM,
    "timm.models.fastvit.Attention": _TIMM,
}

# torch.nn.MultiheadAttention, where the class that holds it does without its attention weights.
WITHOUT_WEIGHTS = frozenset(
    (
        "aria.AriaCrossAttention",
        "bridgetower.BridgeTowerResidualAttention",
        "idefics2.Idefics2MultiheadAttentionPoolingHead",
        "mask2former.Mask2FormerMaskedAttentionDecoderLayer",
        "phi4_multimodal.Phi4MultimodalVisionMultiheadAttentionPoolingHead",
        "siglip.SiglipMultiheadAttentionPoolingHead",
        "siglip2.Siglip2MultiheadAttentionPoolingHead",
    )
)

# Named after attention, but it happens elsewhere.
NO_ATTENTION = frozenset(
    (
        "cvt.CvtSelfAttentionConvProjection",
        "edgetam_video.EdgeTamVideoMemoryAttentionMLP",
        "hubert.HubertAttnAdapterLayer",
        "lxmert.LxmertAttentionOutput",
        "neomme.NeoMMEExclusiveSelfAttention",
        "patchtsmixer.PatchTSMixerGatedAttention",
        "phi4_multimodal.Phi4MultimodalAudioRelativeAttentionBias",
        "unispeech.UniSpeechAttnAdapterLayer",
        "unispeech_sat.UniSpeechSatAttnAdapterLayer",
        "wav2vec2.Wav2Vec2AttnAdapterLayer",
    )
)

_DEFORMABLE = "samples the values at learned points (deformable)"
_BOTH_WAYS = "shares one product of image and text both ways"
_WEIGHTS = "returns its weights as a map: there are no values"
_CHUNKS = "attends within chunks, with relative positions and a softcap"

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
    "bailing_hybrid.BailingHybridDeltaAttention": "is linear, without a softmax",
    "glm5_next.Glm5NextTextLinearAttention": "is linear, without a softmax",
    "olmo_hybrid.OlmoHybridLinearAttentionDecoderLayer": "is linear, without a softmax",
    "mobilevitv2.MobileViTV2LinearSelfAttention": (
        "is linear: one softmax over the tokens weighs a sum of the keys"
    ),
    "swiftformer.SwiftFormerEfficientAdditiveAttention": "is additive, without scores of pairs",
    "slanet.SLANetAttentionGRUCell": "is additive, one step of a GRU at a time",
    "slanext.SLANeXtAttentionGRUCell": "is additive, one step of a GRU at a time",
    "sew_d.DisentangledSelfAttention": "adds products of queries and keys with positions",
    "lilt.LiltSelfAttention": "adds the scores of text and layout to each other",
    "vits.VitsAttention": "adds relative positions to the values too, by its probabilities",
    "autoformer.AutoformerAttention": "is autocorrelation by FFT, without a softmax over keys",
    "informer.InformerProbSparseAttention": "computes scores of chosen queries only (ProbSparse)",
    "dinat.NeighborhoodAttention": "attends to a neighbourhood of each pixel (NATTEN)",
    "hiera.HieraMaskUnitAttention": "attends within mask units and pools its queries",
    "groupvit.GroupViTAssignAttention": "assigns each key to one group, by a softmax over queries",
    "evolla.EvollaSequenceCompressorAttention": "subtracts its largest score before the mask",
    "evolla.EvollaSequenceAlignerCrossAttention": "joins scores of three kinds of keys",
    "gemma3n.Gemma3nAudioAttention": _CHUNKS,
    "gemma4.Gemma4AudioAttention": _CHUNKS,
    "grounding_dino.GroundingDinoBiMultiHeadAttention": _BOTH_WAYS,
    "mm_grounding_dino.MMGroundingDinoBiMultiHeadAttention": _BOTH_WAYS,
    "detr.DetrMHAttentionMap": _WEIGHTS,
    "maskformer.MaskFormerDetrMHAttentionMap": _WEIGHTS,
    "conditional_detr.ConditionalDetrMHAttentionMap": _WEIGHTS,
    "dab_detr.DabDetrMHAttentionMap": _WEIGHTS,
    "visual_bert.VisualBertRegionToPhraseAttention": _WEIGHTS,
    "oneformer.OneFormerTextMapperAttention": "computes on heads behind the tokens (einsum)",
    "esmfold.EsmFoldAttention": "attends over pairs of residues, with biases of pairs",
    "esmfold.EsmFoldSelfAttention": "adds a bias of pairs of residues and gates its output",
    "esmfold.EsmFoldInvariantPointAttention": "adds distances of points in space to its scores",
    "esmfold2.EsmFold2RowAttentionPooling": "pools rows by learned weights, without queries",
}


def _key(cls: type[nn.Module]) -> str:
    if cls.__module__.startswith("timm."):
        return f"{cls.__module__}.{cls.__name__}"
    home, _, module = cls.__module__.rpartition(".modeling_")
    inside = home.startswith("transformers.models.")
    return f"{module}.{cls.__name__}" if inside else ""


def family_of(cls: type[nn.Module], holder: type[nn.Module] | None = None) -> Family | None:
    """The family of a class with attention code of its own, or None.

    holder: the class of the module that holds it, which decides for torch.nn.MultiheadAttention.
    """
    if cls is torch.nn.MultiheadAttention:
        return _OWN_MASKS if holder is not None and _key(holder) in WITHOUT_WEIGHTS else None
    return FAMILIES.get(_key(cls))


def is_no_attention(cls: type[nn.Module]) -> bool:
    """Whether a class is named after attention and computes none."""
    return _key(cls) in NO_ATTENTION


def out_of_reach(cls: type[nn.Module]) -> str:
    """One line: why attention code of its own stays as it is."""
    key = _key(cls)
    if cls is torch.nn.MultiheadAttention:
        why = "is torch's, and what holds it may use its attention weights"
    elif key.endswith("MultiscaleDeformableAttention"):
        why = _DEFORMABLE
    else:
        why = OUT_OF_REACH.get(key, "has attention code of its own")
    return f"{cls.__name__} {why}"
