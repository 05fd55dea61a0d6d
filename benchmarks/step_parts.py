"""Where the time of a training step goes: attention, GEMMs, norms, GELU, dropout, loss, optimizer.

    python benchmarks/step_parts.py --json benchmarks/results/step_parts.json

The steps of training_step.py under torch.profiler. Hooks mark which part a module's forward belongs
to, the innermost mark counting; a backward belongs to the part of its forward, by the sequence
number that autograd gives both. Times are those of the device: kernels on a GPU, operators on a
CPU. What has neither a mark nor a forward is `other`: residuals, casts, gradients added up.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from contenders import ATTENTIONS, SHAPES, TINY, Contender, contender, random_batch
from outcome import environment, save
from torch import nn
from torch.autograd import DeviceType
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity, profile, record_function
from training_step import ran_on

MARK = "part: "
BACKWARD = "autograd::engine::evaluate_function"
# (pattern of a module's name, pattern of its class, part); the first that fits, most special first.
RULES = (
    (r"", r"LayerNorm", "LayerNorm"),
    (r"", r"Dropout", "dropout"),
    (r"", r"GELU", "GELU"),
    (r"(lm_head|predictions\.decoder)$", r"", "output layer"),
    (r"(mlp|intermediate|output)\.(c_fc|c_proj|dense)$", r"(Conv1D|Linear)", "MLP GEMMs"),
    (r"", r"(Conv1D|Linear)", "other GEMMs"),
    (r"", r"(GPT2Attention|BertSelfAttention)$", "attention"),
    (r"", r"Embedding", "embedding"),
    (r"^(transformer|bert)$", r"", "other"),
    (r"^$", r"", "loss"),  # of the whole model, what is in none of the above
)
PARTS = (
    "attention",
    "MLP GEMMs",
    "other GEMMs",
    "output layer",
    "loss",
    "LayerNorm",
    "GELU",
    "dropout",
    "embedding",
    "optimizer",
    "other",
)


def part_of(name: str, module: nn.Module) -> str | None:
    kind = type(module).__name__
    if name.endswith("attention.output.dense"):  # BERT's projection after attention
        return "other GEMMs"
    for of_name, of_class, part in RULES:
        if re.search(of_name, name) and re.search(of_class, kind):
            return part
    return None


def mark(model: nn.Module) -> list[Any]:
    """Hooks around every module that is a part; remove them with their own remove()."""
    handles = []
    open_marks: list[record_function] = []

    def begin(part: str) -> Any:
        def hook(*_: Any) -> None:
            scope = record_function(MARK + part)
            scope.__enter__()
            open_marks.append(scope)

        return hook

    def end(*_: Any) -> None:
        open_marks.pop().__exit__(None, None, None)

    for name, module in model.named_modules():
        part = part_of(name, module)
        if part is not None:
            handles.append(module.register_forward_pre_hook(begin(part), prepend=True))
            handles.append(module.register_forward_hook(end, always_call=True))
    return handles


def time_parts(events: Sequence[FunctionEvent], on_gpu: bool) -> dict[str, float]:
    """Milliseconds of each part, from the profiler's events of any number of steps."""
    times: dict[str, float] = defaultdict(float)
    for event, part in parts_of(events):
        spent = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        times[part] += spent / 1e3
    return {part: times.get(part, 0.0) for part in PARTS}


def parts_of(events: Sequence[FunctionEvent]) -> Iterator[tuple[FunctionEvent, str]]:
    """Every operator with the part it belongs to."""
    cpu = [event for event in events if event.device_type == DeviceType.CPU]
    forward: dict[int, str] = {}
    # Operators without a gradient bear the number of the next one that has one: the last counts.
    for event in sorted(cpu, key=lambda event: event.time_range.start):
        part = _mark_around(event)
        if event.sequence_nr >= 0 and part is not None and not _backward_around(event):
            forward[event.sequence_nr] = part
    for event in cpu:
        if event.name.startswith((MARK, "ProfilerStep")):
            continue
        part = _mark_around(event)
        engine = _backward_around(event)
        if part is None and engine is not None:
            part = forward.get(engine.sequence_nr)
        yield event, part or "other"


def _mark_around(event: FunctionEvent) -> str | None:
    while event is not None:
        if event.name.startswith(MARK):
            return event.name.removeprefix(MARK)
        event = event.cpu_parent
    return None


def _backward_around(event: FunctionEvent) -> FunctionEvent | None:
    while event is not None:
        if event.name.startswith(BACKWARD):
            return event
        event = event.cpu_parent
    return None


