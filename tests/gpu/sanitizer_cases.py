"""A small set of launches that touches every kernel, for compute-sanitizer.

compute-sanitizer --tool memcheck python tests/gpu/sanitizer_cases.py
"""

from __future__ import annotations

import torch
from judge import Case, make_problem, run_kernel, variants

PACKED = ((100, 130), (0, 0), (1, 1), (65, 40))
RANGES = ((0, 200), (60, 100), (0, 0))


def cases() -> list[Case]:
    dense = variants(
        Case(batch=1, sq=200, sk=260, heads_q=2, heads_k=1),
        dim=(64, 128),
        causal=(False, True),
        dropout_p=(0.0, 0.1),
        dtype=(torch.float16, torch.bfloat16),
    )
    deterministic = variants(
        Case(batch=1, sq=300, sk=300, deterministic=True), dim=(64, 128), causal=(False, True)
    )
    packed = variants(Case(lengths=PACKED), dim=(64, 128), causal=(False, True))
    padded = variants(
        Case(batch=3, sq=200, sk=200, key_ranges=RANGES), dim=(64, 128), causal=(False, True)
    )
    return dense + deterministic + packed + padded


if __name__ == "__main__":
    for case in cases():
        run_kernel(make_problem(case))
    torch.cuda.synchronize()
    print(f"{len(cases())} cases launched")
