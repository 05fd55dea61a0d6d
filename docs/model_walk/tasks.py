"""Model types by task: what Transformers' own mappings list."""

from __future__ import annotations

from transformers.models.auto import modeling_auto

TASKS = {
    "causal": modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    "masked": modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    "seq2seq": modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
}
TEXT = set().union(*TASKS.values())
TASKS["base"] = {
    model: name if isinstance(name, str) else name[0]
    for model, name in modeling_auto.MODEL_MAPPING_NAMES.items()
    if model not in TEXT
}


def all_models() -> list[tuple[str, str]]:
    return sorted((name, task) for task, names in TASKS.items() for name in names)
