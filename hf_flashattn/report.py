"""What ran where: calls counted per attention module, and the table that patch_model returns.

Counters are kept beside the modules, by weak reference, and cost one dictionary look-up per call.
Under torch.compile a call is seen once per trace, not once per run: the columns then count traces,
which the table marks with "traced".
"""

from __future__ import annotations

import textwrap
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch._dynamo.comptime import comptime

from hf_flashattn import environment, support

SETTINGS = "_hf_flashattn"  # the attribute of an attention module that holds its Settings


@dataclass
class Calls:
    """The calls of one attention module so far."""

    kernel: int = 0  # ran on our CUDA kernel
    cpu: int = 0  # ran on our op's CPU implementation: same call, no kernel
    fallback: int = 0  # ran on PyTorch's SDPA or the model's eager function
    traced: bool = False  # some were traces of torch.compile: each stands for any number of runs
    implementations: Counter[str] = field(default_factory=Counter)
    reasons: Counter[str] = field(default_factory=Counter)

    @property
    def total(self) -> int:
        return self.kernel + self.cpu + self.fallback


_CALLS: WeakKeyDictionary[nn.Module, Calls] = WeakKeyDictionary()


def calls_of(module: nn.Module) -> Calls:
    """The counters of `module`, all zero if it was never called."""
    return _CALLS.get(module) or Calls()


def forget_calls(module: nn.Module) -> None:
    """Let the counters of `module` start anew."""
    _CALLS.pop(module, None)


def count_kernel(module: nn.Module, implementation: str) -> None:
    """Count a call that ran on `implementation`, as support.explain names it."""
    if torch.compiler.is_compiling():
        _count_trace(module, implementation, None)
    else:
        _count(module, implementation, None)


def count_fallback(module: nn.Module, reason: str) -> None:
    """Count a call that could not run on the kernel for `reason`."""
    if torch.compiler.is_compiling():
        _count_trace(module, "", reason)
    else:
        _count(module, "", reason)


def _count(
    module: nn.Module, implementation: str, reason: str | None, traced: bool = False
) -> None:
    calls = _CALLS.get(module)
    if calls is None:
        calls = _CALLS[module] = Calls()
    calls.traced |= traced
    if reason is not None:
        calls.fallback += 1
        calls.reasons[reason] += 1
        if calls.reasons[reason] == 1:
            _log(module, f"fallback: {reason}", reason)
        return
    calls.implementations[implementation] += 1
    if calls.implementations[implementation] == 1:
        _log(module, implementation)
    if is_cpu_implementation(implementation):
        calls.cpu += 1
    else:
        calls.kernel += 1


def _count_trace(module: nn.Module, implementation: str, reason: str | None) -> None:
    # Runs in the compiler and leaves nothing in the graph: no break, no guard, no cost.
    comptime(_count_in_compiler)


def _count_in_compiler(ctx: Any) -> None:
    try:
        module, implementation, reason = (
            ctx.get_local(name)._i_will_not_complain_if_bc_breaks_VariableTracker()
            for name in ("module", "implementation", "reason")
        )
        module = module.value
        implementation, reason = implementation.as_python_constant(), reason.as_python_constant()
    except (AttributeError, KeyError, NotImplementedError):
        return  # a count is never worth a failed compilation
    _count(module, implementation, reason, traced=True)


_LOGGED: set[str] = set()  # the reasons that were


def _log(module: nn.Module, decision: str, reason: str | None = None) -> None:
    """What HF_FLASHATTN_LOG asks for, of a decision that is new for its module."""
    log = environment.current().log
    if log == "off":
        return
    settings = getattr(module, SETTINGS, None)
    name = settings.name if settings is not None and settings.name else type(module).__name__
    if reason is not None and reason not in _LOGGED:
        _LOGGED.add(reason)
        environment.LOGGER.warning("%s: %s", name, decision)
    elif log == "calls":
        environment.LOGGER.info("%s: %s", name, decision)


def is_cpu_implementation(name: str) -> bool:
    """Whether support.explain's name of what runs is the CPU's stand-in for the kernel."""
    return "(CPU)" in name


# ---- the table -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """One attention module, as a line of the table."""

    module: str
    cls: str
    runs: str  # "kernel", "cpu implementation", "fallback", "mixed" or "unsupported"
    why: str
    calls: Calls
    implementation: str = ""  # the name under which Transformers gives it our attention

    @property
    def expected(self) -> bool:
        """Whether `runs` is a forecast: the module was not called yet."""
        return self.calls.total == 0


@dataclass(frozen=True)
class Target:
    """The machine that a forecast is for, where the weights do not say: on the meta device."""

    device_type: str
    compute_capability: tuple[int, int] | None = None


