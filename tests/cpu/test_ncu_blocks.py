"""tools/ncu_blocks.py: samples of ncu's source page, put together by stretches of code."""

import ncu_blocks
import pytest

HEADER = (
    '"Address","Source","# Samples","Instructions Executed","stall_barrier","stall_wait",'
    '"stall_barrier (Not Issued)"'
)
ROWS = (
    '"0x0","  LDC R1, c[0x0][0x28]","1","4","0","1","0"',
    '"0x10","@!P0 BRA 0x40","2","4","0","2","0"',
    '"0x20","HGMMA.64x128x16.F32.BF16 R24, gdesc[UR8], R24","6","1,000","5","1","5"',
    '"0x30","BAR.SYNC 0x1","91","1,000","90","1","88"',
    '"0x40","STG.E.128 [R2], R4","0","4","0","0","0"',
)


@pytest.fixture
def report(tmp_path):
    path = tmp_path / "report.csv"
    lines = ('"Kernel Name","forward_kernel"', HEADER, *ROWS)
    path.write_text("\n".join(lines) + "\n")
    return path


def test_stretches_are_split_where_instructions_run_more_or_less_often(report):
    found = list(ncu_blocks.stretches(ncu_blocks.read(report.open())))
    shapes = [(s.first, s.length, s.executed, s.samples, s.telling) for s in found]
    assert shapes == [
        (0, 2, 4, 3, []),
        (2, 2, 1000, 97, ["HGMMA", "BAR"]),
        (4, 1, 4, 0, ["STG"]),
    ]
    assert found[1].stalls == {"barrier": 95, "wait": 2}


def test_the_table_has_shares_and_what_is_waited_for(report, capsys):
    assert ncu_blocks.main([str(report)]) == 0
    table = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in table] == ["first", "0", "2", "5"]
    assert table[1].split() == ["0", "2", "4", "3.00%", "wait", "100%"]
    assert table[2].split() == ["2", "2", "1000", "97.00%", "barrier", "98%", "HGMMA", "BAR"]
    assert ncu_blocks.main([str(report), "--detail", "2", "4"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["2", "3"]


@pytest.mark.parametrize("text", ["", '"a","b"\n"1","2"\n', '"Address","Source"\n"0x0","EXIT"\n'])
def test_another_page_is_refused(tmp_path, capsys, text):
    path = tmp_path / "report.csv"
    path.write_text(text)
    assert ncu_blocks.main([str(path)]) == 2
    assert "Next step: ncu -i" in capsys.readouterr().err
    assert ncu_blocks.main([str(tmp_path / "none.csv")]) == 2
