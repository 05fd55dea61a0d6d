"""launch.cuh on the host: a tensor map is encoded once, and never taken for another tensor's."""

import subprocess
from pathlib import Path

from build_helpers import REPO, load_build, require_nvcc

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
    build = load_build(REPO / "hf_flashattn")
    require_nvcc(build)
    program = tmp_path / "maps"
    source = Path(__file__).with_name("tensor_maps.cu")
    flags = build.unit_flags(build.source_root(), build.cuda_archs())
    subprocess.run(
        [build.find_nvcc(), *flags, source, "-o", program], check=True, capture_output=True
    )
    done = subprocess.run([program], capture_output=True, text=True, check=True)
    assert done.stdout == EXPECTED
