"""One model on eager and patched, on the same batches: what differs, and what ran where."""

from __future__ import annotations

import contextlib
import copy
import inspect
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

import hf_flashattn

from .configs import FIRST_SPECIAL, NotBuilt, build, line_of, shortened
from .inputs import Batches, make_batches
from .recipe_batches import RECIPES
from .recipes import AGAINST_SDPA

TOLERANCE = 5e-4  # of the largest logit or gradient; MobileBERT is off by half of it under sdpa
# Of what a model puts out, this says most, whatever comes first.
TELLING = ("logits", "pred_masks", "matching_scores", "audio_values")
DOCUMENTS = (5, 7, 2)  # tokens of those that are packed into a row


@dataclass(frozen=True)
class Result:
    """One row of the table."""

    model: str
    task: str
    outcome: str
    sites: str = ""
    calls: str = ""
    why: str = ""

    def line(self) -> str:
        cells = (self.model, self.task, self.outcome, self.sites, self.calls, self.why)
        return "| " + " | ".join(" ".join(x.replace("|", "/").split()) for x in cells) + " |"


def examine(model_type: str, task: str) -> Result:
    """Builds the model twice, runs both, compares; every way it can go is an outcome."""
    torch.set_num_threads(1)
    try:
        eager = build(model_type, task)
        model, notes = copy.deepcopy(eager), []
        if model_type in AGAINST_SDPA:
            eager.set_attn_implementation("sdpa")
            notes.append("against sdpa: eager takes its mask for the opposite")
        batches, expected = _run_first(eager, _proposals(eager))
    except NotBuilt as error:
        return Result(model_type, task, "not built", why=str(error))
    except Exception as error:
        return Result(model_type, task, "not built", why=f"eager fails: {line_of(error)}")
    report, findings = None, []
    if "left" in batches and task != "base":
        ones = torch.ones_like(batches["left"]["attention_mask"])
        unmasked = batches["left"] | {"attention_mask": ones}
        if not _differences("", _run(eager, unmasked, like=batches["left"]), expected["left"]):
            notes.append("eager does not heed the mask")  # then agreement proves little
    try:
        report = hf_flashattn.patch_model(model)
        for kind, batch in batches.items():
            where = f"padded {kind}" if kind in ("right", "left") else "without padding"
            found, more = _compare(where, eager, batch, _run(model, batch), expected[kind])
            findings, notes = findings + found, notes + more
        if "left" in batches:
            for compare in (_compare_cache, _compare_packed):
                found, more = compare(eager, model, batches["left"])
                findings, notes = findings + found, notes + more
    except Exception as error:
        findings.append(f"raises {line_of(error)}")
    result = _judge(model_type, task, report, findings)
    return replace(result, why="; ".join(filter(None, (result.why, *notes))))


def _proposals(model: nn.Module) -> Iterator[Batches]:
    own = RECIPES.get(model.config.model_type)
    return iter([own(model)]) if own else make_batches(model)


def _run_first(
    model: nn.Module, proposals: Iterator[Batches]
) -> tuple[Batches, dict[str, Outputs]]:
    """The first batches that the model runs on, and what it makes of them."""
    errors = []
    while True:
        try:
            batches = next(proposals)
            made = {kind: _run(model, batch) for kind, batch in batches.items()}
            if all(x.is_finite() for x in made.values()):
                return batches, made
            raise FloatingPointError("what comes out is not finite")
        except StopIteration:
            break
        except Exception as error:
            errors.append(error)
    telling = [x for x in errors if "required positional argument" not in str(x)]
    raise telling[0] if telling else errors[0]


@dataclass(frozen=True)
class Outputs:
    logits: Tensor  # (tokens, vocabulary), of the tokens that are not padding
    gradients: dict[str, Tensor]

    def is_finite(self) -> bool:
        return all(x.isfinite().all() for x in (self.logits, *self.gradients.values()))


