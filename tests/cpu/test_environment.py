"""HF_FLASHATTN_DISABLE, _STRICT, _FALLBACK and _LOG: their effects; bad values are errors."""

from __future__ import annotations

import logging

import pytest
import torch
from model_helpers import calls, gpt2, output, padding, tokens

import hf_flashattn
from hf_flashattn import FallbackError, PatchError, attention, environment, report

INPUTS = {"input_ids": tokens(), "attention_mask": padding("left")}
DENSE = {"input_ids": tokens(), "attention_mask": torch.ones(3, 1, 13, 13)}  # no kernel takes it


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    """Every test is a process of its own: no variable set, none read, no reason logged."""
    for name in environment.CHOICES:
        monkeypatch.delenv(environment.PREFIX + name, raising=False)
    monkeypatch.setattr(environment, "_current", None)
    monkeypatch.setattr(report, "_LOGGED", set())
    level, handlers = environment.LOGGER.level, list(environment.LOGGER.handlers)
    yield
    environment.LOGGER.setLevel(level)
    environment.LOGGER.handlers[:] = handlers


@pytest.fixture
def variables(monkeypatch):
    def set_variables(**values: str) -> None:
        for name, value in values.items():
            monkeypatch.setenv(environment.PREFIX + name, value)

    return set_variables


@pytest.fixture
def fallbacks(monkeypatch):
    """The choices that fall_back was called with."""
    chosen, original = [], attention.fall_back

    def fall_back(call, choice):
        chosen.append(choice)
        return original(call, choice)

    monkeypatch.setattr(attention, "fall_back", fall_back)
    return chosen


# ---- values --------------------------------------------------------------------------------------


def test_unset_and_empty_are_the_defaults():
    defaults = environment.Environment()
    empty = {environment.PREFIX + name: "" for name in environment.CHOICES}
    assert environment.parse({}) == environment.parse(empty) == defaults
    off = {"HF_FLASHATTN_DISABLE": "0", "HF_FLASHATTN_STRICT": "0", "HF_FLASHATTN_LOG": "off"}
    assert environment.parse(off) == defaults
    assert (defaults.disable, defaults.strict) == (False, False)
    assert (defaults.fallback, defaults.log) == ("sdpa", "off")


@pytest.mark.parametrize(
    "name, value, good",
    [
        ("DISABLE", "yes", "expected 0 or 1, got 'yes'"),
        ("STRICT", "true", "expected 0 or 1, got 'true'"),
        ("FALLBACK", "flex", "expected sdpa or eager, got 'flex'"),
        ("FALLBACK", "0", "expected sdpa or eager, got '0'"),
        ("LOG", "debug", "expected off or reasons or calls, got 'debug'"),
    ],
)
def test_a_bad_value_is_an_error_that_lists_the_good_ones(name, value, good, variables):
    variables(**{name: value})
    with pytest.raises(ValueError, match=f"HF_FLASHATTN_{name}: {good}"):
        hf_flashattn.patch_model(gpt2())
    model = gpt2()
    model.set_attn_implementation("hf_flashattn")
    with pytest.raises(ValueError, match=f"HF_FLASHATTN_{name}: {good}"):
        output(model, INPUTS)


# ---- DISABLE -------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"strict": True}, {"include": "*"}], ids=str)
def test_disable_sends_a_patched_model_to_the_fallback(options, variables):
    model = gpt2()
    expected = output(model, INPUTS)
    variables(DISABLE="1")
    with hf_flashattn.patched(model, **options) as result:
        assert all(row.runs == "fallback" and row.expected for row in result.rows)
        assert (output(model, INPUTS) - expected)[padding("left").bool()].abs().max() < 1e-5
        assert [(row.runs, row.why) for row in result.rows] == [
            ("fallback", "HF_FLASHATTN_DISABLE=1")
        ] * 2
    assert calls(result, "cpu") == 0


@pytest.mark.parametrize("name", ["hf_flashattn", "hf_fused_attn"])
def test_disable_holds_for_the_registered_names(name, variables):
    model = gpt2()
    expected = output(model, INPUTS)
    variables(DISABLE="1")
    model.set_attn_implementation(name)
    result = hf_flashattn.attention_report(model)
    assert {row.why for row in result.rows} == {"HF_FLASHATTN_DISABLE=1"}  # the forecast
    assert (output(model, INPUTS) - expected)[padding("left").bool()].abs().max() < 1e-5
    assert {(row.runs, row.why) for row in result.rows} == {("fallback", "HF_FLASHATTN_DISABLE=1")}


def test_a_changed_variable_patches_anew(variables):
    model = gpt2()
    hf_flashattn.patch_model(model)
    variables(DISABLE="1")
    assert {row.runs for row in hf_flashattn.patch_model(model).rows} == {"fallback"}
    variables(DISABLE="0")
    with hf_flashattn.patched(model) as inside:
        assert {row.runs for row in inside.rows} == {"cpu implementation"}
    # What was there before the block comes back, whatever the environment says now.
    assert {row.runs for row in hf_flashattn.attention_report(model).rows} == {"fallback"}


