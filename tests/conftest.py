"""Settings of all tests."""

import os

import pytest
import torch
from hypothesis import settings

pytest.register_assert_rewrite("contracts", "decoding", "tiny")
torch.set_num_threads(1)
settings.register_profile("ci", max_examples=15, derandomize=True, deadline=None)
settings.register_profile("long", max_examples=1000, deadline=None)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))