def measure(current: Contender, batches: list[dict[str, Any]], warmup: int) -> dict[str, Any]:
    """Milliseconds a step of each part, and of the kernels that belong to no operator."""
    on_gpu = next(iter(batches[0].values())).device.type == "cuda"
    for batch in batches[:warmup]:
        current.step(batch)
    handles = mark(current.model)
    step = current.optimizer.step

    def marked_step(*args: Any, **kwargs: Any) -> Any:
        with record_function(MARK + "optimizer"):
            return step(*args, **kwargs)

    current.optimizer.step = marked_step
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with profile(activities=activities) as profiler:
        for batch in batches[warmup:]:
            current.step(batch)
        if on_gpu:
            torch.cuda.synchronize()
    current.optimizer.step = step
    for handle in handles:
        handle.remove()
    steps = len(batches) - warmup
    events = profiler.events()
    parts = {part: ms / steps for part, ms in time_parts(events, on_gpu).items()}
    kernels = sum(
        event.self_device_time_total
        for event in events
        if event.device_type == DeviceType.CUDA and not event.name.startswith(MARK)
    )
    return {
        "parts_ms": parts,
        "sum_ms": sum(parts.values()),
        "all_kernels_ms": kernels / 1e3 / steps if on_gpu else None,
        "ran_on": ran_on(current.report),
    }


def draw(models: Sequence[dict[str, Any]], path: Path, title: str) -> None:
    """A panel a model, a bar an attention, a colour a part."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(
        1, len(models), figsize=(5.5 * len(models) + 1.5, 4.5), squeeze=False, layout="constrained"
    )
    colors = plt.get_cmap("tab20").colors
    for axis, model in zip(axes[0], models, strict=True):
        names = list(model["runs"])
        bottoms = [0.0] * len(names)
        for number, part in enumerate(PARTS):
            heights = [model["runs"][name]["parts_ms"][part] for name in names]
            axis.bar(names, heights, bottom=bottoms, color=colors[number], label=part, width=0.6)
            bottoms = [b + h for b, h in zip(bottoms, heights, strict=True)]
        axis.set(title=model["name"], ylabel="ms per step")
        axis.spines[["top", "right"]].set_visible(False)
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles[::-1], labels[::-1], loc="outside right center", frameon=False)
    figure.suptitle(title, fontsize=11)
    figure.savefig(path, dpi=140)
    plt.close(figure)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=SHAPES, default=["gpt2", "bert-large"])
    parser.add_argument("--attention", nargs="+", choices=ATTENTIONS, default=list(ATTENTIONS))
    parser.add_argument("--steps", type=int, default=5, help="profiled steps")
    parser.add_argument("--warmup", type=int, default=5)
    parser.add_argument("--tiny", action="store_true", help="tiny shapes: for tests")
    parser.add_argument("--cpu", action="store_true")
    parser.add_argument("--json", type=Path, metavar="FILE", help="beside it a PNG of that name")
    args = parser.parse_args(argv)
    on_gpu = torch.cuda.is_available() and not args.cpu
    device = torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")
    outcome: dict[str, Any] = environment(device) | {"kind": "step_parts", "models": []}
    for name in args.models:
        shape = (TINY if args.tiny else SHAPES)[name]
        runs = {}
        for attention in args.attention:
            generator = torch.Generator().manual_seed(0)
            batches = [
                {k: v.to(device) for k, v in random_batch(name, shape, generator).items()}
                for _ in range(args.warmup + args.steps)
            ]
            current = contender(name, shape, attention, 0, device, compiled=False)
            runs[attention] = measure(current, batches, args.warmup)
            del current
        outcome["models"].append({"name": name, "runs": runs})
        print(table(name, runs), flush=True)
        save(args.json, outcome)
    if args.json:
        picture = args.json.with_suffix(".png")
        try:
            draw(outcome["models"], picture, f"A training step, {outcome['device']['name']}")
        except ImportError as error:
            print(f"no {picture}: {error}; next step: pip install matplotlib", file=sys.stderr)
        print(args.json)
    return 0


def table(name: str, runs: dict[str, dict[str, Any]]) -> str:
    lines = [f"{name:<16}" + "".join(f"{attention:>14}" for attention in runs)]
    for part in PARTS:
        lines.append(
            f"  {part:<14}" + "".join(f"{run['parts_ms'][part]:>14.2f}" for run in runs.values())
        )
    lines.append(f"  {'sum, ms':<14}" + "".join(f"{run['sum_ms']:>14.2f}" for run in runs.values()))
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