@dataclass(eq=False)
class Site:
    """An attention module of a model, and what is known of it before any call."""

    name: str
    module: nn.Module
    unsupported: str | None = None  # why Transformers' dispatch does not reach it
    excluded: str | None = None  # why it stays off the kernel by the user's wish
    owner: nn.Module | None = None  # the innermost PreTrainedModel around it
    family: Any = None  # families.Family of a module with attention code of its own that we take
    implementation: str = ""  # what its config names; "" where no name reaches it

    def row(self) -> Row:
        """What ran so far; without a call, what will."""
        calls = calls_of(self.module)
        if self.unsupported is not None or calls.total == 0:
            runs, why = self.forecast()
        elif calls.fallback:
            runs = "fallback" if calls.fallback == calls.total else "mixed"
            why = "; ".join(reason for reason, _ in calls.reasons.most_common())
        else:
            runs = "mixed" if calls.kernel and calls.cpu else "kernel"
            runs = "cpu implementation" if calls.cpu == calls.total else runs
            why = ", ".join(calls.implementations)
        return Row(self.name, type(self.module).__name__, runs, why, calls, self.implementation)

    def expected_row(self, target: Target | None = None) -> Row:
        """The row as it is before any call."""
        name, runs = type(self.module).__name__, self.forecast(target)
        return Row(self.name, name, *runs, Calls(), self.implementation)

    def forecast(self, target: Target | None = None) -> tuple[str, str]:
        """(runs, why) from the module's weights and attributes, on `target` or where they are.

        Masks, and dtypes under autocast, only show in a call.
        """
        if self.unsupported is not None:
            return "unsupported", self.unsupported
        if self.excluded is not None:
            return "fallback", self.excluded
        weight = next((p for p in self.module.parameters() if p.is_floating_point()), None)
        head_dim = (
            self.family.head_dim_of(self.module)
            if self.family is not None
            else _first_int(self.module, _HEAD_DIMS)
        )
        if weight is None or head_dim is None:
            return "kernel", "to be seen in the first forward"
        if target is None:
            target = Target(weight.device.type, support.compute_capability(weight.device))
        dtype, note = weight.dtype, ""
        if target.device_type == "cuda" and dtype == torch.float32:
            dtype, note = torch.bfloat16, "under autocast; fp32 calls fall back"
        softcap = getattr(self.module, "attn_logit_softcapping", None) or 0.0
        request = support.Request(
            target.device_type,
            target.compute_capability,
            dtype,
            head_dim,
            1,
            1,
            softcap=float(softcap),
            bias=self.adds_bias(),
            sinks=getattr(self.module, "sinks", None) is not None,
        )
        verdict = support.explain(request)
        if not verdict.ok:
            return "fallback", verdict.reason
        why = note or verdict.kernel
        if window := self._window():
            limit = support.explain_features(window=(window - 1, 0), causal=True)
            why += f"; over {window} tokens a fallback: {limit.reason}" if limit else ""
        return "cpu implementation" if is_cpu_implementation(verdict.kernel) else "kernel", why

    def adds_bias(self) -> bool:
        """Whether something is added to this module's scores besides masks."""
        if self.family is not None:
            return self.family.bias(self.module) is not None
        return _adds_bias(self.module)

    def _window(self) -> int | None:
        return (
            _sliding_window(self.module) if self.family is None else self.family.window(self.module)
        )


_HEAD_DIMS = ("head_dim", "attention_head_size", "head_size", "key_value_proj_dim")


def _adds_bias(module: nn.Module) -> bool:
    """Whether the model adds a position bias to this module's scores: T5 and its kin, Swin."""
    return hasattr(module, "has_relative_attention_bias") or any(
        "relative_position_bias" in name for name, _ in module.named_parameters()
    )


def _sliding_window(module: nn.Module) -> int | None:
    """The window of this module, itself included; the config speaks for modules that do not."""
    if hasattr(module, "sliding_window"):
        window = module.sliding_window
    else:
        config = getattr(module, "config", None)
        window = getattr(config, "sliding_window", None)
        if getattr(config, "layer_types", None) or not getattr(config, "use_sliding_window", True):
            window = None
    return window if isinstance(window, int) and window > 0 else None


def _first_int(module: nn.Module, names: tuple[str, ...]) -> int | None:
    found = (getattr(module, name, None) for name in names)
    return next((x for x in found if isinstance(x, int) and x > 0), None)


