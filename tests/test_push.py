"""Convert from the Hub, push to it and load from it: real HTTP, the unpatched client, processes of their own."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from checkpoints import expected_file, listing, saved, sha256
from client import Client
from fresh import Fresh, FreshError, Values
from hub_server import HubServer
from huggingface_hub import ModelCard
from loras import feed_forward_maps, save_lora
from meo_hf.modeling.remote_meo import code_files
from safetensors.torch import load_file
from test_families_roundtrip import relative_rms, run_batch
from tiny import main_class, tiny_dense

pytestmark = pytest.mark.xdist_group("push")  # one worker: the costly fixtures are made once
CARD = "---\nlicense: mit\nlanguage: [en, de]\npipeline_tag: feature-extraction\n---\n# A source\n"
UPLOAD = """
from huggingface_hub import HfApi
api = HfApi()
api.create_repo(repo, private=private == "True", exist_ok=True)
result = api.upload_folder(repo_id=repo, folder_path=folder).oid
if tag:
    api.create_tag(repo, tag=tag)
"""
PUSH_MODEL = """
from transformers import AutoModelForMaskedLM
import meo_hf
model = AutoModelForMaskedLM.from_pretrained(folder)
model.push_to_hub(repo, private=True)
"""
TRAIN = """
import torch
from training_rows import labelled_rows, word_tokenizer
from transformers import AutoModelForSequenceClassification, DataCollatorWithPadding, Trainer, TrainingArguments
import meo_hf
from meo_hf.training import watch
model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=3)
arguments = TrainingArguments(
    output, max_steps=2, save_steps=1, learning_rate=1e-2, use_cpu=True, report_to=[],
    push_to_hub=True, hub_model_id=repo,
)
tokenizer = word_tokenizer()
collator = DataCollatorWithPadding(tokenizer)
trainer = Trainer(model, arguments, train_dataset=labelled_rows(16), data_collator=collator, processing_class=tokenizer)
watch(trainer)
trainer.train()
trainer.push_to_hub()
ids = torch.tensor([[5, 6, 7], [8, 9, 10]])
result = model.eval()(ids).logits.tolist()
"""
ADAPT = """
import torch
from peft import PeftModel, get_peft_model
from transformers import AutoModelForMaskedLM
from meo_hf import MeoLoraConfig
ids, result = torch.tensor([[5, 6, 7], [8, 9, 10]]), []
for name, options in (("plain", {"lora_dropout": 0.1, "trainable": "both"}), ("own", {"scope": "shared"})):
    torch.manual_seed(1)
    model = AutoModelForMaskedLM.from_pretrained(folder, trust_remote_code=True)
    peft = get_peft_model(model, MeoLoraConfig(r=2, init_lora_weights=False, **options)).eval()
    result.append(peft(ids).logits.tolist())
    peft.push_to_hub(f"{repo}-{name}")
    model = AutoModelForMaskedLM.from_pretrained(folder, trust_remote_code=True)
    again = PeftModel.from_pretrained(model, f"{repo}-{name}").eval()
    assert again(ids).logits.tolist() == result[-1]
"""
QUICK = ("--num-experts", "3", "--verify", "none")


@pytest.fixture(scope="module")
def hub() -> Iterator[HubServer]:
    with HubServer() as server:
        yield server


@pytest.fixture(scope="module")
def client(hub: HubServer) -> Iterator[Client]:
    client = Client(hub.environment())
    yield client
    client.close()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("push")


@pytest.fixture(scope="module")
def source(client: Client, folder: Path) -> Path:
    """Publish a model, tag it, and change it on the main branch."""
    place = saved("bert", folder / "dense")
    (place / "README.md").write_text(CARD)
    client.python(UPLOAD, repo="tester/src", folder=place, private=False, tag="v1")
    changed = saved("bert", folder / "changed", hidden_act="relu")
    (changed / "README.md").write_text(CARD)
    client.python(UPLOAD, repo="tester/src", folder=changed, private=False, tag="")
    return place


@pytest.fixture(scope="module")
def pushed(hub: HubServer, client: Client, source: Path, folder: Path) -> Path:
    """Convert a tagged revision by its repository's name, and push to a branch of a new private one."""
    options = ("--push-to-hub", "tester/x", "--private", "--push-revision", "dev", "--commit-message", "first light")
    done = client.cli("convert", "tester/src", folder / "out", "--source-revision", "v1", *QUICK, *options)
    assert done.code == 0, done.err
    return folder / "out"


