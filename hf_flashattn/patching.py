"""patch_model: one line makes a Hugging Face model run on our kernels, per instance and reversibly.

    report = patch_model(model)   # this instance only, whoever else holds its config object
    print(report)                 # which modules run on the kernel, which don't, and why
    unpatch_model(model)          # exactly as before

One mechanism for every model. Transformers looks up the attention function and the mask function by
the name in the config, so the model gets private copies of its configs (the original may be shared)
in which that name is ours. A module that never looks up gets a forward on its instance (see
families/). Modules that must stay off the kernel still go through our function,
which sends them to the fallback: masks are made once per model and in our form. Everything that is
changed is first written to an undo log, kept on the model.
"""

from __future__ import annotations

import fnmatch
import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

from hf_flashattn import _compat, encoder_trial, environment
from hf_flashattn._compat import CONFIG_NAME, PreTrainedConfig, PreTrainedModel
from hf_flashattn.attention import SETTINGS, Settings
from hf_flashattn.families.forward import OwnForward
from hf_flashattn.hooks import first_before
from hf_flashattn.masks import TRACED
from hf_flashattn.names import ALIAS_NAME, FLASH_NAME, LEGIBLE_NAME, STATED_NAME, names_of
from hf_flashattn.notes import begin_forward
from hf_flashattn.report import Report, Site, Unpadded, forget_calls, format_rows
from hf_flashattn.sites import find_sites

_STATE = "_hf_flashattn_patch"  # the attribute of a patched model that holds its Patch


class PatchError(RuntimeError):
    """The model cannot be patched as asked. Nothing was changed.

    strict=True met a module that the kernel cannot take, a part is patched already, or `include`
    fits no attention module.
    """


# ---- public --------------------------------------------------------------------------------------


def patch_model(
    model: nn.Module,
    *,
    strict: bool | None = None,
    fallback: str | None = None,
    include: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] | None = None,
    unpad: bool = False,
) -> Report:
    """Makes this instance of a model run its attention on our kernels.

    Patching twice changes nothing; with other options it patches anew, and the counts of calls
    begin at 0. Until unpatch_model, `model.config` is a copy: what is set on it meanwhile is
    carried over to the original then.

    Args:
        model: any module that holds Transformers models; PEFT, DDP and torch.compile wrappers are
            looked through.
        strict: no fallback: PatchError now for a module that cannot run on the kernel,
            FallbackError later for a call that cannot. Default: False, or HF_FLASHATTN_STRICT.
        fallback: "sdpa" or "eager", for calls that the kernel cannot take. Default: "sdpa", or
            HF_FLASHATTN_FALLBACK.
        include, exclude: glob patterns of module names, as the report shows them: one or a
            sequence. What is not included, or is excluded, uses the fallback.
        unpad: encoders run all their layers, not attention alone, without padding. Outputs are
            those of the padded batch at its tokens and at the first place of each row, gradients
            those of a loss on these; all other padding returns 0 from the last layer on. A call
            that cannot (torch.compile, output_attentions) runs padded, and the report counts it.

    Returns: the report, which keeps counting.

    Raises:
        PatchError: strict=True and a module that cannot, or unpad=True with it and no encoder that
            can; a part that is patched already, or an `include` that no attention module matches.
        TypeError, ValueError: no torch module; another `fallback`, or a variable's bad value.
    """
    wish = environment.read()
    strict = wish.strict if strict is None else strict
    fallback = wish.fallback if fallback is None else fallback
    if fallback not in ("sdpa", "eager"):
        raise ValueError(f'hf_flashattn: fallback: expected "sdpa" or "eager", got {fallback!r}')
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"hf_flashattn: model: expected a torch module, got {type(model).__name__}. Next step: "
            "load it first, for example with AutoModel.from_pretrained"
        )
    inner = unwrap(model)
    patterns = _patterns(include), _patterns(exclude)
    options = _Options(strict, fallback, *patterns, disabled=wish.excluded, unpad=bool(unpad))
    _ensure_patch(inner, options)
    return attention_report(inner)


