"""The machine code: every Hopper kernel is there, on tensor cores (HGMMA), fed by TMA (UTMALDG).

Compiles the library if there is none for these sources (half a minute on two cores).
"""

from itertools import product

import pytest
import sass
from build_helpers import REPO, load_build, require_nvcc

HEAD_DIMS = (32, 64, 96, 128, 192, 256)
DIRECTIONS = ("forward", "backward")


@pytest.fixture(scope="module")
def kernels():
    """Readable name -> instructions."""
    build = load_build(REPO / "hf_flashattn")
    require_nvcc(build)
    return sass.by_short_name(sass.disassemble(build.find_or_build(verbose=False)))


def attention_kernels(kernels, direction):
    names = (f"sm90::{direction}_kernel<", f"sm90::{direction}_wide_kernel<")
    if direction == "backward":
        names += ("sm90::query_gradient_kernel<",)
    return {n: b for n, b in kernels.items() if n.startswith(names)}


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_every_policy_is_instantiated(kernels, direction):
    choices_of_a_dim = (("fp16", "bf16"), ("false", "true"), ("false", "true"))
    choices = product(HEAD_DIMS, *choices_of_a_dim)
    policy = f"sm90::{direction.capitalize()}Policy"
    expected = {
        f"sm90::{direction}{'_wide' if direction == 'backward' and dim > 128 else ''}_kernel"
        f"<{policy}<{dim}, {dtype}, {causal}, {dropout}>>"
        for dim, dtype, causal, dropout in choices
    }
    if direction == "backward":
        for dim, *rest in product(HEAD_DIMS, *choices_of_a_dim):
            policy = f"Policy<{dim}, {', '.join(rest)}>"
            if 32 < dim <= 128:  # short sequences are split
                expected.add(f"sm90::backward_kernel<sm90::KeysOnlyPolicy<sm90::Backward{policy}>>")
            if dim == 64:
                packed = f"sm90::PackedBackwardPolicy<sm90::Backward{policy}>"
                expected.add(f"sm90::backward_kernel<{packed}>")
            if dim > 32:
                query = f"sm90::QueryGradient{policy}"
                expected.add(f"sm90::query_gradient_kernel<{query}>")
                expected |= {
                    f"sm90::query_gradient_kernel<sm90::{of}<{query}>>"
                    for of in ("RaggedQueryPolicy", "HoledPolicy")
                }
    else:
        ragged = {f"sm90::RaggedPolicy<{n[21:-1]}>" for n in expected}
        holed = {f"sm90::HoledPolicy<{policy}>" for policy in ragged}
        expected |= {f"sm90::forward_kernel<{policy}>" for policy in ragged | holed}
        expected |= {
            f"sm90::forward_kernel<sm90::LowForwardPolicy<{dim}, {', '.join(rest)}>>"
            for dim, *rest in product((32, 64, 96), *choices_of_a_dim)
        }
    assert expected <= set(attention_kernels(kernels, direction))


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_matrix_products_are_wgmma_on_tiles_from_tma(kernels, direction):
    for name, body in attention_kernels(kernels, direction).items():
        counts = sass.opcode_counts(body)
        # S = QK^T and O = PV; backward adds S^T, dP, dV, dK, dQ. Four k-steps of 16 are the least.
        alone = direction == "forward" or "query_gradient" in name
        assert counts["HGMMA"] >= (8 if alone else 20), name
        assert counts["UTMALDG"] >= 3, name
        # mma.sync, of the former generation, makes the scores of a rare block once more.
        hot = sum(i.name == "HMMA" for lap in sass.laps(body) for i in lap)
        assert hot == 0 and counts["HMMA"] <= 2, name


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_lanes_of_a_warp_stay_together(kernels, direction):
    """Else ptxas uses no uniform registers (kernels/README.md, "Forward"), and BRA.DIV shows it."""
    for name, body in attention_kernels(kernels, direction).items():
        if "HoledPolicy<sm90::QueryGradientPolicy<256" in name:
            continue  # not yet: 419 instructions a block, where without holes it takes 367
        if direction == "forward" or "query_gradient" in name:
            assert not any(i.opcode.startswith("BRA.DIV") for i in body), name