def test_source_is_fetched_at_its_revision(hub: HubServer, pushed: Path) -> None:
    report = json.loads((pushed / "meo_report.json").read_text())
    assert report["source"]["id"] == "tester/src"
    assert report["source"]["commit"] == hub.repositories["tester/src"].tags["v1"]
    assert report["source"]["commit"] != hub.history("tester/src")[0].oid
    config = json.loads((pushed / "config.json").read_text())
    assert config["meo"]["source"] == {"id": "tester/src", "commit": report["source"]["commit"]}
    assert config["hidden_act"] == "gelu"


def test_push_is_one_commit_on_the_branch(hub: HubServer, pushed: Path) -> None:
    assert hub.repositories["tester/x"].private
    assert hub.files("tester/x", "main") == {}
    assert [commit.title for commit in hub.history("tester/x", "dev")] == ["first light", "initial commit"]
    assert hub.files("tester/x", "dev").keys() == listing(pushed).keys()
    for name in listing(pushed).keys() - {"meo_report.json"}:
        assert hub.read("tester/x", name, "dev") == (pushed / name).read_bytes()


def test_pushed_report_names_no_folder_of_this_machine(hub: HubServer, pushed: Path, folder: Path) -> None:
    stored, here = hub.read("tester/x", "meo_report.json", "dev"), (pushed / "meo_report.json").read_bytes()
    assert str(folder).encode() in here
    report = json.loads(stored)
    assert report["files"] == json.loads(here)["files"]
    assert report["files"]["model.safetensors"]["sha256"] == sha256(pushed / "model.safetensors")
    for name in hub.files("tester/x", "dev"):
        assert str(folder).encode() not in hub.read("tester/x", name, "dev"), name


def test_card(pushed: Path) -> None:
    card = ModelCard.load(pushed / "README.md")
    data = card.data.to_dict()
    assert data["license"] == "mit"
    assert data["language"] == ["en", "de"]
    assert data["pipeline_tag"] == "feature-extraction"
    assert data["library_name"] == "transformers"
    assert data["base_model"] in ("tester/src", ["tester/src"])
    assert data["base_model_relation"] == "finetune"
    assert {"meo", "custom_code"} <= set(data["tags"])
    report = json.loads((pushed / "meo_report.json").read_text())
    for text in (
        report["source"]["commit"],
        "`sequence`",
        "3, of which 2 are merged",
        "Converted layers | 0, 1",
        f"{report['parameters_after']:,}",
        "x the source's, linear maps",
        'revision="COMMIT", trust_remote_code=True',
        "runs the Python files of this repository",
        "Not verified",
        "not evaluated",
        "tester/src: mit",
        "2310.09832",
    ):
        assert text in card.content, text


def test_inspect_fetches_headers_only(hub: HubServer, client: Client, source: Path) -> None:
    before = len(hub.log)
    done = client.cli("inspect", "tester/src", "--source-revision", "v1", HF_HUB_CACHE=None)
    assert done.code == 0, done.err
    assert "bert" in done.out
    assert hub.repositories["tester/src"].tags["v1"] in done.out
    weights = [r for r in hub.log[before:] if r.path.endswith(".safetensors") and r.method == "GET"]
    assert weights
    assert all(request.status == 206 for request in weights), "a whole weight file was asked for"


def read_private(repo: str, auto: str, batch: str, revision: str) -> dict[str, Any]:
    """Load a private repository by its name: without a token it is not there, with one it answers."""
    load = getattr(transformers, auto).from_pretrained
    try:
        load(repo, revision=revision, trust_remote_code=True, token=False)
    except OSError as error:
        refused = str(error)
    model, info = load(repo, revision=revision, trust_remote_code=True, output_loading_info=True)
    actual, expected = run_batch(model, batch)
    return {
        "refused": refused,
        "keys": sorted(info["missing_keys"] | info["unexpected_keys"]),
        "error": relative_rms(actual, expected),
        "class": f"{type(model).__module__}.{type(model).__name__}",
        "config": type(
            transformers.AutoConfig.from_pretrained(repo, revision=revision, trust_remote_code=True)
        ).__name__,
    }


