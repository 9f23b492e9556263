"""Converting a mixture of experts: where its weights go, what is refused, and what a user is told."""

from __future__ import annotations

import errno
import importlib.util
import json
import os
import shutil
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import transformers
from checkpoints import Ran, edit_json, listing, run_cli, sha256, tensors
from moe_tiny import tiny_moe, tiny_moe_inputs
from transformers import AutoModelForCausalLM

from meo_hf import convert, inspect, verify_output
from meo_hf.conversion import linking
from meo_hf.errors import ReferenceSourceError, UsageError

torch.set_num_threads(1)
FAMILIES = ("deepseek_v3", "dbrx", "jetmoe", "switch_transformers")  # the others are converted below


def stock(folder: Path, family: str = "mixtral", **options: Any) -> Path:
    tiny_moe(family).save_pretrained(folder, **options)
    return folder


def sparse_mixture(folder: Path, gigabytes: float) -> Path:
    """Make the benchmark's checkpoint, whose weights are holes in files."""
    path = Path(__file__).parents[1] / "benchmarks/conversion/mixture.py"
    spec = importlib.util.spec_from_file_location("mixture", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.sparse_mixture(folder, gigabytes)


def words(text: str) -> str:
    return " ".join(text.replace("│", " ").split())


@pytest.mark.parametrize("family", FAMILIES)
def test_full_verification_passes(family: str, tmp_path: Path) -> None:
    report = convert(stock(tmp_path / "src", family), tmp_path / "out")
    assert report.passed
    assert report.verification == "full"
    names = [check.name for check in report.checks]
    assert names[:4] == [
        "the config is the planned one",
        "every tensor has the source's name, type and shape",
        "loads without meo_hf",
        "tensors equal the source's",
    ]
    assert len(names) > 4 or family in ("jetmoe", "switch_transformers")


def test_verify_again(tmp_path: Path) -> None:
    convert(stock(tmp_path / "src"), tmp_path / "out", verify="none")
    for mode in ("full", "sample"):
        report = verify_output(tmp_path / "out", mode)
        assert report.passed
        assert report.verification == mode


def test_shards_and_index_are_the_source_s(tmp_path: Path) -> None:
    source = stock(tmp_path / "src", max_shard_size="60KB")
    report = convert(source, tmp_path / "out", verify="none")
    shards = sorted(path.name for path in source.glob("*.safetensors"))
    assert len(shards) > 2
    for name in shards:
        assert (tmp_path / "out" / name).samefile(source / name)
        assert report.files[name]["how"] == "linked"
    index = "model.safetensors.index.json"
    assert (tmp_path / "out" / index).read_text() == (source / index).read_text()


@pytest.mark.parametrize("case", ["asked for", "another file system"])
def test_files_are_copied(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    source = stock(tmp_path / "src")
    if case != "asked for":
        monkeypatch.setattr(linking.os, "link", refuse)
    report = convert(source, tmp_path / "out", verify="none", copy=case == "asked for")
    assert report.weights == "copy"
    copied = tmp_path / "out/model.safetensors"
    assert not copied.samefile(source / "model.safetensors")
    assert sha256(copied) == sha256(source / "model.safetensors")
    assert copied.stat().st_nlink == 1


def test_a_cache_s_symlinks_are_followed(tmp_path: Path) -> None:
    """As the Hub's cache keeps them: a snapshot of links to blobs."""
    blobs, snapshot = stock(tmp_path / "blobs"), tmp_path / "snapshot"
    snapshot.mkdir()
    for file in blobs.iterdir():
        (snapshot / file.name).symlink_to(file)
    convert(snapshot, tmp_path / "out", verify="none")
    linked = tmp_path / "out/model.safetensors"
    assert not linked.is_symlink()
    assert linked.samefile(blobs / "model.safetensors")


def test_the_source_is_never_touched(tmp_path: Path) -> None:
    source = stock(tmp_path / "src")
    before = listing(source)
    convert(source, tmp_path / "out", verify="sample")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    model.model.norm.weight.data.fill_(3.0)
    model.save_pretrained(tmp_path / "out")
    model.save_pretrained(tmp_path / "out", max_shard_size="50KB")
    convert(source, tmp_path / "out", overwrite=True, verify="none")
    shutil.rmtree(tmp_path / "out")
    assert listing(source) == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--num-experts", "4"), "--num-experts has no effect on a mixture of experts (mixtral): its experts are"),
        (("--expert-init", "noise"), "--expert-init has no effect on a mixture of experts"),
        (("--gate-scope", "projection"), "--gate-scope has no effect on a mixture of experts"),
        (("--task", "a"), "--task has no effect on a mixture of experts"),
        (("--dtype", "bfloat16"), "its weights are not rewritten; choose the type when you load it"),
        (("--level", "task"), "level 'task' is not possible for mixtral"),
        (("--level", "token"), "level 'token' is not possible for mixtral"),
        (("--top-k", "7"), "top_k is 7, but mixtral has 6 experts"),
        (("--top-k", "0"), "top_k is 0"),
        (("--reference", "--align"), "--reference leaves the weights where they are, so --align has no effect"),
        (("--reference", "--copy"), "so --copy has no effect"),
        (("--layers", "9"), "no layer 9"),
        (("--expert", "src"), "--expert has no effect on a mixture of experts"),
    ],
)
def test_options_that_make_no_sense(options: tuple[str, ...], message: str, tmp_path: Path) -> None:
    source = stock(tmp_path / "src")
    before = listing(tmp_path)
    options = tuple(str(source) if option == "src" else option for option in options)
    done = run_cli("convert", source, tmp_path / "out", *options)
    assert done.code == 2
    assert message in done.err
    assert len(done.err.strip().splitlines()) == 1
    assert listing(tmp_path) == before


