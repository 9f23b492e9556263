"""The model card says whose work the model is, under which licence, and what nobody has checked."""

from __future__ import annotations

from pathlib import Path

import pytest
from checkpoints import run_cli, saved
from huggingface_hub import ModelCard

from meo_hf import convert
from meo_hf.conversion.card import resolve_license
from meo_hf.errors import LicenseError


def licensed(folder: Path, license_: str | None) -> Path:
    """Write a model whose card states a licence."""
    saved("bert", folder)
    (folder / "README.md").write_text("# no metadata\n" if license_ is None else f"---\nlicense: {license_}\n---\n")
    return folder


@pytest.mark.parametrize(
    ("licenses", "stated", "expected"),
    [
        (["mit"], None, "mit"),
        (["Apache-2.0", "apache-2.0", None], None, "apache-2.0"),
        ([None, None], None, None),
        (["mit", "apache-2.0"], None, "other"),
        (["cc-by-nc-4.0", "mit"], "cc-by-nc-4.0", "cc-by-nc-4.0"),
    ],
)
def test_licences_that_stand_together(licenses: list[str | None], stated: str | None, expected: str | None) -> None:
    assert resolve_license({str(i): name for i, name in enumerate(licenses)}, stated) == expected


@pytest.mark.parametrize("other", ["gpl-3.0", "cc-by-nc-4.0", "llama3", "gemma"])
def test_licences_that_do_not(other: str) -> None:
    with pytest.raises(LicenseError, match="settle which applies, then pass --license NAME"):
        resolve_license({"a": "mit", "b": other}, None)


def test_licences_of_several_experts_are_listed(tmp_path: Path) -> None:
    source = licensed(tmp_path / "base", "mit")
    experts = [licensed(tmp_path / "one", "apache-2.0"), licensed(tmp_path / "two", None)]
    convert(source, tmp_path / "meo", experts=experts, verify="none")
    card = ModelCard.load(tmp_path / "meo/README.md")
    assert card.data.license == "other"
    for line in ("- base: mit", "- one: apache-2.0", "- two: none stated", "one; two", "routers are untrained"):
        assert line in card.content
    assert "base_model" not in card.data.to_dict(), "folders are no repositories"
    assert str(tmp_path) not in card.content


def test_stated_licence_settles(tmp_path: Path) -> None:
    source, expert = licensed(tmp_path / "base", "mit"), licensed(tmp_path / "one", "cc-by-nc-4.0")
    options = ("--expert", expert, "--top-k", "1", "--verify", "none")
    assert run_cli("convert", source, tmp_path / "meo", *options).code == 2
    assert run_cli("convert", source, tmp_path / "meo", *options, "--license", "cc-by-nc-4.0").code == 0
    assert ModelCard.load(tmp_path / "meo/README.md").data.license == "cc-by-nc-4.0"


@pytest.mark.parametrize(
    ("family", "level", "auto", "pipeline"),
    [
        ("bert", "token", "AutoModelForMaskedLM", "fill-mask"),
        ("t5", "sequence", "AutoModelForSeq2SeqLM", None),
        ("marian", "sequence", "AutoModelForSeq2SeqLM", "translation"),
        ("gpt2", "task", "AutoModelForCausalLM", "text-generation"),
        ("llama", "segment", "AutoModelForCausalLM", "text-generation"),
        ("vit", "sequence", "AutoModelForImageClassification", "image-classification"),
    ],
)
def test_card_shows_how_to_load(family: str, level: str, auto: str, pipeline: str | None, tmp_path: Path) -> None:
    source = saved(family, tmp_path / "dense")
    convert(source, tmp_path / "meo", num_experts=2, level=level, expert_init="noise", verify="none")
    card = ModelCard.load(tmp_path / "meo/README.md")
    assert f'model = {auto}.from_pretrained("REPO", revision="COMMIT", trust_remote_code=True)' in card.content
    assert card.data.pipeline_tag == pipeline
    assert f"`{level}`" in card.content
    assert ("per segment of 256 tokens" in card.content) is (level == "segment")
    assert "Not verified" in card.content
    assert "noisy copies" in card.content


def test_malformed_card_of_a_source_does_not_matter(tmp_path: Path) -> None:
    source = saved("bert", tmp_path / "dense")
    (source / "README.md").write_bytes(b"---\nlicense: [unclosed\n---\n\xff")
    report = convert(source, tmp_path / "meo", num_experts=2, verify="none")
    assert report.licenses == {str(source): None}
