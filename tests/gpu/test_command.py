"""The command line on a Hopper GPU: doctor sees the kernels run, bench times them."""

import json

import pytest

from hf_flashattn import cli, ops


def test_doctor(capsys):
    assert ops.load_library().loaded  # which a doctor never builds
    status = cli.main(["doctor", "--json"])
    data = json.loads(capsys.readouterr().out)
    assert status == 0 and data["kernels_run"] is True, data
    for check in data["checks"]:
        if check["name"] in ("bert", "gpt2"):
            assert check["facts"]["calls"] == {"kernel": 2, "cpu": 0, "fallback": 0}


def test_bench(capsys, tmp_path):
    pytest.importorskip("matplotlib")
    png = tmp_path / "rates.png"
    options = ["--head-dims", "64", "--seqlens", "512", "--repeats", "2", "--png", str(png)]
    assert cli.main(["bench", "--json", *options]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert [(row["direction"], row["causal"]) for row in rows] == [
        ("forward", False),
        ("backward", False),
        ("forward", True),
        ("backward", True),
    ]
    for row in rows:
        assert {"ours", "fa2"} <= row["tflops"].keys() and row["tflops"]["ours"] > 1
    assert png.is_file()