@pytest.mark.parametrize("option", ["--reference", "--align", "--copy", "--pooling"])
def test_options_of_mixtures_are_refused_for_dense_models(option: str, tmp_path: Path) -> None:
    config = transformers.LlamaConfig(
        hidden_size=32, num_hidden_layers=1, intermediate_size=16, num_attention_heads=4, vocab_size=99
    )
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "src")
    values = ("probs",) if option == "--pooling" else ()
    done = run_cli("convert", tmp_path / "src", tmp_path / "out", option, *values)
    assert done.code == 2
    assert option in done.err


@pytest.mark.parametrize("family", ["phimoe", "jetmoe"])
def test_a_router_s_own_number_cannot_be_chosen(family: str, tmp_path: Path) -> None:
    done = run_cli("convert", stock(tmp_path / "src", family), tmp_path / "out", "--top-k", "3")
    assert done.code == 2
    assert f"the router of {family} fixes the number of selected experts" in done.err


@pytest.mark.parametrize("family", ["mixtral", "dbrx", "gemma4_text", "hunyuan_v1_moe"])
def test_more_experts_than_the_family_s_own(family: str, tmp_path: Path) -> None:
    """Gates of more experts: set in the config's own key, and computed by the family's router."""
    source = stock(tmp_path / "src", family)
    convert(source, tmp_path / "out", top_k=4, verify="none")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out", meo={"top_k": 1})
    inputs, chosen = tiny_moe_inputs(family), []
    for one in (model, again):
        experts = next(module for _, module in one.named_modules() if hasattr(module, "_normalise"))
        experts.register_forward_hook(lambda _m, args, _o: chosen.append(args[1].shape[-1]))
        with torch.no_grad():
            assert torch.isfinite(one.eval()(**inputs).logits).all()
    assert chosen == [4, 1]


def test_layers_are_chosen_by_their_number(tmp_path: Path) -> None:
    """DeepSeek's first layer is dense: it has no experts to merge."""
    source = stock(tmp_path / "src", "deepseek_v3")
    report = convert(source, tmp_path / "out", layers="2", verify="none")
    assert report.layers == [2]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    merged = [path for path, module in model.named_modules() if hasattr(module, "_normalise")]
    assert merged == ["model.layers.2.mlp.experts"]
    done = run_cli("convert", source, tmp_path / "other", "--layers", "0,2")
    assert done.code == 2
    assert "layers [0] have no experts; layers with experts: [1, 2]" in done.err