def _run(
    model: nn.Module, batch: dict[str, Tensor], like: dict[str, Tensor] | None = None
) -> Outputs:
    """What comes out first, and gradients; like: the batch whose tokens count."""
    torch.manual_seed(2)  # for models that draw numbers in eval mode
    model.zero_grad()
    given = {name: x(model) if callable(x) else x for name, x in batch.items()}
    logits = _logits(model(**given, **_without_cache(model)))
    counted = like or batch
    kept = counted.get("decoder_attention_mask", counted.get("attention_mask"))
    if kept is not None and "input_ids" in batch and logits.shape[1:2] >= kept.shape[1:2]:
        logits = logits[:, -kept.shape[1] :][kept.bool()]
    elif kept is not None and logits.dim() == 3 and "input_ids" not in batch:
        logits = logits[0]  # frames stand for several samples: the row that has no padding
    logits = logits.float()
    weights = torch.rand(logits.shape, generator=torch.Generator().manual_seed(3)) - 0.5
    if logits.requires_grad:  # codes of sound have no gradient
        (logits * weights).sum().backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return Outputs(logits.detach(), gradients)


def _without_cache(model: nn.Module) -> dict[str, bool]:
    takes = inspect.signature(model.forward).parameters
    if model.main_input_name == "input_values" and "use_cache" not in takes:
        return {}  # codecs hand what they do not know on to layers that they tell it themselves
    return {"use_cache": False} if hasattr(model.config, "use_cache") else {}


def _logits(output: Any) -> Tensor:
    if (objects := getattr(output, "obj_id_to_mask", None)) is not None:  # of a video
        return torch.stack([objects[number] for number in sorted(objects)])
    output = getattr(output, "language_model_outputs", output)  # the last of several models
    found = (getattr(output, name, None) for name in TELLING)
    logits = next((x for x in found if x is not None), None)
    if logits is None:
        logits = output[0]
    if isinstance(logits, (tuple, list)):
        logits = logits[0]
    return logits


def _differences(where: str, got: Outputs, expected: Outputs) -> list[str]:
    found = []
    if (off := _relative([(got.logits, expected.logits)])) is not None:
        found.append(f"{where}: logits by {off}")
    if got.gradients.keys() != expected.gradients.keys():
        found.append(f"{where}: other weights have gradients")
    else:
        pairs = [(got.gradients[name], x) for name, x in expected.gradients.items()]
        if (off := _relative(pairs)) is not None:
            found.append(f"{where}: gradients by {off}")
    return found


def _relative(pairs: list[tuple[Tensor, Tensor]]) -> str | None:
    """The largest difference by the largest value expected; None where that is within TOLERANCE."""
    if not pairs:
        return None
    scale = max(expected.abs().max().item() for _, expected in pairs if expected.numel())
    off = max((got - expected).abs().max().item() for got, expected in pairs if expected.numel())
    bad_values = any(not got.isfinite().all() for got, _ in pairs)
    if bad_values or not off <= TOLERANCE * scale:
        return "nan" if bad_values else f"{off / max(scale, 1e-30):.1e}"
    return None


def _compare(
    where: str, eager: nn.Module, batch: dict[str, Tensor], got: Outputs, expected: Outputs
) -> tuple[list[str], list[str]]:
    """(findings, notes). Rows that see nothing are 0 in ours as in sdpa, where eager averages."""
    found = _differences(where, got, expected)
    if not found:
        return [], []
    with contextlib.suppress(Exception):  # it has no sdpa, or none for this batch
        if not _differences(where, got, _run(_on_sdpa(eager), batch)):
            return [], [f"{where}: as sdpa, which eager differs from"]
    return found, []


def _on_sdpa(eager: nn.Module) -> nn.Module:
    model = copy.deepcopy(eager)
    model.set_attn_implementation("sdpa")
    return model


def _compare_cache(
    eager: nn.Module, model: nn.Module, batch: dict[str, Tensor]
) -> tuple[list[str], list[str]]:
    """All tokens but one into a cache, then the last: only of decoders that keep one."""
    try:
        with torch.no_grad():
            expected = _step(eager, batch)
    except Exception:
        return [], []  # without a cache, or one that needs more than this: eager cannot either
    with torch.no_grad():
        got = _step(model, batch)
    off = _relative([(got, expected)])
    if off is None:
        return [], []
    with contextlib.suppress(Exception), torch.no_grad():
        if _relative([(got, _step(_on_sdpa(eager), batch))]) is None:
            return [], ["with a cache: as sdpa, which eager differs from"]
    return [f"with a cache: logits by {off}"], []


