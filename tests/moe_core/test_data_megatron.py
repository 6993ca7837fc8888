"""Megatron's token files are read where they lie, and give the batches that the same documents give elsewhere."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest
from twinmoe.moe_core import data_megatron
from twinmoe.moe_core.config import DataConfig, TrainConfig
from twinmoe.moe_core.data import Data, open_data
from twinmoe.moe_core.data_memmap import export
from twinmoe.moe_core.data_packing import Domain
from twinmoe.moe_core.data_sources import Corpus

EOD = 300
TRAIN = TrainConfig(global_batch_size=4, sequence_length=32)
CODES = {"<u2": 8, "<i4": 4}


def write_megatron(prefix: Path, sequences: list[np.ndarray], bounds: list[int], dtype: str = "<u2") -> Path:
    """PREFIX.bin and PREFIX.idx as Megatron's builder writes them; bounds: at which sequence documents begin."""
    lengths = np.array([len(s) for s in sequences], "<i4")
    offsets = (np.cumsum(lengths) - lengths) * np.dtype(dtype).itemsize
    head = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, CODES[dtype], len(sequences), len(bounds))
    body = lengths.tobytes() + offsets.astype("<i8").tobytes() + np.array(bounds, "<i8").tobytes()
    prefix.with_suffix(".idx").write_bytes(head + body)
    prefix.with_suffix(".bin").write_bytes(b"".join(s.astype(dtype).tobytes() for s in sequences))
    return prefix


def documents(count: int = 30) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, EOD, rng.integers(1, 50)) for _ in range(count)]


def expected(docs: list[np.ndarray], boundary: int, size: int) -> Data:
    return Data(Corpus((Domain.from_documents("d", docs, boundary),), boundary, size), DataConfig(), TRAIN)


def same_batches(a: Data, b: Data) -> None:
    assert a.hash == b.hash
    for step in range(5):
        for name, value in vars(a.batch(step)).items():
            np.testing.assert_array_equal(value, getattr(b.batch(step), name))


@pytest.mark.parametrize("dtype", CODES)
def test_documents_that_end_with_one_token_are_cut_there(dtype: str, tmp_path: Path) -> None:
    docs = documents()
    ended = [np.append(d, EOD) for d in docs]
    prefix = write_megatron(tmp_path / "text_document", ended, list(range(len(docs) + 1)), dtype)
    for path in (str(prefix), f"{prefix}.bin"):
        found = open_data(DataConfig(source="megatron", paths=(path,)), TRAIN)
        assert found.vocab_size == EOD + 1
        same_batches(found, expected(docs, EOD, EOD + 1))


def test_documents_of_several_sequences_stay_whole(tmp_path: Path) -> None:
    docs = [np.append(d, EOD) for d in documents(12)]
    halves = [half for d in docs for half in (d[: len(d) // 2], d[len(d) // 2 :])]
    prefix = write_megatron(tmp_path / "halves", halves, list(range(0, len(halves) + 1, 2)))
    found = open_data(DataConfig(source="megatron", paths=(str(prefix),)), TRAIN)
    same_batches(found, expected([d[:-1] for d in docs], EOD, EOD + 1))


def test_without_a_common_end_the_boundary_is_the_tokenizers(tmp_path: Path) -> None:
    library = pytest.importorskip("tokenizers")
    docs = [np.append(d, i) for i, d in enumerate(documents(20))]
    prefix = write_megatron(tmp_path / "plain", docs, list(range(len(docs) + 1)))
    with pytest.raises(ValueError, match="--append-eod"):
        open_data(DataConfig(source="megatron", paths=(str(prefix),)), TRAIN)
    words = {f"w{i}": i for i in range(EOD)} | {"<|endoftext|>": EOD}
    library.Tokenizer(library.models.WordLevel(words, "w0")).save(str(tmp_path / "tokenizer.json"))
    config = DataConfig(source="megatron", paths=(str(prefix),), tokenizer=str(tmp_path / "tokenizer.json"))
    same_batches(open_data(config, TRAIN), expected(docs, EOD, EOD + 1))


def test_an_export_of_mapped_tokens_is_the_same_data(tmp_path: Path) -> None:
    docs = [np.append(d, EOD) for d in documents()]
    prefix = write_megatron(tmp_path / "text", docs, list(range(len(docs) + 1)))
    found = open_data(DataConfig(source="megatron", paths=(str(prefix),)), TRAIN)
    export(found, tmp_path / "tokens")
    same_batches(open_data(DataConfig(source="memmap", paths=(str(tmp_path / "tokens"),)), TRAIN), found)


def test_a_large_file_is_known_by_its_index_its_size_and_samples(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data_megatron, "TRUSTED_SIZE", 10)
    docs = [np.append(d, EOD) for d in documents()]
    config = DataConfig(source="megatron", paths=(str(tmp_path / "text"),))
    write_megatron(tmp_path / "text", docs, list(range(len(docs) + 1)))
    first = open_data(config, TRAIN).hash
    assert open_data(config, TRAIN).hash == first
    docs[3][0] += 1
    write_megatron(tmp_path / "text", docs, list(range(len(docs) + 1)))
    assert open_data(config, TRAIN).hash != first


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (lambda p: p.with_suffix(".bin").unlink(), "can't be read"),
        (lambda p: p.with_suffix(".bin").write_bytes(b"\0" * 10), "do not belong together"),
        (lambda p: p.with_suffix(".idx").write_bytes(b"x" * 60), "no index of Megatron's"),
        (lambda p: p.with_suffix(".idx").write_bytes(p.with_suffix(".idx").read_bytes()[:-8]), "do not belong"),
    ],
    ids=["no tokens", "short", "other", "cut"],
)
def test_files_that_do_not_fit_are_refused(damage: object, told: str, tmp_path: Path) -> None:
    prefix = write_megatron(tmp_path / "text", documents(4), [0, 1, 2, 3, 4])
    damage(prefix)  # type: ignore[operator]
    with pytest.raises(ValueError, match=told):
        open_data(DataConfig(source="megatron", paths=(str(prefix),)), TRAIN)