def test_inspect_and_dry_run_say_what_will_happen(tmp_path: Path) -> None:
    source = stock(tmp_path / "src")
    shown = words(run_cli("inspect", source).out)
    assert "yes, to level segment or sequence" in shown
    assert "6, of which the source selects 2" in shown
    done = run_cli("convert", source, tmp_path / "out", "--dry-run")
    assert "untouched: the files are hard links to the source's" in words(done.out)
    assert "0 bytes of weights" in words(done.out)
    assert not (tmp_path / "out").exists()
    done = run_cli("convert", source, tmp_path / "out", "--verify", "none", "--top-k", "3")
    assert "note: merging experts' weights is another function than adding their outputs" in words(done.out)
    shown = words(run_cli("inspect", tmp_path / "out").out)
    assert "meo.num_experts 6" in shown
    assert "meo.top_k 3" in shown


def test_card_says_that_it_is_another_function(tmp_path: Path) -> None:
    convert(stock(tmp_path / "src"), tmp_path / "out", verify="none")
    card = (tmp_path / "out/README.md").read_text()
    assert "a different function, with other quality" in words(card)
    assert "the source's router, reading the mean state of the segment before" in card
    assert "6, of which 2 are merged; the source's own" in card


@pytest.mark.parametrize("damage", ["config", "swap", "truncate", "code"])
def test_spoilt_outputs_fail_their_checks(damage: str, tmp_path: Path) -> None:
    source = stock(tmp_path / "src", "olmoe")  # whose gates do not sum to one
    convert(source, tmp_path / "out", copy=True, verify="none")
    out = tmp_path / "out"
    if damage == "config":
        edit_json(out / "config.json", num_experts_per_tok=3)
    elif damage == "swap":
        state = tensors(out)
        first, second = (next(n for n in state if f"experts.{i}.gate_proj" in n) for i in (0, 1))
        state[first], state[second] = state[second], state[first]
        from safetensors.torch import save_file

        save_file(state, out / "model.safetensors", {"format": "pt"})
    elif damage == "truncate":
        with (out / "model.safetensors").open("r+b") as file:
            file.truncate(file.seek(0, os.SEEK_END) - 100)
    else:
        code = out / "moe_meo.py"
        code.write_text(code.read_text().replace("* scale", "* 1.0"))
    report = verify_output(out)
    assert not report.passed