# ---------------------------------------------------------------- the judge itself


def body_of(text):
    (body,) = sass.parse(f"Function : k\n{text}").values()
    return body


OUTER_AND_INNER = """
        /*0000*/                   STL [R1], R2 ;
        /*0010*/                   LDL R3, [R1] ;
        /*0020*/                   HGMMA.64x64x16.F32 R24, gdesc[UR8], R24 ;
        /*0030*/              @!P0 BRA {inner} ;
        /*0040*/                   LDL R4, [R1] ;
        /*0050*/                   BRA P1, 0x10 ;
        /*0060*/                   EXIT ;
        /*0070*/                   BRA 0x70;
"""


def test_hot_spills_are_those_of_the_innermost_loop_with_hgmma():
    # The outer loop is 0x10 to 0x50. With an inner one at 0x20, the loads around it are cold.
    assert sass.hot_spills(body_of(OUTER_AND_INNER.format(inner="0x20"))) == 0
    # Without it the outer loop is the hot one: both loads count, the store before it does not.
    assert sass.hot_spills(body_of(OUTER_AND_INNER.format(inner="0x60"))) == 2


def test_differences_are_kernels_that_are_not_the_same_in_every_instruction():
    first = {"k": body_of(OUTER_AND_INNER), "gone": []}
    other = OUTER_AND_INNER.replace("@!P0", " @P0")
    second = {"k": body_of(other), "new": []}
    what = dict(sass.differences(first, second))
    assert what.keys() == {"k", "gone", "new"}
    assert (what["gone"], what["new"]) == ("only in the first", "only in the second")
    assert sass.differences(first, {**first, "k": body_of(OUTER_AND_INNER)}) == []


def test_spills_on_a_rare_branch_are_cold():
    text = """
        /*0000*/                   BSSY B0, 0x40 ;
        /*0010*/                   HGMMA.64x64x16.F32 R24, gdesc[UR8], R24 ;
        /*0020*/               @P2 BRA 0x70 ;
        /*0030*/                   {short}
        /*0040*/              @!P0 BRA 0x0 ;
        /*0050*/                   STL [R1], R2 ;
        /*0060*/                   EXIT ;
        /*0070*/                   LDL R3, [R1] ;
        /*0080*/                   BSYNC B0 ;
    """
    assert sass.hot_spills(body_of(text.format(short="BSYNC B0 ;"))) == 0
    # Where the way through the branch is the only one around, it is hot.
    assert sass.hot_spills(body_of(text.format(short="EXIT ;"))) == 1


def test_counts_ignore_modifiers_and_predicates():
    counts = sass.opcode_counts(body_of("        /*0000*/    @!UP0 UTMALDG.4D [UR8], [UR4] ;"))
    assert counts == {"UTMALDG": 1}


def test_a_lap_leaves_out_what_a_branch_skips():
    text = """
        /*0000*/                   MOV R1, R2 ;
        /*0010*/                   HGMMA.64x64x16.F32 R24, gdesc[UR8], R24 ;
        /*0020*/               @P2 BRA 0x40 ;
        /*0030*/                   FMUL R3, R3, R4 ;
        /*0040*/                   IMAD.WIDE.U32 R6, R0, -0x2daee0ad, RZ ;
        /*0050*/              @!P0 BRA 0x10 ;
        /*0060*/                   EXIT ;
    """
    (lap,) = sass.laps(body_of(text))
    assert [i.opcode for i in lap] == ["HGMMA.64x64x16.F32", "BRA", "IMAD.WIDE.U32", "BRA"]
    assert [sass.pipe(i) for i in lap] == ["tensor", "other", "IMAD.WIDE", "other"]


def test_absent_tools_are_named(monkeypatch, tmp_path):
    monkeypatch.setattr(sass, "find_tool", lambda name: None)
    with pytest.raises(
        RuntimeError, match="pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm"
    ):
        sass.disassemble(tmp_path / "library.so")
