"""What every test starts from: the same random numbers, and few threads."""

import pytest
import torch

torch.set_num_threads(2)


@pytest.fixture(autouse=True)
def _same_random_numbers():
    torch.manual_seed(0)