class TestReference:
    """Weights that stay in a folder."""

    def test_holds_config_and_code_alone(self, tmp_path: Path) -> None:
        source = stock(tmp_path / "src")
        report = convert(source, tmp_path / "out", reference=True)
        assert report.weights == "reference"
        assert report.passed
        assert report.verification == "full"
        assert not list((tmp_path / "out").glob("*.safetensors"))
        assert sum(file.stat().st_size for file in (tmp_path / "out").iterdir()) < 400_000

    def test_loads_with_the_options_of_a_load(self, tmp_path: Path) -> None:
        source = stock(tmp_path / "src")
        convert(source, tmp_path / "out", reference=True, verify="none")
        convert(source, tmp_path / "linked", verify="none")
        load = AutoModelForCausalLM.from_pretrained
        expected = load(tmp_path / "linked", dtype=torch.bfloat16)
        model, info = load(tmp_path / "out", dtype=torch.bfloat16, device_map={"": "cpu"}, output_loading_info=True)
        assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        assert model.name_or_path == str(tmp_path / "out")
        for name, value in expected.state_dict().items():
            assert torch.equal(model.state_dict()[name], value)
            assert model.state_dict()[name].dtype == value.dtype

    def test_saves_as_a_model_of_its_own(self, tmp_path: Path) -> None:
        convert(stock(tmp_path / "src"), tmp_path / "out", reference=True, verify="none")
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
        model.save_pretrained(tmp_path / "own")
        shutil.rmtree(tmp_path / "src")
        assert "weights" not in json.loads((tmp_path / "own/config.json").read_text())["meo"]
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "own")
        assert torch.equal(again.model.norm.weight, model.model.norm.weight)

    @pytest.mark.parametrize("change", ["gone", "longer", "header"])
    def test_a_changed_source_is_refused(self, change: str, tmp_path: Path) -> None:
        source = stock(tmp_path / "src")
        convert(source, tmp_path / "out", reference=True, verify="none")
        file = source / "model.safetensors"
        if change == "gone":
            file.unlink()
        elif change == "longer":
            with file.open("ab") as end:
                end.write(b"\0" * 8)
        else:
            text = file.read_bytes()
            file.write_bytes(text.replace(b'"model.norm.weight"', b'"model.morn.weight"', 1))
        with pytest.raises(ReferenceSourceError, match=r"is not there|has changed since"):
            AutoModelForCausalLM.from_pretrained(tmp_path / "out")

    def test_an_unpinned_repository_is_refused(self, tmp_path: Path) -> None:
        convert(stock(tmp_path / "src"), tmp_path / "out", reference=True, verify="none")
        meo = json.loads((tmp_path / "out/config.json").read_text())["meo"]
        edit_json(tmp_path / "out/config.json", meo={**meo, "weights": {"repo": "a/b", "commit": "main"}})
        with pytest.raises(ReferenceSourceError, match="'main', which is no commit"):
            AutoModelForCausalLM.from_pretrained(tmp_path / "out")

    def test_cannot_be_pushed(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        from meo_hf.conversion import convert as conversion

        monkeypatch.setattr(conversion, "check_login", lambda *_: None)
        with pytest.raises(UsageError, match="of no use on the Hub"):
            convert(stock(tmp_path / "src"), tmp_path / "out", reference=True, push_to_hub="a/b")


@pytest.mark.parametrize("family", ["gpt_oss", "switch_transformers"])  # interleaved stacks, and modules
def test_aligned_experts_compute_what_they_did(family: str, tmp_path: Path) -> None:
    source = stock(tmp_path / "src", family)
    report = convert(source, tmp_path / "out", align=True)
    assert report.passed
    assert report.weights == "rewrite"
    assert report.alignment
    assert all(row["after"] <= row["before"] for row in report.alignment)
    assert any(row["after"] < row["before"] for row in report.alignment)
    assert tensors(tmp_path / "out").keys() == tensors(source).keys()


@pytest.mark.parametrize("option", [(), ("--reference",)], ids=lambda option: "".join(option) or "linked")
def test_twenty_gigabytes_are_not_read(option: tuple[str, ...], tmp_path: Path) -> None:
    """The whole command in a process of its own: no tensor is loaded, whatever the size."""
    import subprocess
    import sys

    source = sparse_mixture(tmp_path / "src", 20)
    assert sum(file.stat().st_size for file in source.glob("*.safetensors")) > 20e9
    arguments = ["convert", str(source), str(tmp_path / "out"), "--verify", "none", *option]
    code = f"import sys; sys.argv = ['meo-hf', *{arguments!r}]; from meo_hf.cli import main; main()"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.DEVNULL)
    watched, peak = psutil.Process(process.pid), 0
    while process.poll() is None:
        try:
            peak = max(peak, watched.memory_info().rss)
        except psutil.NoSuchProcess:
            break
        try:
            process.wait(0.02)
        except subprocess.TimeoutExpired:
            continue
    assert process.wait() == 0
    assert 100e6 < peak < 600e6
    report = json.loads((tmp_path / "out/meo_report.json").read_text())
    assert report["bytes_to_write"] == report["bytes_read"] == 0


def test_inspect_of_a_large_mixture_reads_headers_only(tmp_path: Path) -> None:
    found = inspect(sparse_mixture(tmp_path / "src", 2))
    assert found.facts["experts"] == "64, of which the source selects 8"


def test_an_unfinished_conversion_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from meo_hf.conversion import moe_convert

    def fail(*_: object) -> Ran:
        raise KeyboardInterrupt

    source = stock(tmp_path / "src")
    before = listing(tmp_path)
    monkeypatch.setattr(moe_convert, "write_companions", fail)
    done = run_cli("convert", source, tmp_path / "out")
    assert done.code == 130
    assert listing(tmp_path) == before
