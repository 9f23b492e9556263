"""Calibration rows: what is read of files, tables, conversations and data sets, and what each token weighs."""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from compare_tiny import words_tokenizer

from meo_hf.errors import UnsupportedError, UsageError
from meo_hf.reduction.calibration import Calibration, CalibrationRows, parse_text, read_calibration

torch.set_num_threads(1)
TEMPLATE = "{% for m in messages %}{{ 'w90' if m['role'] == 'user' else 'w91' }} {{ m['content'] }} {% endfor %}"


def tokenizer(**special: str) -> Any:
    return words_tokenizer(pad_token="w0", **special)


def numbers(first: int, count: int) -> str:
    return " ".join(f"w{1 + (first + at) % 80}" for at in range(count))


def written(path: Path, content: Any) -> str:
    if path.suffix == ".jsonl":
        content = "\n".join(json.dumps(row) for row in content)
    elif path.suffix == ".json":
        content = json.dumps(content)
    elif path.suffix == ".csv":
        with path.open("w", newline="") as file:
            table = csv.DictWriter(file, list(content[0]))
            table.writeheader()
            table.writerows(content)
        return str(path)
    path.write_text(content)
    return str(path)


def read(*texts: str, chat: str | None = None, **settings: Any) -> CalibrationRows:
    made = tokenizer()
    made.chat_template = chat
    return read_calibration(Calibration(texts, **{"window": 8, "samples": 4, **settings}), made)


def real_rows(found: CalibrationRows) -> list[list[int]]:
    return [row[mask == 1].tolist() for row, mask in zip(found.input_ids, found.attention_mask, strict=True)]


def test_a_text_is_cut_into_windows(tmp_path: Path) -> None:
    path = written(tmp_path / "a.txt", numbers(0, 35))
    found = read(path)
    assert found.input_ids.tolist() == [[1 + 8 * row + at for at in range(8)] for row in range(4)]
    assert found.token_weights.tolist() == [[1.0] * 8] * 4
    drawn = [read(path, samples=2, seed=seed).input_ids[:, 0].tolist() for seed in range(8)]
    assert len({tuple(rows) for rows in drawn}) > 1
    assert all(rows == sorted(rows) and set(rows) <= {1, 9, 17, 25} for rows in drawn)
    assert real_rows(read(written(tmp_path / "short.txt", "w5 w6"))) == [[5, 6]]


def test_every_window_begins_as_texts_do(tmp_path: Path) -> None:
    from tokenizers.processors import TemplateProcessing

    made = tokenizer(bos_token="w95", eos_token="w96")
    special = [("w95", 95), ("w96", 96)]
    made.backend_tokenizer.post_processor = TemplateProcessing(single="w95 $A w96", special_tokens=special)
    settings = Calibration((written(tmp_path / "a.txt", numbers(0, 14)),), window=8)
    assert read_calibration(settings, made).input_ids.tolist() == [[95, *range(1, 8)], [95, *range(8, 15)]]


@pytest.mark.parametrize("suffix", ["jsonl", "json", "csv"])
def test_rows_of_tables_stay_rows(suffix: str, tmp_path: Path) -> None:
    texts = ["w1 w2 w3", "", numbers(10, 20), "w7"]
    path = written(tmp_path / f"a.{suffix}", [{"text": text, "other": "w50"} for text in texts])
    found = read(path)
    assert real_rows(found) == [list(range(11, 19)), [1, 2, 3], [7]]
    assert found.attention_mask.sum(1).tolist() == [8, 3, 1]
    assert torch.equal(found.token_weights, found.attention_mask.double())
    assert real_rows(read(path, column="other")) == [[50]] * 4
    with pytest.raises(UsageError, match="in column 'lines'"):
        read(path, column="lines")


def test_parquet_and_missing_datasets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pandas = pytest.importorskip("pandas")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    path = tmp_path / "a.parquet"
    pandas.DataFrame({"text": ["w1 w2", "w3"]}).to_parquet(path)
    assert sorted(real_rows(read(str(path)))) == [[1, 2], [3]]
    monkeypatch.setitem(sys.modules, "datasets", None)
    for name in (str(path), "owner/data", "owner/data:config:test"):
        with pytest.raises(UnsupportedError, match="pip install datasets"):
            read(name)


def test_conversations_get_the_chat_template(tmp_path: Path) -> None:
    talk = [{"role": "user", "content": "w1 w2"}, {"role": "assistant", "content": "w3"}]
    path = written(tmp_path / "a.jsonl", [{"messages": talk, "text": "w60"}])
    assert real_rows(read(path, chat=TEMPLATE)) == [[90, 1, 2, 91, 3]]
    assert real_rows(read(path, column="text")) == [[60]]
    with pytest.raises(UsageError, match="no chat template"):
        read(path)
    with pytest.raises(UsageError, match="template refuses"):
        read(path, chat="{{ raise_exception('no') }}")