def test_compiled_without_a_break_under_a_registered_name(variables):
    """The environment is first needed inside the trace."""
    variables(DISABLE="1")
    model = gpt2()
    expected = output(model, {"input_ids": tokens()})
    model.set_attn_implementation("hf_flashattn")
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    assert (output(compiled, {"input_ids": tokens()}) - expected).abs().max() < 1e-5
    result = hf_flashattn.attention_report(model)
    assert {(row.runs, row.why) for row in result.rows} == {("fallback", "HF_FLASHATTN_DISABLE=1")}
    assert all(row.calls.traced for row in result.rows)


# ---- STRICT --------------------------------------------------------------------------------------


def test_strict_unless_the_call_says_otherwise(variables):
    variables(STRICT="1")
    model = gpt2()
    with hf_flashattn.patched(model):
        output(model, INPUTS)
        with pytest.raises(FallbackError, match=r"HF_FLASHATTN_STRICT=1, and transformer\.h\.0"):
            model(**DENSE)
    with hf_flashattn.patched(model, strict=False) as result:
        model(**DENSE)
        assert calls(result, "fallback") == 2
    with pytest.raises(PatchError):
        hf_flashattn.patch_model(torch.nn.Linear(2, 2))


def test_strict_holds_for_the_registered_names(variables):
    variables(STRICT="1")
    model = gpt2()
    model.set_attn_implementation("hf_flashattn")
    output(model, INPUTS)
    with pytest.raises(FallbackError, match="HF_FLASHATTN_STRICT=1, and GPT2Attention"):
        model(**DENSE)


# ---- FALLBACK ------------------------------------------------------------------------------------


def test_fallback_is_the_default_of_patch_model(variables, fallbacks):
    model = gpt2()
    for wish, options, chosen in (
        ("eager", {}, "eager"),
        ("sdpa", {}, "sdpa"),
        ("eager", {"fallback": "sdpa"}, "sdpa"),
    ):
        variables(FALLBACK=wish)
        with hf_flashattn.patched(model, **options):
            model(**DENSE)
        assert fallbacks == [chosen] * 2
        fallbacks.clear()


def test_fallback_of_the_registered_names(variables, fallbacks):
    variables(FALLBACK="eager")
    model = gpt2()
    model.set_attn_implementation("hf_fused_attn")
    model(**DENSE)
    assert fallbacks == ["eager"] * 2


# ---- LOG -----------------------------------------------------------------------------------------


def test_off_logs_nothing(caplog):
    caplog.set_level(logging.DEBUG, "hf_flashattn")
    model = gpt2()
    with hf_flashattn.patched(model):
        output(model, INPUTS)
        model(**DENSE)
    assert not caplog.records


def test_reasons_are_logged_once(caplog, variables):
    variables(LOG="reasons")
    caplog.set_level(logging.DEBUG, "hf_flashattn")
    model = gpt2()
    with hf_flashattn.patched(model):
        for _ in range(2):
            output(model, INPUTS)
            model(**DENSE)
    (record,) = caplog.records
    assert (record.name, record.levelname) == ("hf_flashattn", "WARNING")
    assert record.getMessage().startswith("transformer.h.0.attn: fallback: additive 4-D mask")
    with hf_flashattn.patched(model, exclude="*"):
        output(model, INPUTS)
    assert [r.getMessage() for r in caplog.records[1:]] == [
        "transformer.h.0.attn: fallback: excluded by '*'"
    ]


def test_calls_are_logged_once_a_module_and_decision(caplog, variables):
    variables(LOG="calls")
    model = gpt2()
    with hf_flashattn.patched(model):
        for _ in range(2):
            output(model, INPUTS)
            model(**DENSE)
    lines = [(r.levelname, r.getMessage().split(":")[0]) for r in caplog.records]
    names = ["transformer.h.0.attn", "transformer.h.1.attn"]
    assert lines == [
        *(("INFO", name) for name in names),
        ("WARNING", names[0]),
        ("INFO", names[1]),
    ]
    assert caplog.records[0].getMessage() == "transformer.h.0.attn: SDPA (CPU)"


def test_calls_reach_stderr_in_a_program_without_logging(variables, capsys, monkeypatch):
    monkeypatch.setattr(environment.LOGGER, "propagate", False)  # pytest's handlers are above
    monkeypatch.setattr(environment.LOGGER, "handlers", [])
    variables(LOG="calls")
    model = gpt2()
    for _ in range(2):
        with hf_flashattn.patched(model):
            output(model, INPUTS)
    assert len(environment.LOGGER.handlers) == 1
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "hf_flashattn: transformer.h.0.attn: SDPA (CPU)" and len(lines) == 4
