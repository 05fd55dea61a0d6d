"""`hf-flashattn doctor`: everything that decides whether the kernels run here, each tried out.

Nothing is built or downloaded. A check ends as "ok", as a "note" (it limits what runs, and is no
fault: no GPU, say) or as a "problem", which comes with the next step.
"""

from __future__ import annotations

import copy
import datetime
import importlib.metadata
import math
import os
import platform
import re
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import (
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedModel,
)

import hf_flashattn
from hf_flashattn import _compat, build, environment, ops, support
from hf_flashattn.attention import attention_forward
from hf_flashattn.families.unpatched import mask_of_a_name
from hf_flashattn.names import ALIAS_NAME, FLASH_NAME
from hf_flashattn.patching import patched

PACKAGES = ("torch", "transformers", "accelerate", "ninja")


@dataclass(frozen=True)
class Check:
    """status: "ok", "note" or "problem". facts: what a script may want, plain JSON types."""

    name: str
    status: str
    summary: str
    next_step: str = ""
    facts: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Diagnosis:
    checks: tuple[Check, ...]

    @property
    def ok(self) -> bool:
        return all(check.status != "problem" for check in self.checks)

    @property
    def kernels_run(self) -> bool:
        """Whether the CUDA kernels have just run, in every model that was tried."""
        tried = [check.facts["calls"] for check in self.checks if "calls" in check.facts]
        return bool(tried) and all(
            calls["kernel"] > 0 and not calls["cpu"] and not calls["fallback"] for calls in tried
        )

    def __str__(self) -> str:
        lines = []
        for check in self.checks:
            first, *others = check.summary.splitlines() or [""]
            lines.append(f"{check.status:8} {check.name:12} {first}")
            lines += [" " * 22 + line for line in others]
            if check.next_step:
                lines.append(" " * 22 + f"Next step: {check.next_step}")
        problems = sum(check.status == "problem" for check in self.checks)
        verdict = f"{problems} problem{'s' * (problems > 1)}" if problems else "No problem"
        runs = "run" if self.kernels_run else "do not run"
        return "\n".join([*lines, f"{verdict}; the CUDA kernels {runs} here."])

    def as_json(self) -> dict[str, Any]:
        return {
            "ok": self.ok,
            "kernels_run": self.kernels_run,
            "checks": [asdict(check) for check in self.checks],
        }


def diagnose() -> Diagnosis:
    """Runs every check; one that raises is a problem, never a crash."""
    checks = {
        "versions": check_versions,
        "environment": check_environment,
        "gpu": check_gpu,
        "library": check_library,
        "compiler": check_compiler,
        "names": check_names,
        "hooks": check_hooks,
        "bert": lambda: check_model("bert", tiny_bert),
        "gpt2": lambda: check_model("gpt2", tiny_gpt2),
    }
    return Diagnosis(tuple(_guarded(name, check) for name, check in checks.items()))


def _guarded(name: str, check: Callable[[], Check]) -> Check:
    try:
        return check()
    except Exception as error:
        return Check(name, "problem", f"{type(error).__name__}: {error}")


# ---- what is installed ---------------------------------------------------------------------------


