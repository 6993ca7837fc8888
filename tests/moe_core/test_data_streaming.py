"""Local data sets pass by: text is read and tokenized a few documents at a time, tokens go to a file if asked."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from twinmoe.moe_core import cli, data_sources
from twinmoe.moe_core.config import DataConfig, TrainConfig
from twinmoe.moe_core.data import open_data
from twinmoe.moe_core.data_packing import Domain

TRAIN = TrainConfig(global_batch_size=4, sequence_length=32)
TEXTS = [f"text number {i} " * (i % 7 + 1) for i in range(200)]


def test_documents_are_taken_a_few_at_a_time(tmp_path: Path) -> None:
    made, written = [], []
    file = tmp_path / "tokens.bin"

    def batches() -> Iterator[list[np.ndarray]]:
        for i in range(50):
            made.append(i)
            written.append(file.stat().st_size)
            yield [np.full(100_000, i % 256)]

    domain = Domain.from_batches("d", batches(), 256, file)
    assert len(made) == 50
    assert np.diff(written)[1:].min() > 0  # each batch is on the disk, or in the file's buffer, when the next is made
    whole = Domain.from_documents("d", [np.full(100_000, i % 256) for i in range(50)], 256)
    assert domain.digest() == whole.digest()


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_a_streamed_file_is_the_data_set_of_its_rows(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    library = pytest.importorskip("datasets")
    monkeypatch.setattr(data_sources, "BATCH_BYTES", 500)
    file = tmp_path / f"rows.{kind}"
    rows = library.Dataset.from_dict({"body": TEXTS, "other": list(range(len(TEXTS)))})
    rows.to_json(str(file)) if kind == "jsonl" else rows.to_parquet(str(file))
    rows.save_to_disk(str(tmp_path / "saved"))
    files = open_data(DataConfig(source="hf", paths=(str(file),), text_field="body"), TRAIN)
    saved = open_data(DataConfig(source="hf", dataset=str(tmp_path / "saved"), text_field="body"), TRAIN)
    assert files.hash == saved.hash
    np.testing.assert_array_equal(files.batch(3).tokens_SL, saved.batch(3).tokens_SL)
    with pytest.raises(ValueError, match=r"data.text_field='text' is not a column.*body"):
        open_data(DataConfig(source="hf", paths=(str(file),)), TRAIN)


def test_an_export_spools_tokens_to_its_own_files(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps({"text": t}) + "\n" for t in TEXTS))
    words = ["data.source=hf", f"data.paths=[{file}]", "train.sequence_length=32"]
    assert cli.run(["data", "export", "quickstart", *words, "--out", str(tmp_path / "tokens")]) == 0
    direct = open_data(DataConfig(source="hf", paths=(str(file),)), TRAIN)
    again = open_data(DataConfig(source="memmap", paths=(str(tmp_path / "tokens"),)), TRAIN)
    assert again.hash == direct.hash
    np.testing.assert_array_equal(again.batch(7).targets_SL, direct.batch(7).targets_SL)


def test_packed_documents_are_masked_from_one_another_and_come_again_at_any_step(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps({"text": t}) + "\n" for t in TEXTS))
    config = DataConfig(source="hf", paths=(str(file),))
    first, later = open_data(config, TRAIN), open_data(config, TRAIN)
    for _ in range(9):
        first.batch(_)
    batch = first.batch(9)
    np.testing.assert_array_equal(batch.tokens_SL, later.batch(9).tokens_SL)
    starts = batch.tokens_SL == 256
    inside = starts & batch.real_SL
    inside[:, 0] = False
    assert inside.any()
    assert (np.diff(batch.documents_SL, axis=1)[inside[:, 1:]] == 1).all()