def push_again(folder: str, repo: str) -> str:
    """Load a conversion by its own code, and push it with Transformers' method."""
    model = transformers.AutoModelForMaskedLM.from_pretrained(folder, trust_remote_code=True)
    model.push_to_hub(repo, private=True)
    return type(model).__module__


def read_main(repo: str, batch: str) -> float:
    """Load what `push_to_hub` of a model wrote."""
    model = transformers.AutoModelForMaskedLM.from_pretrained(repo, trust_remote_code=True)
    actual, expected = run_batch(model, batch)
    return relative_rms(actual, expected)


def classify(repo: str) -> list[list[float]]:
    """Load a classifier from the Hub by its own code, and its tokenizer."""
    transformers.AutoTokenizer.from_pretrained(repo, trust_remote_code=True)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(repo, trust_remote_code=True).eval()
    return model(torch.tensor([[5, 6, 7], [8, 9, 10]])).logits.tolist()


def with_adapter(folder: str, repo: str) -> list[list[list[float]]]:
    """Load an adapter from the Hub onto a conversion by its own code."""
    from peft import PeftModel

    model = transformers.AutoModelForMaskedLM.from_pretrained(folder, trust_remote_code=True)
    adapted = PeftModel.from_pretrained(model, repo).eval()
    return adapted(torch.tensor([[5, 6, 7], [8, 9, 10]])).logits.tolist()


@pytest.fixture(scope="module")
def adapters(client: Client, pushed: Path) -> Any:
    """Push two adapters: one that plain LoRA can say, and one of our own type."""
    return client.python(ADAPT, folder=pushed, repo="tester/adapter")


@pytest.fixture(scope="module")
def trained(client: Client, pushed: Path, folder: Path) -> list[list[float]]:
    """Let the Trainer push a classifier; returns what it says."""
    return client.python(TRAIN, folder=pushed, output=folder / "trained", repo="tester/trained")


@pytest.fixture(scope="module")
def outcomes(
    hub: HubServer, client: Client, pushed: Path, source: Path, folder: Path, trained: Any, adapters: Any
) -> Values:
    """Load all that was pushed in one clean process; the model that it pushes itself is loaded from the Hub too."""
    client.python(PUSH_MODEL, folder=pushed, repo="tester/installed")
    batch = expected_file(folder / "batch.safetensors", main_class("bert").from_pretrained(source), "bert")
    fresh = Fresh(relative_rms, run_batch)
    fresh.add("private", read_private, repo="tester/x", auto="AutoModelForMaskedLM", batch=batch, revision="dev")
    fresh.add("push", push_again, folder=pushed, repo="tester/remote")
    fresh.add("installed", read_main, repo="tester/installed", batch=batch)
    fresh.add("remote", read_main, repo="tester/remote", batch=batch)
    fresh.add("trained", classify, repo="tester/trained")
    for name in ("plain", "own"):
        fresh.add(f"{name} adapter", with_adapter, folder=pushed, repo=f"tester/adapter-{name}")
    fresh.add("empty main", read_main, repo="tester/x", batch=batch)
    return fresh.run(folder, hub.environment())


def test_clean_process_loads_a_private_repository_by_name(outcomes: Values) -> None:
    found = outcomes["private"]
    assert "tester/x" in found["refused"]
    assert found["keys"] == []
    assert found["error"] <= 1e-5
    assert found["class"].startswith("transformers_modules.")
    assert found["config"] == "MeoBertConfig"
    with pytest.raises(FreshError, match=r"config\.json|does not appear to have|not a valid model identifier"):
        outcomes["empty main"]