def test_domains_weigh_as_asked_whatever_their_size(tmp_path: Path) -> None:
    long = written(tmp_path / "long.txt", numbers(0, 32))
    short = written(tmp_path / "short.jsonl", [{"text": "w70 w71"}, {"text": "w72"}])
    found = read(f"{long}=1", f"{short}=3")
    ids, weights = found.input_ids, found.token_weights
    of_short = ids >= 70
    assert weights[of_short].sum() == pytest.approx(0.75 * 35)
    assert weights[~of_short].sum() == pytest.approx(0.25 * 35)
    assert weights[of_short].unique().numel() == 1
    assert (weights[found.attention_mask == 0] == 0).all()
    said = found.describe()
    assert [(one["name"], one["weight"], one["rows"], one["tokens"]) for one in said["domains"]] == [
        ("long.txt", 0.25, 4, 32),
        ("short.jsonl", 0.75, 2, 3),
    ]
    assert (said["rows"], said["tokens"], said["window"], said["samples"]) == (6, 35, 8, 4)
    assert str(tmp_path) not in json.dumps(said)


def test_batches_are_no_wider_than_their_rows(tmp_path: Path) -> None:
    path = written(tmp_path / "a.jsonl", [{"text": numbers(0, length)} for length in (1, 5, 3, 8, 2)])
    found = read(path, samples=9, batch_size=2)
    batches = found.batches()
    assert [tuple(batch.input_ids.shape) for batch in batches] == [(2, 8), (2, 3), (1, 1)]
    assert sum(float(batch.token_weights.sum()) for batch in batches) == 19
    assert all(torch.equal(batch.attention_mask, (batch.token_weights > 0).long()) for batch in batches)


def test_the_hash_is_of_all_that_is_read(tmp_path: Path) -> None:
    one, other = (written(tmp_path / f"{name}.txt", numbers(first, 16)) for name, first in (("a", 0), ("b", 30)))
    found = read(one, other).sha256
    assert read(one, other, batch_size=1).sha256 == found
    others = [
        read(f"{one}=2", other).sha256,
        read(one).sha256,
        read(one, other, window=4).sha256,
        read(one, one).sha256,
    ]
    assert len({found, *others}) == 5


def test_specs_are_a_name_and_a_weight(tmp_path: Path) -> None:
    odd = written(tmp_path / "a=2", "w1")
    assert parse_text("a.txt") == ("a.txt", 1.0)
    assert parse_text("a.txt=0.5") == ("a.txt", 0.5)
    assert parse_text("b=c.txt") == ("b=c.txt", 1.0)
    assert parse_text("b=c.txt=3") == ("b=c.txt", 3.0)
    assert parse_text(odd) == (odd, 1.0)
    assert parse_text(f"{odd}=4") == (odd, 4.0)
    for weight in ("0", "-1", "nan", "inf"):
        with pytest.raises(UsageError, match="weight is above 0"):
            parse_text(f"a.txt={weight}")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.txt", "", "gives no row"),
        ("empty.jsonl", [{"text": " "}], "gives no row"),
        ("none.jsonl", [], "gives no row"),
        ("list.jsonl", [["w1"]], "no columns"),
        ("number.jsonl", [{"text": 3}], "no text or messages"),
    ],
)
def test_a_text_that_gives_nothing_is_refused(name: str, content: Any, message: str, tmp_path: Path) -> None:
    good = written(tmp_path / "good.txt", numbers(0, 16))
    with pytest.raises(UsageError, match=message):
        read(good, written(tmp_path / name, content))


def test_what_cannot_be_read_is_refused(tmp_path: Path) -> None:
    (tmp_path / "bytes.txt").write_bytes(b"\xff\xfe\xfa")
    (tmp_path / "broken.json").write_text("[{")
    for name, message in (("bytes.txt", "no UTF-8"), ("broken.json", "cannot be read as json"), ("", "is a folder")):
        with pytest.raises(UsageError, match=message):
            read(str(tmp_path / name))
    with pytest.raises(UsageError, match="neither a file here"):
        read("missing.txt")
    with pytest.raises(UsageError, match="there is no --calibration"):
        Calibration(())
    for setting in ("window", "samples", "batch_size"):
        with pytest.raises(UsageError, match=f"{setting} 0"):
            Calibration(("a",), **{setting: 0})