def check_versions() -> Check:
    found = {"hf_flashattn": hf_flashattn.__version__, "python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    shown = ", ".join(f"{name} {version or 'not found'}" for name, version in found.items())
    found["cuda_of_torch"] = torch.version.cuda
    found["platform"] = platform.platform()
    found["location"] = str(Path(hf_flashattn.__file__).parent)
    built = f"torch for CUDA {torch.version.cuda}" if torch.version.cuda else "torch without CUDA"
    summary = f"{shown}\n{built}, {found['platform']}\n{found['location']}"
    return Check("versions", "ok", summary, facts=found)


def check_environment() -> Check:
    variables = {k: v for k, v in sorted(os.environ.items()) if k.startswith(environment.PREFIX)}
    shown = ", ".join(f"{k}={v}" for k, v in variables.items())
    try:
        wish = environment.parse(os.environ)
    except ValueError as error:
        step = "correct the variable, or unset it"
        return Check("environment", "problem", _brief(error), step, {"variables": variables})
    status = "note" if wish.disable else "ok"
    none = f"no {environment.PREFIX}* variable is set"
    return Check("environment", status, shown or none, facts={"variables": variables})


def check_gpu() -> Check:
    if not torch.cuda.is_available():
        why = "torch finds none" if torch.version.cuda else "this torch is built without CUDA"
        return Check("gpu", "note", f"none: {why}", facts={"devices": []})
    devices = []
    for index in range(torch.cuda.device_count()):
        seen = torch.cuda.get_device_properties(index)
        capability = [seen.major, seen.minor]
        devices.append({"name": seen.name, "capability": capability, "bytes": seen.total_memory})
    shown = ", ".join(f"{d['name']} ({'.'.join(map(str, d['capability']))})" for d in devices)
    facts = {"devices": devices, "cuda": torch.version.cuda}
    verdict = support.explain(_kernel_request())
    if tuple(devices[0]["capability"]) in support.CUDA_CAPABILITIES:
        return Check("gpu", "ok", f"{shown}, CUDA {torch.version.cuda}", facts=facts)
    return Check("gpu", "note", f"{shown}: {verdict.reason}", verdict.next_step, facts)


def _on_hopper() -> bool:
    return (
        torch.cuda.is_available()
        and torch.cuda.get_device_capability() in support.CUDA_CAPABILITIES
    )


def _kernel_request() -> support.Request:
    capability = torch.cuda.get_device_capability()
    return support.Request("cuda", capability, torch.bfloat16, head_dim=64, heads_q=2, heads_k=2)


# ---- the library ---------------------------------------------------------------------------------


def check_library() -> Check:
    status = ops.library_status()
    if not status.loaded:
        serious = status.failed or _on_hopper()
        reason, step = [*re.split(r"[.;] [Nn]ext step: ", status.reason, maxsplit=1), ""][:2]
        facts = {"path": None, "reason": status.reason}
        return Check("library", "problem" if serious else "note", reason, step, facts)
    path, root = status.path, build.source_root()
    built = datetime.datetime.fromtimestamp(path.stat().st_mtime).isoformat(" ", "minutes")
    current = path.parent.name.startswith(build.source_hash(root))
    facts = {
        "path": str(path),
        "origin": _origin(path),
        "key": path.parent.name,
        "bytes": path.stat().st_size,
        "built": built,
        "sources": str(root),
        "source_hash": build.source_hash(root),
        "of_these_sources": current,
        "compile_flags": build.COMPILE_FLAGS,
        "stable_abi": f"torch >= {'.'.join(map(str, build.MIN_TORCH))}",
    }
    summary = f"{path} ({facts['origin']}, built {built}"
    if current:
        return Check("library", "ok", f"{summary}, of the present sources)", facts=facts)
    return Check("library", "note", f"{summary}; of which sources is not known)", facts=facts)


def _origin(path: Path) -> str:
    if os.environ.get("HF_FLASHATTN_LIBRARY"):
        return "HF_FLASHATTN_LIBRARY"
    cached = build.cache_root() in path.parents
    return "the cache" if cached else "shipped with the package"


def check_compiler() -> Check:
    try:
        tools = build.find_toolchain()
    except build.BuildError as error:
        needed = _on_hopper() and not ops.library_status().loaded
        summary, _, step = str(error).partition("\nNext step: ")
        status = "problem" if needed else "note"
        return Check("compiler", status, summary, step if needed else "", {"nvcc": None})
    facts = {"nvcc": str(tools.nvcc), "version": tools.nvcc_version, "archs": build.cuda_archs()}
    archs = ", ".join(f"sm_{arch}" for arch in facts["archs"])
    return Check("compiler", "ok", f"{tools.nvcc} {tools.nvcc_version}, for {archs}", facts=facts)


# ---- Transformers --------------------------------------------------------------------------------


def check_names() -> Check:
    """Whether the registered names still lead to this package."""
    wanted = (
        attention_forward,
        mask_of_a_name,
        (hf_flashattn.flash_attn_func, hf_flashattn.flash_attn_varlen_func, None),
    )
    names = (FLASH_NAME, ALIAS_NAME)
    kinds = ("attention function", "mask function", "flash functions")
    wrong = [
        f"{name}: the {kind} is not ours"
        for name in names
        for kind, ours, found in zip(kinds, wanted, _compat.registered(name), strict=True)
        if found != ours
    ]
    facts = {"names": list(names), "wrong": wrong}
    if wrong:
        step = "find what registers the name again, or import hf_flashattn after it"
        return Check("names", "problem", "\n".join(wrong), step, facts)
    return Check("names", "ok", ", ".join(names), facts=facts)


def check_hooks() -> Check:
    """Whether this Transformers has the private names that _compat relies on."""
    missing, count = _compat.missing(), len(_compat.PRIVATE_NAMES)
    facts = {"missing": missing, "count": count}
    if missing:
        step = (
            "install a Transformers that hf_flashattn supports: pip install 'transformers>=5.17,<6'"
        )
        return Check("hooks", "problem", "missing: " + "\n".join(missing), step, facts)
    return Check("hooks", "ok", f"all {count} names of Transformers are there", facts=facts)


# ---- two models, tried out -----------------------------------------------------------------------

LAYERS, VOCABULARY, LENGTH = 2, 96, 40
_SIZES = {"vocab_size": VOCABULARY, "initializer_range": 0.2}  # wrong attention must show


def tiny_bert() -> PreTrainedModel:
    """Two layers, two heads of 64."""
    return BertForMaskedLM(
        BertConfig(
            hidden_size=128,
            num_attention_heads=2,
            num_hidden_layers=LAYERS,
            intermediate_size=128,
            max_position_embeddings=64,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            attn_implementation="eager",
            **_SIZES,
        )
    )


def tiny_gpt2() -> PreTrainedModel:
    """Two layers, two heads of 64."""
    return GPT2LMHeadModel(
        GPT2Config(
            n_embd=128,
            n_head=2,
            n_layer=LAYERS,
            n_positions=64,
            bos_token_id=0,
            eos_token_id=0,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            attn_implementation="eager",
            **_SIZES,
        )
    )


def check_model(name: str, make: Callable[[], PreTrainedModel]) -> Check:
    """Forward and backward of a padded batch: as close to fp32 eager as 16-bit eager is.

    Every attention module must have run once, and where support.explain says.
    """
    try:
        wish = environment.parse(os.environ)
    except ValueError:
        return Check(name, "note", "not tried: see environment")
    device, dtype, expected = _where(wish)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        exact = make().to(device).train()
        ids = torch.randint(1, VOCABULARY, (3, LENGTH)).to(device)
    mask = torch.ones_like(ids)
    mask[1, LENGTH // 2 :] = 0
    mask[2, 7:] = 0
    low = copy.deepcopy(exact).to(dtype)
    want, eager = _outputs(exact, ids, mask), _outputs(low, ids, mask)
    with patched(low, strict=False) as report:
        got = _outputs(low, ids, mask)
    rows = report.rows
    calls = {k: sum(getattr(row.calls, k) for row in rows) for k in ("kernel", "cpu", "fallback")}
    errors = {
        kind: {"ours": _distance(g, w), "eager": _distance(e, w)}
        for kind, w, e, g in zip(("logits", "gradients"), want, eager, got, strict=True)
    }
    facts = {
        "device": device,
        "dtype": support.dtype_name(dtype),
        "calls": calls,
        "errors": errors,
        "why": sorted({row.why for row in rows}),
    }
    problems = [
        f"{kind}: relative error {e['ours']:.2g} against fp32 eager, where "
        f"{support.dtype_name(dtype)} eager has {e['eager']:.2g}"
        for kind, e in errors.items()
        if e["ours"] > 2 * e["eager"] + 1e-5
    ]
    if calls != {"kernel": 0, "cpu": 0, "fallback": 0, expected: LAYERS}:
        counts = ", ".join(f"{n} {kind}" for kind, n in calls.items())
        problems.append(f"calls: expected {LAYERS} {expected}, got {counts}")
    if problems:
        summary = "\n".join([*problems, str(report)])
        step = "report this with the output of hf-flashattn doctor --json"
        return Check(name, "problem", summary, step, facts)
    summary = (
        f"{calls[expected]} of {LAYERS} calls on {', '.join(facts['why'])} ({expected}); error "
        f"of logits {errors['logits']['ours']:.1e}, gradients {errors['gradients']['ours']:.1e}"
    )
    return Check(name, "ok" if expected != "fallback" else "note", summary, facts=facts)


def _where(wish: environment.Environment) -> tuple[str, torch.dtype, str]:
    """(device, dtype, the kind of call to expect). Without a library nothing is built: the CPU."""
    device, dtype, expected = "cpu", torch.float32, "cpu"
    if torch.cuda.is_available() and (ops.library_status().loaded or not _on_hopper()):
        device, dtype = "cuda", torch.bfloat16
        expected = "kernel" if support.explain(_kernel_request()).ok else "fallback"
    return device, dtype, "fallback" if wish.disable else expected


def _outputs(model: PreTrainedModel, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """The logits of the real tokens and all gradients of their loss, flat and in fp32."""
    model.zero_grad()
    real = mask.bool()
    logits = model(input_ids=ids, attention_mask=mask).logits[real].float()
    F.cross_entropy(logits, ids[real]).backward()
    gradients = [p.grad.float().flatten() for p in model.parameters() if p.grad is not None]
    return logits.detach(), torch.cat(gradients)


def _distance(got: Tensor, want: Tensor) -> float:
    """Relative; what is not finite is infinitely far."""
    distance = ((got - want).norm() / want.norm()).item()
    return distance if math.isfinite(distance) else sys.float_info.max  # JSON has no infinity


def _brief(error: Exception) -> str:
    return str(error).removeprefix("hf_flashattn: ").partition(". Next step: ")[0]
