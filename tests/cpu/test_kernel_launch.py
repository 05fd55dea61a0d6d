"""launch.cuh on the host: a tensor map is encoded once, and never taken for another tensor's."""

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
