"""`meo-hf bench calibrate`: measured rates are kept where models look for them, and choices are checked."""

from __future__ import annotations

import json
from dataclasses import astuple
from pathlib import Path

import pytest
from checkpoints import run_cli
from meo_hf.modeling import plans_meo
from meo_hf.modeling.plans_meo import RATES, Work, costs_of, rates_of

from meo_hf.benchmark import calibrate

SMALL = Work(1, 1, 4, 2, 64, 64)


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(calibrate, "SIDES", {"cpu": (64, 64)})
    monkeypatch.setattr(calibrate, "CHECKED", ((1, 1, 4, 2, 64, 64), (3, 5, 4, 2, 64, 64)))
    monkeypatch.setenv("MEO_HF_RATES", str(tmp_path / "home" / "rates.json"))
    plans_meo._calibrated.cache_clear()
    costs_of.cache_clear()


def test_what_was_measured_is_used(tmp_path: Path) -> None:
    file = tmp_path / "calibrated.json"
    done = run_cli("bench", "calibrate", "--dtype", "bfloat16", "--json", str(file))
    assert done.code == 0, done.err
    result = json.loads(file.read_text())
    assert set(result["rates"]) == {"cpu/float32", "cpu/bfloat16"}
    assert all(value > 0 for rates in result["rates"].values() for value in rates.values())
    assert list(astuple(rates_of(SMALL))) == list(result["rates"]["cpu/float32"].values())
    assert rates_of(SMALL) != RATES["cpu", "float32"]
    (checks,) = result["checks"].values()
    assert len(checks) == 2
    for check in checks:
        assert set(check["measured"]) == {"accumulate", "product", "combine"}
        assert check["loss"] == pytest.approx(
            check["measured"][check["chosen"]] / min(check["measured"].values()), abs=1e-4
        )
        assert check["chosen"] == min(check["measured"], key=lambda plan: check["estimated"][plan])
    assert "delete it to go back" in done.out


def test_nothing_is_kept_unless_wanted(tmp_path: Path) -> None:
    done = run_cli("bench", "calibrate", "--dtype", "float32", "--no-keep")
    assert done.code == 0, done.err
    assert not (tmp_path / "home").exists()
    assert rates_of(SMALL) == RATES["cpu", "float32"]


def test_bad_options_are_refused_before_anything_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibrate, "measure_rates", None)
    assert "--dtype 'float8' is unknown" in run_cli("bench", "calibrate", "--dtype", "float32,float8").err
    assert "cannot be written" in run_cli("bench", "calibrate", "--json", "/no/such/folder/x.json").err