@pytest.mark.parametrize("who", ["installed", "remote"])
def test_push_to_hub_of_a_model_carries_the_code(outcomes: Values, hub: HubServer, pushed: Path, who: str) -> None:
    assert outcomes["push"].startswith("transformers_modules.")
    assert outcomes[who] <= 1e-5
    files = hub.files(f"tester/{who}")
    assert {f.name for f in code_files()} <= files.keys()
    stored = json.loads(hub.read(f"tester/{who}", "config.json"))
    assert stored["auto_map"] == json.loads((pushed / "config.json").read_text())["auto_map"]
    weights = load_file(pushed / "model.safetensors")
    hub_weights = hub.blob(hub.repositories[f"tester/{who}"].find("main").files["model.safetensors"].blob)
    assert load_file(hub_weights).keys() == weights.keys()


def test_adapters_are_pulled_where_meo_hf_is_missing_or_name_it(
    outcomes: Values, hub: HubServer, adapters: Any
) -> None:
    torch.testing.assert_close(torch.tensor(outcomes["plain adapter"]), torch.tensor(adapters[0]), rtol=0, atol=1e-5)
    with pytest.raises(FreshError, match=r"KeyError: 'meo_hf\.LORA'"):
        outcomes["own adapter"]
    files = hub.files("tester/adapter-plain")
    assert {"adapter_config.json", "adapter_model.safetensors", "meo_lora.json"} <= files.keys()


def test_the_trainer_pushes_what_loads_anywhere(
    outcomes: Values, hub: HubServer, trained: list[list[float]], pushed: Path
) -> None:
    torch.testing.assert_close(torch.tensor(outcomes["trained"]), torch.tensor(trained), rtol=0, atol=1e-5)
    files = hub.files("tester/trained")
    assert {f.name for f in code_files()} | {"expert_load.png", "README.md"} <= files.keys()
    stored = hub.blob(hub.repositories["tester/trained"].find("main").files["model.safetensors"].blob)
    before, after = load_file(pushed / "model.safetensors"), load_file(stored)
    moved = [name for name in after if "experts" in name and not torch.equal(after[name], before[name])]
    assert moved


def test_private_source_needs_a_token(hub: HubServer, client: Client, source: Path, folder: Path) -> None:
    client.python(UPLOAD, repo="tester/secret", folder=source, private=True, tag="")
    done = client.cli("convert", "tester/secret", folder / "secret", *QUICK, HF_TOKEN=None)
    assert done.code == 2
    assert "neither a folder here nor a repository you can see: check it, or give --token" in done.err
    assert not (folder / "secret").exists()
    done = client.cli("convert", "tester/secret", folder / "secret", *QUICK, "--token", "hf_owner", HF_TOKEN=None)
    assert done.code == 0, done.err
    assert b"hf_owner" not in (folder / "secret/meo_report.json").read_bytes()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("tester/absent",), "neither a folder here nor a repository you can see"),
        (("tester/src", "--source-revision", "absent"), "has no revision 'absent': check --source-revision"),
        (("no good/name",), "nor a valid Hub id (user/name)"),
    ],
)
def test_unknown_sources(client: Client, source: Path, folder: Path, arguments: tuple[str, ...], message: str) -> None:
    done = client.cli("convert", arguments[0], folder / "unknown", *arguments[1:], *QUICK)
    assert done.code == 2
    assert message in done.err
    assert len(done.err.strip().splitlines()) == 1, done.err
    assert not (folder / "unknown").exists()


@pytest.mark.parametrize("token", [None, "hf_wrong"])
def test_login_is_checked_before_any_work(
    hub: HubServer, client: Client, source: Path, folder: Path, token: str | None
) -> None:
    before = listing(folder)
    done = client.cli("convert", source, folder / "early", "--push-to-hub", "tester/early", *QUICK, HF_TOKEN=token)
    assert done.code == 2
    assert "run `hf auth login` or give --token" in done.err
    assert len(done.err.strip().splitlines()) == 1, done.err
    assert listing(folder) == before
    assert "tester/early" not in hub.repositories


