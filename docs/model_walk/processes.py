"""Each model in a process of its own, so that none can hang or end the walk."""

from __future__ import annotations

import contextlib
import io
import multiprocessing
import resource
import time
import warnings
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection, wait

import transformers

from .examine import Result, examine


def walk(wanted: Sequence[tuple[str, str]], jobs: int, timeout: float) -> Iterator[Result]:
    """Each in a process of its own, `jobs` at a time."""
    context = multiprocessing.get_context("fork")  # the imports take longer than most models
    waiting, running = list(reversed(wanted)), {}
    while waiting or running:
        while waiting and len(running) < jobs:
            key = waiting.pop()
            receiver, sender = context.Pipe(duplex=False)
            process = context.Process(target=_work, args=(*key, sender), daemon=True)
            process.start()
            sender.close()
            running[receiver] = (key, process, time.monotonic() + timeout)
        ready = wait(list(running), timeout=1.0)
        for receiver, (key, process, deadline) in list(running.items()):
            if receiver in ready:
                try:
                    yield receiver.recv()
                except EOFError:
                    process.join()
                    yield Result(*key, "not built", why=f"its process ended: {process.exitcode}")
            elif time.monotonic() > deadline:
                yield Result(*key, "not built", why=f"took longer than {timeout:g} s")
            else:
                continue
            process.kill()
            process.join()
            receiver.close()
            del running[receiver]


def _work(model_type: str, task: str, sender: Connection) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (24 << 30, 24 << 30))
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        result = examine(model_type, task)
    sender.send(result)
