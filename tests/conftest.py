"""Settings of all tests."""

import os

import pytest
import torch
from forked import Forker
from hypothesis import settings

from meo_hf.conversion import verification

pytest.register_assert_rewrite("contracts", "decoding", "tiny")
torch.set_num_threads(1)
settings.register_profile("ci", max_examples=15, derandomize=True, deadline=None)
settings.register_profile("long", max_examples=1000, deadline=None)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))
FORKER = Forker()


@pytest.fixture(autouse=True)
def fork_checks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run the checks of conversions in forks, where tests do not ask for processes of their own."""
    if hasattr(os, "fork") and request.node.get_closest_marker("own_process") is None:
        monkeypatch.setattr(verification, "run_alone", FORKER.run)