@dataclass(eq=False)
class Unpadded:
    """What unpad=True did for one model of a tree, such as the BertModel of a BertForMaskedLM."""

    name: str
    cls: str
    why_not: str | None = None  # why its layers always run padded
    unpadded: int = 0  # forwards without padding
    padded: Counter[str] = field(default_factory=Counter)  # forwards as before, by reason
    places: int = 0  # batch * tokens of the unpadded forwards
    tokens: int = 0  # of them, those that the layers ran on

    def count_unpadded(self, places: int, tokens: int) -> None:
        self.unpadded += 1
        self.places += places
        self.tokens += tokens

    def count_padded(self, reason: str) -> None:
        self.padded[reason] += 1

    def forget(self) -> None:
        self.unpadded = self.places = self.tokens = 0
        self.padded.clear()

    def __str__(self) -> str:
        line = f"unpadding: {self.name or self.cls}: "
        if self.why_not is not None:
            return line + textwrap.shorten(f"no: {self.why_not}", WIDEST_REASON, placeholder=" ...")
        if not self.unpadded and not self.padded:
            return line + "yes (expected)"
        line += f"{self.unpadded} forwards without padding"
        if self.unpadded:
            line += f" ({self.tokens / self.places:.0%} of their places)"
        if self.padded:
            reasons = ", ".join(f"{n} {reason}" for reason, n in self.padded.most_common())
            line += f", {self.padded.total()} as before: {reasons}"
        return line


class NotOnKernel(AssertionError):
    """Report.assert_all_on_kernel found a module that does not run on the kernel."""


class Report:
    """What patch_model did, and what has run since. Printing it shows the state of that moment."""

    def __init__(
        self, model_name: str, sites: list[Site], unpadding: Sequence[Unpadded] = ()
    ) -> None:
        self.model_name = model_name
        self.sites = sites
        self.unpadding = unpadding  # what became of unpad=True; empty without

    @property
    def rows(self) -> list[Row]:
        """One row per attention module, as of now."""
        return [site.row() for site in self.sites]

    def __str__(self) -> str:
        rows = self.rows
        if not rows:
            return f"hf_flashattn: no attention module found in {self.model_name}"
        counts = Counter(row.runs for row in rows)
        summary = ", ".join(f"{n} {runs}" for runs, n in counts.items())
        lines = [f"hf_flashattn: {self.model_name}, {summary}", format_rows(rows)]
        return "\n".join([*lines, *map(str, self.unpadding)])

    __repr__ = __str__

    def assert_all_on_kernel(
        self, *, allow_cpu: bool = False, allow_uncalled: bool = False
    ) -> None:
        """Passes if every attention module ran on the kernel in all its calls.

        Args:
            allow_cpu: the op's CPU implementation passes too.
            allow_uncalled: modules that no forward has reached pass if the kernel is expected to
                take them, such as cross-attention in a forward without encoder states.

        Raises:
            NotOnKernel: with the rows that fail.
        """
        rows = self.rows
        bad = [
            row
            for row in rows
            if not _on_kernel(row, allow_cpu) or (row.expected and not allow_uncalled)
        ]
        if not rows:
            raise NotOnKernel(
                f"hf_flashattn: expected attention modules in {self.model_name}, got none. "
                "Next step: patch the Transformers model itself."
            )
        if bad:
            hint = ""
            if any(row.expected for row in bad):
                hint += "\nRun a forward first, or pass allow_uncalled=True: so far a forecast."
            if any(row.runs == "cpu implementation" for row in bad) and not allow_cpu:
                hint += (
                    "\nOn the CPU no kernel runs: move the model to a GPU, or pass allow_cpu=True."
                )
            raise NotOnKernel(
                f"hf_flashattn: expected all {len(rows)} attention modules of {self.model_name} "
                f"on the kernel, got {len(bad)} that are not:\n{format_rows(bad)}{hint}"
            )


def _on_kernel(row: Row, allow_cpu: bool) -> bool:
    if row.runs == "mixed":  # a model that was moved has calls of both kinds
        return allow_cpu and row.calls.fallback == 0
    return row.runs == "kernel" or (allow_cpu and row.runs == "cpu implementation")


WIDEST_REASON = 160  # characters of the table's column


def format_rows(rows: list[Row], *, forecast: bool = False) -> str:
    """The rows as a text table; a long reason is cut here, Row.why has all of it.

    forecast: that all rows are one is said elsewhere: no "(expected)", no counts of calls.
    """
    cells = [("module", "class", "runs on", "name", "why", "kernel", "cpu", "fallback")]
    for row in rows:
        note = row.expected and row.runs != "unsupported" and not forecast
        runs = f"{row.runs} (expected)" if note else row.runs
        mark = " traced" if row.calls.traced else ""
        counts = (
            f"{row.calls.kernel}{mark}",
            f"{row.calls.cpu}{mark}",
            f"{row.calls.fallback}{mark}",
        )
        why = textwrap.shorten(row.why, WIDEST_REASON, placeholder=" ...")
        cells.append((row.module, row.cls, runs, row.implementation, why, *counts))
    if forecast:
        cells = [line[:5] for line in cells]
    widths = [max(len(line[i]) for line in cells) for i in range(len(cells[0]))]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in cells
    ]
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(lines)
