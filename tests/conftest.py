"""Settings of all tests."""

import pytest
import torch

pytest.register_assert_rewrite("contracts", "tiny")
torch.set_num_threads(1)