def unpatch_model(model: nn.Module) -> bool:
    """Puts the model back as it was before patch_model. Returns whether there was a patch."""
    inner = unwrap(model)
    patch = inner.__dict__.get(_STATE)
    if patch is None:
        return False
    patch.undo()
    return True


@contextmanager
def patched(model: nn.Module, **options: Any) -> Iterator[Report]:
    """patch_model for the length of a with-block; then the model is as before, patched or not.

        with patched(model, strict=True) as report:
            model(**batch)

    options: those of patch_model.
    """
    inner = unwrap(model)
    before = inner.__dict__.get(_STATE)
    try:
        yield patch_model(inner, **options)
    finally:
        if before is None:
            unpatch_model(inner)
        else:
            _ensure_patch(inner, before.options)


def attention_report(model: nn.Module) -> Report:
    """The report of a model, patched or loaded with attn_implementation="hf_flashattn"."""
    inner = unwrap(model)
    patch = inner.__dict__.get(_STATE)
    if patch is None:
        options = _Options(disabled=environment.current().excluded)
    else:
        options = patch.options
    sites = find_sites(inner, options.excludes)
    if patch is None:
        for site in sites:
            if site.unsupported is not None:
                continue
            name = site.implementation
            if site.family is not None:
                site.unsupported = "not patched: it runs attention code of its own"
            elif name not in (FLASH_NAME, ALIAS_NAME, STATED_NAME, LEGIBLE_NAME):
                site.unsupported = f'not patched: its attention implementation is "{name}"'
            if site.unsupported is not None:
                site.implementation = ""
    return Report(type(inner).__name__, sites, [] if patch is None else patch.unpadding)


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside its wrappers: DDP and FSDP (.module), torch.compile (._orig_mod), PEFT."""
    while True:
        if isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):
            model = inner
        elif callable(getattr(model, "get_base_model", None)) and hasattr(model, "peft_config"):
            model = model.get_base_model()
        elif not isinstance(model, PreTrainedModel) and (inner := _wrapped(model)) is not None:
            model = inner
        else:
            return model


def _wrapped(wrapper: nn.Module) -> nn.Module | None:
    """What DDP, DataParallel or DeepSpeed (`module`) or FSDP's first version holds."""
    for name in ("module", "_fsdp_wrapped_module"):
        if isinstance(inner := wrapper._modules.get(name), nn.Module):
            return inner
    return None


# ---- the undo log --------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Options:
    strict: bool = False
    fallback: str = "sdpa"
    include: tuple[str, ...] | None = None
    exclude: tuple[str, ...] | None = None
    disabled: str | None = None  # why no module at all goes to the kernel
    unpad: bool = False

    def includes(self, name: str) -> bool:
        return self.include is None or any(fnmatch.fnmatchcase(name, x) for x in self.include)

    def excludes(self, name: str) -> str | None:
        """The reason why a module of this name stays off the kernel, or None."""
        if self.disabled is not None:
            return self.disabled
        if not self.includes(name):
            return f"not in include={list(self.include)}"
        for glob in self.exclude or ():
            if fnmatch.fnmatchcase(name, glob):
                return f"excluded by {glob!r}"
        return None


class _Absent:
    """What an attribute was that was not there. A type: a deep-copied model has a copied mark."""


@dataclass(eq=False)
class _ConfigCopy:
    """One config object of the model and the copy it got; at_patch: the copy's first contents."""

    original: PreTrainedConfig
    copy: PreTrainedConfig
    at_patch: dict[str, Any] = field(default_factory=dict)


