"""Forks answer as processes of their own do, and a request that broke off leaves nothing to the next."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from forked import Forker

FORKER = Forker()
pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no forks")
SCRIPT = """
import os, sys
import huggingface_hub.constants as constants
import transformers.utils.hub as hub
try:
    import meo_hf
except ImportError:
    meo_hf = None
told = [os.getcwd(), str(constants.HF_HUB_OFFLINE), hub.HF_MODULES_CACHE, str(meo_hf), os.environ["SAID"]]
open(sys.argv[1], "w").write("\\n".join(told))
if sys.argv[2] == "raise":
    raise ValueError("wrong")
sys.exit("one line why")
"""


@pytest.mark.parametrize(("how", "code", "last"), [("say", 1, "one line why"), ("raise", 1, "ValueError: wrong")])
def test_a_fork_is_a_process(how: str, code: int, last: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "script.py").write_text("import sys\nsys.modules['meo_hf'] = None\n" + SCRIPT)
    command = [sys.executable, "-I", str(tmp_path / "script.py")]
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1", "SAID": "yes"}
    found, told = FORKER.run([*command, str(tmp_path / "forked"), how], environment)
    real = subprocess.run([*command, str(tmp_path / "real"), how], env=environment, capture_output=True, text=True)
    assert found == real.returncode == code
    assert (tmp_path / "forked").read_text() == (tmp_path / "real").read_text()
    assert (told.strip().splitlines() or [""])[-1] == (real.stderr.strip().splitlines() or [""])[-1] == last


def test_a_request_that_broke_off_is_forgotten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "script.py").write_text("import sys; sys.exit(int(sys.argv[1]))")
    command = [sys.executable, "-I", str(tmp_path / "script.py")]
    assert FORKER.run([*command, "4"], dict(os.environ))[0] == 4

    def interrupted(*_: object) -> int:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("forked.int", interrupted, raising=False)
        with pytest.raises(KeyboardInterrupt):
            FORKER.run([*command, "5"], dict(os.environ))
    assert FORKER.run([*command, "6"], dict(os.environ))[0] == 6