def _step(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    tokens = "decoder_input_ids" if "decoder_input_ids" in batch else "input_ids"
    mask = "decoder_attention_mask" if tokens == "decoder_input_ids" else "attention_mask"
    first = batch | {tokens: batch[tokens][:, :-1], mask: batch[mask][:, :-1]}
    cache = model(**first, use_cache=True).past_key_values
    last = batch | {tokens: batch[tokens][:, -1:]}
    return _logits(model(**last, past_key_values=cache, use_cache=True))[0]  # a row without padding


def _compare_packed(
    eager: nn.Module, model: nn.Module, batch: dict[str, Tensor]
) -> tuple[list[str], list[str]]:
    """Documents packed into one row against each document alone, on eager: (findings, notes)."""
    takes = inspect.signature(eager.forward).parameters
    if "position_ids" not in takes or "decoder_input_ids" in takes or "attention_mask" not in takes:
        return [], []
    draw = torch.Generator().manual_seed(4)
    documents = [
        {
            "input_ids": torch.randint(10, FIRST_SPECIAL, (1, n), generator=draw),
            "position_ids": torch.arange(n)[None],
        }
        for n in DOCUMENTS
    ]
    row = {name: torch.cat([x[name] for x in documents], dim=1) for name in documents[0]}

    def logits(which: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        with torch.no_grad():
            return _logits(which(**batch, **_without_cache(which)))

    try:
        expected = torch.cat([logits(eager, x) for x in documents], dim=1)
        stock = logits(eager, row)
    except Exception:
        return [], []  # no positions of this form
    if stock.shape != expected.shape:
        return [], []  # pooled
    off = _relative([(logits(model, row), expected)])
    if off is None:
        return [], []
    if _relative([(stock, expected)]) is None:
        return [f"packed: logits by {off}"], []
    if _relative([(logits(model, row), stock)]) is None:
        return [], ["packed documents see each other, on eager too"]
    return [], [f"packed documents see each other (by {off}), on eager too, in another way"]


def _judge(
    model_type: str, task: str, report: hf_flashattn.Report | None, findings: list[str]
) -> Result:
    rows = report.rows if report is not None else []
    reach = [row for row in rows if row.runs != "unsupported"]
    idle = [row.module for row in reach if row.calls.total == 0]
    ran = Counter(row.runs for row in reach if row.calls.total)
    kernel, fallback = (sum(counts) for counts in zip((0, 0), *_calls(reach), strict=True))
    parts = [
        "kernel" if kernel else "",
        "fallback" if fallback else "",
        "unsupported" if len(reach) < len(rows) or not rows else "",
    ]
    outcome = " + ".join(filter(None, parts))
    if len(idle) == len(rows) and rows:
        findings = [*findings, "no module was ever called"]
    told = [row.why for row in rows if row.runs in ("fallback", "mixed", "unsupported")]
    whys = [shortened(x) for x in dict.fromkeys(part for why in told for part in why.split("; "))]
    if not rows and report is not None:
        whys = ["no attention module found"]
    if idle:
        whys.append(f"never called: {', '.join(idle[:2])}{' ...' if len(idle) > 2 else ''}")
    ran.update({"unsupported": len(rows) - len(reach), "never called": len(idle)})
    names = {"cpu implementation": "kernel (cpu implementation)"}
    sites = ", ".join(f"{n} {names.get(x, x)}" for x, n in ran.items() if n)
    calls = f"{kernel} + {fallback}" if fallback else str(kernel)
    if findings:
        raised = findings[-1].startswith("raises ")
        outcome = "raises" if raised else "differs"
        whys = [*findings, *whys]
    return Result(model_type, task, outcome, sites, calls, "; ".join(whys))


def _calls(rows: list[Any]) -> Iterator[tuple[int, int]]:
    return ((row.calls.kernel + row.calls.cpu, row.calls.fallback) for row in rows)