@dataclass(eq=False)
class Patch:
    """Everything patch_model changed on a model, in order."""

    owner: nn.Module
    options: _Options
    # (module, name, former value)
    attributes: list[tuple[nn.Module, str, Any]] = field(default_factory=list)
    configs: list[_ConfigCopy] = field(default_factory=list)
    hooks: list[RemovableHandle] = field(default_factory=list)
    unpadding: list[Unpadded] = field(default_factory=list)
    forwards: list[OwnForward] = field(default_factory=list)

    def set(self, module: nn.Module, name: str, value: Any) -> None:
        """Sets an instance attribute, past nn.Module.__setattr__; the former value is logged."""
        former = module.__dict__.get(name, _Absent())
        self.attributes.append((module, name, former))
        module.__dict__[name] = value

    def undo(self) -> None:
        """Everything in reverse; what the user set on a config copy goes to its original."""
        for handle in reversed(self.hooks):
            handle.remove()
        for forward in reversed(self.forwards):
            forward.remove()
        originals = {id(pair.copy): pair.original for pair in self.configs}
        for module, name, former in reversed(self.attributes):
            if isinstance(former, _Absent):
                module.__dict__.pop(name, None)
            elif id(module.__dict__.get(name)) in originals or not isinstance(
                former, PreTrainedConfig
            ):
                module.__dict__[name] = former
        for pair in self.configs:
            _carry_over(pair, originals)


def _carry_over(pair: _ConfigCopy, originals: dict[int, PreTrainedConfig]) -> None:
    now, then, target = pair.copy.__dict__, pair.at_patch, pair.original.__dict__
    for name, value in now.items():
        if name != CONFIG_NAME and (name not in then or then[name] is not value):
            target[name] = originals.get(id(value), value)
    for name in then.keys() - now.keys():
        target.pop(name, None)


# ---- patching ------------------------------------------------------------------------------------


def _ensure_patch(model: nn.Module, options: _Options) -> None:
    patch = model.__dict__.get(_STATE)
    if patch is not None and patch.options != options:
        unpatch_model(model)
        patch = None
    if patch is None:
        _refuse_nesting(model)
        _patch(model, options)


def _patch(model: nn.Module, options: _Options) -> None:
    sites = find_sites(model, options.excludes)
    _refuse_empty_include(model, sites, options)
    if options.strict:
        _refuse_fallbacks(model, sites)
    patch = Patch(model, options)
    try:
        copies = _privatize_configs(model, patch)
        renamed: dict[int, str] = {}
        for site in sites:
            if site.unsupported is not None:
                continue
            forget_calls(site.module)
            if site.family is not None:
                patch.forwards.append(OwnForward(site.module, site.family))
            for config, name in names_of(site):
                # Masks that say all suit modules that ask for less, not the other way round.
                if id(config) in copies and renamed.get(id(config)) != STATED_NAME:
                    config.__dict__[CONFIG_NAME] = renamed[id(config)] = name
            patch.set(
                site.module,
                SETTINGS,
                Settings(site.name, options.fallback, options.strict, site.excluded),
            )
        owners = {id(site.owner) for site in sites if site.unsupported is None}
        for module in model.modules():
            if isinstance(module, PreTrainedModel) and (
                id(module.config) in renamed or id(module) in owners
            ):
                untold = [
                    own
                    for own in patch.forwards
                    if own.family.untold and any(own.module is x for x in module.modules())
                ]
                _watch_forwards(module, patch, untold)
        if options.unpad:
            patch.unpadding, handles = encoder_trial.install(model, sites)
            patch.hooks += handles
            if options.strict and options.disabled is None:
                _refuse_padding(model, patch.unpadding)
        patch.set(model, _STATE, patch)
        for pair in patch.configs:
            pair.at_patch = dict(pair.copy.__dict__)
    except BaseException:
        patch.undo()
        raise


def _refuse_nesting(model: nn.Module) -> None:
    """Patches do not nest: they could then be undone in the wrong order."""
    for name, module in model.named_modules():
        if _STATE in module.__dict__ or SETTINGS in module.__dict__:
            raise PatchError(
                f"hf_flashattn: expected a model without patched parts, got "
                f"{type(model).__name__} whose {name!r} was "
                "patched on its own or as part of a larger model. Next step: unpatch_model that "
                "one first."
            )


