"""launch.cuh on the host: tensor maps are encoded once, and where packed tiles are in theirs."""

import subprocess

from build_helpers import compile_host_program

EXPECTED = """\
first 1
again 1
address 2
size 3
size 4
size 5
size 6
stride 7
stride 8
stride 9
box 10
box 11
dtype 12
swizzle 13
many 1000
refused 1
refused again 2
then 3
"""


def test_tensor_maps_are_encoded_once(tmp_path):
    program = compile_host_program("tensor_maps.cu", tmp_path)
    done = subprocess.run([program], capture_output=True, text=True, check=True)
    assert done.stdout == EXPECTED


def test_packed_tiles_hold_their_sequence_alone(tmp_path):
    program = compile_host_program("tile_places.cu", tmp_path)
    done = subprocess.run([program], capture_output=True, text=True, check=False)
    assert done.stdout == "right\n"
