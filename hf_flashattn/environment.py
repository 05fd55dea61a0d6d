"""The environment variables that change what a program does without an edit of it.

    HF_FLASHATTN_DISABLE=1              everything runs on the fallback, strict or not
    HF_FLASHATTN_STRICT=1               no fallback: as patch_model(strict=True)
    HF_FLASHATTN_FALLBACK=sdpa|eager    what calls fall back to: as patch_model(fallback=...)
    HF_FLASHATTN_LOG=off|reasons|calls  what the logger "hf_flashattn" is told:
        reasons: every new reason for a fallback, once, as a warning
        calls: also, once for each module, what its calls run on, as an info

They hold for patched models and for those loaded under a registered name. An argument of
patch_model wins over its variable. They are read when a model is patched, and at the first
attention call if none was. An empty variable is an unset one, and 0 switches off. Warnings reach
stderr as Python's logging has it; HF_FLASHATTN_LOG=calls makes the infos do so too, unless the
program has set up logging of its own.

The variables about building and loading the library are in build.py and ops.py, and
HF_FLASHATTN_CHECK is in checks.py.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass

LOGGER = logging.getLogger("hf_flashattn")

PREFIX = "HF_FLASHATTN_"
SWITCH = {"0": False, "1": True}
CHOICES = {
    "DISABLE": SWITCH,
    "STRICT": SWITCH,
    "FALLBACK": {"sdpa": "sdpa", "eager": "eager"},
    "LOG": {"off": "off", "reasons": "reasons", "calls": "calls"},
}
DISABLED = "HF_FLASHATTN_DISABLE=1"  # the reason that reports give


@dataclass(frozen=True)
class Environment:
    """The variables' values; the defaults are those of unset ones."""

    disable: bool = False
    strict: bool = False
    fallback: str = "sdpa"
    log: str = "off"

    @property
    def excluded(self) -> str | None:
        """Why every module stays off the kernel, or None."""
        return DISABLED if self.disable else None


def parse(variables: Mapping[str, str]) -> Environment:
    """The values of `variables`. ValueError for a bad one, with the good ones."""
    values = {}
    for name, choices in CHOICES.items():
        text = variables.get(PREFIX + name, "")
        if not text:
            continue
        if text not in choices:
            good = " or ".join(choices)
            raise ValueError(
                f"hf_flashattn: {PREFIX}{name}: expected {good}, got {text!r}. "
                f"Next step: correct the variable, or unset it."
            )
        values[name.lower()] = choices[text]
    return Environment(**values)


_current: Environment | None = None


def read() -> Environment:
    """Reads the variables anew, for this call and for every current() after it."""
    global _current
    _current = parse(os.environ)
    if _current.log == "calls":
        _let_infos_pass()
    return _current


def current() -> Environment:
    """What was last read; reads if nothing was."""
    return _current or read()


def _let_infos_pass() -> None:
    if LOGGER.level == logging.NOTSET:
        LOGGER.setLevel(logging.INFO)
    if not LOGGER.hasHandlers():
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("hf_flashattn: %(message)s"))
        LOGGER.addHandler(handler)
