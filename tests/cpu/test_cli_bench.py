"""hf-flashattn bench: refuses clearly without a GPU; the table, the JSON and the plot."""

from __future__ import annotations

import json
import sys

import pytest
import torch

from hf_flashattn import bench, cli

DONE = "hf_flashattn_bench.png"


@pytest.fixture
def no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture
def measured(monkeypatch, tmp_path):
    """As on a GPU: rates of 2, 4 and 1 for ours, cuDNN and FA2 times the length."""
    asked = {}

    def run_grid(head_dims, masks, dropouts, seqlens, **options):
        asked.update(options, head_dims=head_dims, seqlens=seqlens)
        return [
            {
                "head_dim": dim,
                "causal": causal,
                "dropout": p,
                "direction": direction,
                "seqlen": seqlen,
                "ms": {"ours": 1.0, "cudnn": 0.5, "fa2": 2.0},
                "tflops": {"ours": 2.0 * seqlen, "cudnn": 4.0 * seqlen, "fa2": 1.0 * seqlen},
            }
            for dim in head_dims
            for causal in masks
            for p in dropouts
            for direction in options["directions"]
            for seqlen in seqlens
        ]

    def facts(rows, **known):
        return {"device": "GPU", "torch": "2.11", "rows": rows, **known}

    monkeypatch.setattr(bench, "refuse_without_kernels", lambda *_: None)
    monkeypatch.setattr(bench, "run_grid", run_grid)
    monkeypatch.setattr(bench, "facts", facts)
    monkeypatch.chdir(tmp_path)
    return asked


def test_without_a_gpu(no_gpu, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    for options in ([], ["--json"]):
        assert cli.main(["bench", *options]) == 1
        printed = capsys.readouterr()
        assert not printed.out
        assert "expected a Hopper GPU (H100, H200), found no GPU" in printed.err
        assert "Next step" in printed.err
    assert not list(tmp_path.iterdir())


def test_on_another_gpu(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    assert cli.main(["bench"]) == 1
    assert "compute capability 8.0 is not there yet" in capsys.readouterr().err


def test_a_head_dim_that_no_kernel_takes(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    assert cli.main(["bench", "--head-dims", "64", "300"]) == 1
    assert "head_dim 300 on CUDA is not there yet" in capsys.readouterr().err


def test_table_and_plot(measured, capsys, tmp_path):
    pytest.importorskip("matplotlib")
    options = ["--head-dims", "64", "--seqlens", "512", "1024", "--repeats", "3"]
    assert cli.main(["bench", *options]) == 0
    printed = capsys.readouterr()
    lines = printed.out.splitlines()
    assert lines[0] == "GPU, torch 2.11, bf16"
    shown = [" ".join(line.split()) for line in lines]
    assert shown[1].endswith("512 1024 / cudnn / best peer")
    assert shown[2] == "d64 full p0 forward ours 1024 2048 0.500 0.500"
    assert shown[3] == "d64 full p0 forward cudnn 2048 4096 1.000 1.000"
    assert len(lines) == 2 + 2 * 2 * 3  # masks, directions, providers
    assert measured["repeats"] == 3 and measured["seqlens"] == [512, 1024]
    assert (tmp_path / DONE).read_bytes().startswith(b"\x89PNG")
    assert DONE in printed.err


def test_json_alone_goes_to_stdout(measured, capsys, tmp_path):
    pytest.importorskip("matplotlib")
    png = tmp_path / "rates.png"
    assert cli.main(["bench", "--json", "--png", str(png), "--dtype", "fp16"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["command"] == f"hf-flashattn bench --json --png {png} --dtype fp16"
    assert data["dtype"] == "fp16" and len(data["rows"]) == 2 * 2 * 2 * 3
    assert png.is_file()


def test_without_matplotlib_the_table_is_there_and_the_status_is_1(measured, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert cli.main(["bench"]) == 1
    printed = capsys.readouterr()
    assert "d64 full p0 forward" in printed.out
    assert "no plot" in printed.err and "pip install matplotlib" in printed.err


def test_a_folder_that_is_not_there(measured, capsys):
    pytest.importorskip("matplotlib")
    assert cli.main(["bench", "--png", "nowhere/rates.png"]) == 1
    assert "no plot" in capsys.readouterr().err


def test_a_peer_that_cannot_run_is_left_open():
    shape = {"head_dim": 256, "causal": False, "dropout": 0.0, "direction": "forward"}
    rows = [{**shape, "seqlen": 512, "ms": {}, "tflops": {"ours": 300.0, "fa2": 200.0}}]
    assert bench.table(rows).splitlines()[1].split()[-3:] == ["300", "nan", "1.500"]


def test_flops():
    full = bench.flops(1024, 16, 128, causal=False, backward=False)
    assert full == 4 * 16 * 16 * 1024**2 * 128  # 16 rows of 1024 tokens
    assert bench.flops(1024, 16, 128, causal=True, backward=True) == full * 1.25