def _refuse_empty_include(model: nn.Module, sites: list[Site], options: _Options) -> None:
    """A pattern with a slip in it would quietly leave every module on the fallback."""
    if (
        options.include is not None
        and sites
        and not any(options.includes(site.name) for site in sites)
    ):
        raise PatchError(
            f"hf_flashattn: include={list(options.include)}: expected a pattern of the attention "
            f"modules of {type(model).__name__}, got none that fits. Nearest supported: "
            f"{sites[0].name!r} and {len(sites) - 1} more, as the report lists them. Next step: "
            "correct the pattern; * stands for anything, dots included"
        )


def _refuse_fallbacks(model: nn.Module, sites: list[Site]) -> None:
    if not sites:
        raise PatchError(
            f"hf_flashattn: strict=True: expected attention modules in {type(model).__name__}, got "
            "none. Next step: patch the Transformers model itself, or leave out strict"
        )
    wanted = [site.expected_row() for site in sites if site.excluded is None]
    bad = [row for row in wanted if row.runs not in ("kernel", "cpu implementation")]
    if bad:
        raise PatchError(
            f"hf_flashattn: strict=True: expected every attention module of "
            f"{type(model).__name__} on the kernel, got "
            f"{len(bad)} of {len(wanted)} that cannot:\n{format_rows(bad)}\nLeave them out with "
            "exclude=[...], or patch with strict=False."
        )


def _refuse_padding(model: nn.Module, entries: list[Unpadded]) -> None:
    if all(entry.why_not is not None for entry in entries):
        got = "; ".join(f"{entry.name or entry.cls}: {entry.why_not}" for entry in entries)
        raise PatchError(
            f"hf_flashattn: strict=True, unpad=True: expected an encoder in {type(model).__name__} "
            f"whose layers can do without padding, got none: {got}. Nearest supported: attention "
            "alone without padding, which patch_model does anyway. Next step: leave out unpad, or "
            "patch with strict=False"
        )


def _privatize_configs(model: nn.Module, patch: Patch) -> set[int]:
    """Gives the modules copies of their configs, one for each object. Returns the copies' ids."""
    memo: dict[int, PreTrainedConfig] = {}
    for module in model.modules():
        for name, value in list(module.__dict__.items()):
            if isinstance(value, PreTrainedConfig):
                patch.set(module, name, _copy_config(value, memo, patch))
    return {id(pair.copy) for pair in patch.configs}


def _copy_config(
    config: PreTrainedConfig, memo: dict[int, PreTrainedConfig], patch: Patch
) -> PreTrainedConfig:
    if id(config) in memo:
        return memo[id(config)]
    copy = memo[id(config)] = object.__new__(type(config))
    patch.configs.append(_ConfigCopy(config, copy))
    for name, value in config.__dict__.items():
        copy.__dict__[name] = (
            _copy_config(value, memo, patch) if isinstance(value, PreTrainedConfig) else value
        )
    return copy


class _ForwardHook:
    """Forward pre-hook: a forward begins.

    It tells the mask function what a trace cannot, whether the caller passed position_ids, and
    modules whose model does not whether their attention weights are wanted.
    """

    def __init__(self, parameters: list[str], untold: list[OwnForward]) -> None:
        names = ("position_ids", "output_attentions")
        self.places = {name: parameters.index(name) for name in names if name in parameters}
        self.untold = untold

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        for own in self.untold:
            wish = self._given("output_attentions", args, kwargs)
            own.wanted = bool(module.config.output_attentions if wish is None else wish)
        if not _compat.is_tracing():
            begin_forward()
        elif "position_ids" in self.places:
            TRACED.config = module.config
            given = self._given("position_ids", args, kwargs)
            TRACED.position_ids_given = given is not None

    def _given(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        place = self.places.get(name, len(args))
        return args[place] if place < len(args) else kwargs.get(name)


def _watch_forwards(module: PreTrainedModel, patch: Patch, untold: list[OwnForward]) -> None:
    parameters = list(inspect.signature(module.forward).parameters)
    patch.hooks.append(first_before(module, _ForwardHook(parameters, untold)))


def _patterns(globs: str | Sequence[str] | None) -> tuple[str, ...] | None:
    if globs is None:
        return None
    return (globs,) if isinstance(globs, str) else tuple(globs)