@pytest.mark.parametrize(("route", "status"), [("lfs_put", 507), ("commit", 507), ("commit", None)])
def test_interrupted_upload_leaves_the_repository_as_it_was(
    hub: HubServer, client: Client, source: Path, folder: Path, route: str, status: int | None
) -> None:
    repo, out = f"tester/broken-{route.replace('_', '-')}-{status}", folder / f"broken-{route}-{status}"
    push = ("--push-to-hub", repo, *QUICK)
    assert client.cli("convert", source, out, *push).code == 0
    files, history = hub.files(repo), hub.history(repo)
    assert history[0].title == f"MEO variant of {source.name}"  # no path of this machine
    hub.fail_next(route, status=status)
    done = client.cli("convert", source, out, *push, "--seed", "1", "--overwrite")
    assert done.code == 1
    assert f"pushing to {repo} failed" in done.err
    assert f"{out} is complete, push it with `hf upload {repo} {out}" in done.err
    assert len(done.err.strip().splitlines()) == 1, done.err
    assert hub.files(repo) == files
    assert hub.history(repo) == history
    report = json.loads((out / "meo_report.json").read_text())
    assert report["options"]["seed"] == 1
    assert sha256(out / "model.safetensors") == report["files"]["model.safetensors"]["sha256"]
    assert client.cli("convert", source, out, *push, "--seed", "1", "--overwrite").code == 0
    assert hub.read(repo, "model.safetensors") == (out / "model.safetensors").read_bytes()


def test_public_repository_is_not_taken_for_a_private_one(
    hub: HubServer, client: Client, source: Path, folder: Path
) -> None:
    history = hub.history("tester/src")
    done = client.cli("convert", source, folder / "open", "--push-to-hub", "tester/src", "--private", *QUICK)
    assert done.code == 2
    assert "tester/src exists and is public: give another repository, or leave --private out" in done.err
    assert hub.history("tester/src") == history
    assert not (folder / "open").exists()


def test_extract_and_verify_by_name(hub: HubServer, client: Client, folder: Path) -> None:
    dense = saved("gpt2", folder / "gpt2")
    client.python(UPLOAD, repo="tester/gpt2", folder=dense, private=False, tag="")
    push = ("--push-to-hub", "tester/tasks", "--level", "task", "--task", "a", "--task", "b", *QUICK)
    assert client.cli("convert", "tester/gpt2", folder / "tasks", *push).code == 0
    done = client.cli("extract", "tester/tasks", folder / "task-b", "--task", "b")
    assert done.code == 0, done.err
    assert load_file(folder / "task-b/model.safetensors").keys() == load_file(dense / "model.safetensors").keys()
    assert client.cli("verify", folder / "tasks", "--mode", "none").code == 0


def test_card_names_all_bases(client: Client, source: Path, folder: Path) -> None:
    client.python(UPLOAD, repo="tester/tuned", folder=source, private=False, tag="")
    experts = ("--expert", "tester/tuned", "--expert", "tester/src", "--verify", "none")
    assert client.cli("convert", "tester/src", folder / "several", *experts).code == 0
    data = ModelCard.load(folder / "several/README.md").data.to_dict()
    assert data["base_model"] == ["tester/src", "tester/tuned"]
    assert data["base_model_relation"] == "merge"


def test_adapters_are_fetched_by_name_and_checked_at_their_commit(hub: HubServer, client: Client, folder: Path) -> None:
    base, dense = saved("gpt2", folder / "lora-base"), tiny_dense("gpt2")
    client.python(UPLOAD, repo="tester/lora-base", folder=base, private=False, tag="")
    maps = feed_forward_maps(dense)
    client.python(UPLOAD, repo="tester/law", folder=save_lora(dense, folder / "law", maps, 1), private=False, tag="")
    done = client.cli("convert", "tester/lora-base", folder / "bank", "--adapter", "tester/law", "--verify", "none")
    assert done.code == 0, done.err
    report = json.loads((folder / "bank/meo_report.json").read_text())
    (adapter,) = report["adapters"]
    assert (adapter["id"], adapter["task"]) == ("tester/law", "law")
    assert adapter["commit"] == hub.history("tester/law")[0].oid
    assert ModelCard.load(folder / "bank/README.md").data.base_model == ["tester/lora-base", "tester/law"]
    client.python(UPLOAD, repo="tester/law", folder=save_lora(dense, folder / "new", maps, 2), private=False, tag="")
    done = client.cli("verify", folder / "bank", "--mode", "sample")
    assert done.code == 0, done.err
    done = client.cli("convert", "tester/lora-base", folder / "none", "--adapter", "tester/nothing")
    assert done.code == 2
    assert "neither a folder here nor a repository" in done.err
