"""The one exception of the examples: something the user can put right."""

from __future__ import annotations


class UsageError(Exception):
    """Says what was expected, what was there instead, and what to do next.

    The command line prints it without a traceback and exits with code 2.
    """

    def __init__(self, expected: str, got: str, next_step: str) -> None:
        self.expected, self.got, self.next_step = expected, got, next_step
        super().__init__(f"expected {expected}\n  got:       {got}\n  next step: {next_step}")
