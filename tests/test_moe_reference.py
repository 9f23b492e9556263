"""A repository of config and code whose weights stay in another one, over real HTTP."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from client import Client
from hub_server import HubServer
from moe_tiny import tiny_moe
from test_push import UPLOAD

pytestmark = pytest.mark.xdist_group("push")
LOAD = """
import torch
from transformers import AutoModelForCausalLM
model, info = AutoModelForCausalLM.from_pretrained(
    name, trust_remote_code=True, output_loading_info=True, dtype=torch.bfloat16, local_files_only=local == "True"
)
ids = torch.arange(5)[None] + 5
result = {
    "class": f"{type(model).__module__}.{type(model).__name__}",
    "missing": sorted(info["missing_keys"]),
    "dtype": str(model.dtype),
    "name": model.name_or_path,
    "ids": model.generate(ids, max_new_tokens=3, do_sample=False)[0].tolist(),
}
"""


@pytest.fixture(scope="module")
def hub() -> Iterator[HubServer]:
    with HubServer() as server:
        yield server


@pytest.fixture(scope="module")
def client(hub: HubServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    client = Client(hub.environment(home=tmp_path_factory.mktemp("home")))
    yield client
    client.close()


@pytest.fixture(scope="module")
def out(hub: HubServer, client: Client, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Publish a mixture, refer to it, push the reference, then change the source's main branch."""
    folder = tmp_path_factory.mktemp("reference")
    tiny_moe("mixtral").save_pretrained(folder / "src")
    client.python(UPLOAD, repo="tester/moe", folder=folder / "src", private=False, tag="")
    before = len(hub.log)
    options = ("--reference", "--verify", "none", "--push-to-hub", "tester/light")
    done = client.cli("convert", "tester/moe", folder / "out", *options)
    assert done.code == 0, done.err
    weights = [r for r in hub.log[before:] if r.path.endswith(".safetensors") and r.method == "GET"]
    assert {request.status for request in weights} <= {206}, "weights were fetched, not only their headers"
    tiny_moe("mixtral", seed=5).save_pretrained(folder / "other")
    client.python(UPLOAD, repo="tester/moe", folder=folder / "other", private=False, tag="")
    return folder / "out"


def test_stores_repository_and_commit(hub: HubServer, out: Path) -> None:
    weights = json.loads((out / "config.json").read_text())["meo"]["weights"]
    assert weights == {"repo": "tester/moe", "commit": hub.history("tester/moe")[1].oid}
    assert not [name for name in hub.files("tester/light") if name.endswith(".safetensors")]


@pytest.fixture(scope="module")
def loaded(client: Client, out: Path) -> dict[str, object]:
    return client.python(LOAD, name="tester/light", local=False)


def test_loads_from_the_pinned_commit(loaded: dict[str, object], client: Client, out: Path) -> None:
    assert loaded["missing"] == []
    assert loaded["dtype"] == "torch.bfloat16"
    assert loaded["name"] == "tester/light"
    assert client.python(LOAD, name=out, local=False)["ids"] == loaded["ids"]


def test_works_offline_from_the_cache(loaded: dict[str, object], client: Client) -> None:
    assert client.python(LOAD, name="tester/light", local=True)["ids"] == loaded["ids"]


def test_inspect_says_where_the_weights_are(client: Client, out: Path) -> None:
    done = client.cli("inspect", "tester/light")
    assert done.code == 0, done.err
    assert "tester/moe" in done.out
