"""Batches depend on content, seed and step alone; every token is a target once; bad corpora are named."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from twinmoe.moe_core.config import DataConfig, TrainConfig
from twinmoe.moe_core.data import Data, GlobalBatch, open_data
from twinmoe.moe_core.data_memmap import export, read_memmap
from twinmoe.moe_core.data_packing import Domain, scrambled
from twinmoe.moe_core.data_sources import Corpus

ARRAYS = ("tokens_SL", "targets_SL", "real_SL", "documents_SL", "positions_S", "domain_S")


def train_config(batch: int = 4, length: int = 8, seed: int = 0) -> TrainConfig:
    return TrainConfig(global_batch_size=batch, sequence_length=length, seed=seed)


def made(documents: list[list[bytes]], train: TrainConfig | None = None, **config: object) -> Data:
    """Data over domains of byte documents."""
    domains = [
        Domain.from_documents(f"domain {i}", [np.frombuffer(d, np.uint8) for d in docs], 256)
        for i, docs in enumerate(documents)
    ]
    return Data(Corpus(tuple(domains), 256, 257), DataConfig.model_validate(config), train or train_config())


def same(a: GlobalBatch, b: GlobalBatch) -> bool:
    totals = a.total_targets == b.total_targets and a.total_tokens == b.total_tokens
    return totals and all(np.array_equal(getattr(a, n), getattr(b, n)) for n in ARRAYS)


def numbered(count: int, size: int, seed: int = 0) -> list[bytes]:
    rng = np.random.default_rng(seed)
    return [bytes(rng.integers(0, 256, size, dtype=np.uint8)) for _ in range(count)]


def text_config(*paths: Path | str, **more: object) -> DataConfig:
    return DataConfig.model_validate({"source": "text", "paths": tuple(map(str, paths)), **more})


# --- hand-sized: packing, targets, documents, padding ---------------------------------------------------------


def test_each_document_is_read_behind_a_boundary_and_ends_in_one() -> None:
    # 10 documents of 9 bytes = 100 positions; a tenth of them is one document of 10 positions: the held-out one
    docs = [bytes([65 + i] * 9) for i in range(10)]
    data = made([docs], train_config(batch=1, length=10), validation_fraction=0.1)
    batch = data.batch(0)
    letter = batch.tokens_SL[0, 1]
    assert batch.tokens_SL.tolist() == [[256] + [letter] * 9]
    assert batch.targets_SL.tolist() == [[letter] * 9 + [256]]
    held = data.validation_batch(0).tokens_SL[0, 1]
    assert held not in {data.batch(s).tokens_SL[0, 1] for s in range(9)}


def test_targets_documents_and_padding_of_a_hand_sized_stream() -> None:
    # Positions: "abc" 4, "de" 3, "f" 2, held out "zzzzz...": cut in sixes, the second sequence has 3 and 3 of padding.
    data = made([[b"abc", b"de", b"f"]], train_config(batch=2, length=6), validation_fraction=0.2)
    # a fifth of 9 positions is 1: no document fits, so the last position of "abc" (c -> boundary) is held out
    batch = data.batch(0)
    order = np.argsort(batch.tokens_SL[:, 1] != ord("a"))
    first, second = batch.take(order).tokens_SL
    targets = batch.take(order).targets_SL
    assert first.tolist() == [256, *b"ab", 256, *b"de"]
    assert targets[0].tolist() == [*b"abc", *b"de", 256]
    assert second.tolist() == [256, *b"f", 0, 0, 0, 0]
    assert targets[1].tolist() == [*b"f", 256, -1, -1, -1, -1]
    assert batch.take(order).real_SL.tolist() == [[True] * 6, [True] * 2 + [False] * 4]
    assert batch.take(order).documents_SL.tolist() == [[0, 0, 0, 1, 1, 1], [0, 0, 1, 1, 1, 1]]
    assert (batch.total_targets, batch.total_tokens) == (8, 8)
    held = data.validation_batch(0)
    assert held.tokens_SL[0].tolist() == [ord("c"), 0, 0, 0, 0, 0]
    assert held.targets_SL[0].tolist() == [256, -1, -1, -1, -1, -1]


def test_without_document_masks_a_sequence_is_one_document() -> None:
    data = made([numbered(9, 5)], document_masks=False)
    assert not data.batch(0).documents_SL.any()
    assert made([numbered(9, 5)]).batch(0).documents_SL.any()


@settings(max_examples=40, deadline=None)
@given(
    sizes=st.lists(st.lists(st.integers(0, 30), min_size=1, max_size=12), min_size=1, max_size=3),
    length=st.integers(1, 16),
    mix=st.sampled_from(["even", "proportional"]),
)
def test_every_position_is_a_target_once_in_training_or_validation(
    sizes: list[list[int]], length: int, mix: str
) -> None:
    sizes = [s for s in sizes if sum(s) >= 2] or [[7]]
    documents = [[bytes([d % 250] * n) for d, n in enumerate(s)] for s in sizes]
    data = made(documents, train_config(1, length), domain_mix=mix, validation_fraction=0.25)
    for domain, docs in enumerate(documents):
        expected = np.zeros((257, 257), int)
        for d in filter(None, docs):
            np.add.at(expected, ([256, *d], [*d, 256]), 1)
        found = np.zeros((257, 257), int)
        streams = [s for p in data._train + data._validation for s in p.streams if s.domain == domain]
        for stream in streams:
            for i in range(stream.sequences):
                tokens, targets, _ = stream.sequence(i)
                np.add.at(found, (tokens, targets), 1)
        assert np.array_equal(found, expected)


# --- order --------------------------------------------------------------------------------------------------------


def test_ranks_together_hold_the_global_batch_at_1_2_and_4_ranks() -> None:
    data = made([numbered(40, 30), numbered(10, 30)], train_config(batch=8))
    for step in (0, 3, 100):
        whole = data.batch(step)
        for ranks in (1, 2, 4, 8):
            parts = [made([numbered(40, 30), numbered(10, 30)], train_config(batch=8)).batch(step).for_rank(r, ranks)
                     for r in range(ranks)]  # fmt: skip
            for name in ARRAYS:
                assert np.array_equal(np.concatenate([getattr(p, name) for p in parts]), getattr(whole, name))
            assert all(p.total_targets == whole.total_targets for p in parts)
    micro = data.batch(0).for_rank(1, 2).micro_batches(2)
    assert [m.positions_S.tolist() for m in micro] == [[4, 5], [6, 7]]
    assert len(data.batch(0).micro_batches(None)) == 1


def test_a_step_gives_the_same_batch_without_those_before_it() -> None:
    config = train_config(batch=4, length=8)
    read_in_order = made([numbered(20, 30)], config)
    batches = [read_in_order.batch(s) for s in range(60)]
    for step in (59, 17, 0):
        assert same(made([numbered(20, 30)], config).batch(step), batches[step])
    assert same(read_in_order.batch(5), batches[5])


@pytest.mark.parametrize("mix", ["even", "proportional"])
def test_no_sequence_comes_twice_in_an_epoch_and_epochs_differ(mix: str) -> None:
    data = made([numbered(30, 23), numbered(20, 23, seed=1)], train_config(batch=1), domain_mix=mix)
    pools = data._train
    for pool in pools:
        epochs = [[pool.at(e * pool.sequences + i) for i in range(pool.sequences)] for e in range(3)]
        for epoch in epochs:
            assert len({(s.domain, i) for s, i in epoch}) == pool.sequences
        assert [i for _, i in epochs[0]] != [i for _, i in epochs[1]] != [i for _, i in epochs[2]]
    assert data.sequences_per_epoch == sum(p.sequences for p in pools)


def test_seeds_change_the_order_but_train_seed_leaves_validation_and_hash() -> None:
    documents = [numbered(30, 40)]
    base, other = made(documents), made(documents, train_config(seed=1))
    assert not same(base.batch(0), other.batch(0))
    assert same(base.validation_batch(0), other.validation_batch(0))
    assert base.hash == other.hash != made(documents, seed=1).hash


def test_even_mix_gives_each_domain_its_turn_and_proportional_its_size() -> None:
    documents = [numbered(90, 39), numbered(10, 39)]
    even = made(documents, train_config(batch=4))
    assert even.batch(7).domain_S.tolist() == [0, 1, 0, 1]
    assert even.domain_shares == (0.5, 0.5)
    flat = made(documents, train_config(batch=4), domain_mix="proportional")
    seen = np.concatenate([flat.batch(s).domain_S for s in range(flat.sequences_per_epoch // 4)])
    assert np.bincount(seen) / len(seen) == pytest.approx([0.9, 0.1], abs=0.02)


def test_scrambled_is_a_permutation_with_these_very_values() -> None:
    assert scrambled(8, (0,)).tolist() == [0, 3, 1, 2, 4, 7, 5, 6]
    assert sorted(scrambled(1000, (3, -1)).tolist()) == list(range(1000))
    assert scrambled(0, (1,)).size == 0


def test_validation_batches_show_every_held_out_sequence() -> None:
    data = made([numbered(60, 30), numbered(30, 20)], validation_fraction=0.1)
    sequences = {(s.domain, i) for p in data._validation for s in p.streams for i in range(s.sequences)}
    shown = {
        (int(d), x.tobytes())
        for b in map(data.validation_batch, range(data.validation_batches))
        for d, x in zip(b.domain_S, b.targets_SL)
    }
    assert len(shown) == len(sequences)


# --- hash and export ------------------------------------------------------------------------------------------


def test_hash_follows_content_boundaries_and_split() -> None:
    base = made([[b"abcdef", b"ghijkl"]])
    assert base.hash == made([[b"abcdef", b"ghijkl"]]).hash
    different = [
        made([[b"abcdef", b"ghijkm"]]),
        made([[b"abcde", b"fghijkl"]]),
        made([[b"abcdef"], [b"ghijkl"]]),
        made([[b"abcdef", b"ghijkl"]], validation_fraction=0.3),
    ]
    assert len({d.hash for d in different} | {base.hash}) == 5
    assert len(base.hash) == 64


@pytest.mark.parametrize("wide", [False, True])
def test_export_reads_back_with_the_same_batches_and_hash(tmp_path: Path, wide: bool) -> None:
    boundary = 70_000 if wide else 256
    rng = np.random.default_rng(0)
    domains = tuple(
        Domain.from_documents(f"d{i}", [rng.integers(0, boundary, 50) for _ in range(12)], boundary) for i in range(2)
    )
    config = DataConfig(validation_fraction=0.1)
    data = Data(Corpus(domains, boundary, boundary + 1), config, train_config())
    export(data, tmp_path / "tokens")
    update = {"source": "memmap", "paths": (str(tmp_path / "tokens"),)}
    back = open_data(config.model_copy(update=update), train_config())
    assert (back.hash, back.vocab_size) == (data.hash, data.vocab_size)
    assert all(same(back.batch(s), data.batch(s)) for s in range(20))
    assert same(back.validation_batch(0), data.validation_batch(0))
    export(back, tmp_path / "again")
    assert (tmp_path / "again/tokens_1.bin").read_bytes() == (tmp_path / "tokens/tokens_1.bin").read_bytes()


def test_damaged_or_foreign_exports_are_refused(tmp_path: Path) -> None:
    folder = tmp_path / "tokens"
    header = export(made([numbered(5, 40)]), folder)
    config = DataConfig(source="memmap", paths=(str(folder),))
    with pytest.raises(ValueError, match="choose another folder"):
        export(made([numbered(5, 40)]), folder)
    tokens = folder / "tokens_0.bin"
    good = tokens.read_bytes()
    tokens.write_bytes(bytes([good[0], good[1], 7]) + good[3:])
    with pytest.raises(ValueError, match="changed since they were exported"):
        open_data(config, train_config())
    tokens.write_bytes(good[:-2])
    with pytest.raises(ValueError, match="do not fit"):
        open_data(config, train_config())
    tokens.unlink()
    with pytest.raises(ValueError, match="cannot be mapped"):
        open_data(config, train_config())
    header.write_text(json.dumps({"format": "something else"}))
    with pytest.raises(ValueError, match="export the data again"):
        open_data(config, train_config())
    header.write_text("{")
    with pytest.raises(ValueError, match="export the data again"):
        open_data(config, train_config())
    for paths in ((), ("one", "two")):
        with pytest.raises(ValueError, match="one exported folder"):
            open_data(DataConfig(source="memmap", paths=paths), train_config())
    with pytest.raises(ValueError, match="twinmoe data export"):
        open_data(DataConfig(source="memmap", paths=(str(tmp_path),)), train_config())


def test_a_header_without_digest_is_read_through_and_a_large_file_is_believed(tmp_path: Path) -> None:
    data = made([numbered(5, 40)])
    header = export(data, tmp_path / "tokens")
    config = DataConfig(source="memmap", paths=(str(tmp_path / "tokens"),))
    about = json.loads(header.read_text())
    del about["domains"][0]["digest"]
    header.write_text(json.dumps(about))
    assert open_data(config, train_config()).hash == data.hash
    about["domains"][0]["digest"] = "believed"
    header.write_text(json.dumps(about))
    with pytest.raises(ValueError, match="changed since"):
        read_memmap(config)
    assert read_memmap(config, trusted_size=0).digests == ("believed",)


# --- sources ----------------------------------------------------------------------------------------------------


def test_stdlib_is_two_domains_of_real_text_without_tests() -> None:
    data = open_data(DataConfig(), train_config(batch=8, length=256))
    sources, topics = data.corpus.domains
    assert [d.name for d in data.corpus.domains] == ["sources", "topics"]
    assert 5e6 < len(sources.tokens) < 4e7
    assert 2e5 < len(topics.tokens) < 4e6
    assert len(topics.starts) > 50
    assert len(sources.starts) > 300
    library = Path(sysconfig.get_paths()["stdlib"])
    text = np.asarray(sources.tokens).astype(np.uint8).tobytes()
    assert (library / "json/decoder.py").read_bytes() in text
    for left_out in ("idlelib/editor.py", "test/test_json/__init__.py", "pydoc_data/topics.py"):
        assert not (library / left_out).exists() or (library / left_out).read_bytes() not in text
    assert data.vocab_size == 257
    assert data.batch(0).domain_S.tolist() == [0, 1] * 4
    assert data.batch(0).real_SL.all()


def test_loading_imports_no_tokenizer_library_and_a_second_process_agrees() -> None:
    program = (
        "import sys; from twinmoe.moe_core.config import DataConfig, TrainConfig\n"
        "from twinmoe.moe_core.data import open_data\n"
        "d = open_data(DataConfig(), TrainConfig(global_batch_size=4, sequence_length=64))\n"
        "assert not {'torch', 'mindspore', 'datasets', 'tokenizers'} & set(sys.modules)\n"
        "print(d.hash, int(d.batch(3).tokens_SL.sum()))"
    )
    env = {**os.environ, "PYTHONHASHSEED": "7"}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, env=env)
    assert done.returncode == 0, done.stderr
    data = open_data(DataConfig(), train_config(4, 64))
    assert done.stdout.split() == [data.hash, str(int(data.batch(3).tokens_SL.sum()))]


def test_text_takes_each_path_as_a_domain_and_each_file_as_a_document(tmp_path: Path) -> None:
    for name in ("b.txt", "a.txt", "empty.txt", "c.md"):
        (tmp_path / name).write_bytes(b"" if name == "empty.txt" else name.encode() * 20)
    data = open_data(text_config(tmp_path / "*.txt", tmp_path / "c.md"), train_config())
    first, second = data.corpus.domains
    assert first.starts.tolist() == [0, 101, 202]
    assert bytes(first.tokens[1:6].astype(np.uint8)) == b"a.txt"
    assert len(second.starts) == 2
    assert data.batch(0).domain_S.tolist() == [0, 1, 0, 1]


def test_one_long_file_holds_out_its_tail(tmp_path: Path) -> None:
    (tmp_path / "input.txt").write_bytes(bytes(range(200)) * 5)
    data = open_data(text_config(tmp_path / "input.txt", validation_fraction=0.1), train_config(1, 16))
    assert data._train[0].positions == 901
    assert data._validation[0].positions == 100


def test_a_corpus_shorter_than_a_sequence_is_padded(tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_bytes(b"hi there")
    data = open_data(text_config(tmp_path / "short.txt"), train_config(batch=2, length=64))
    batch = data.batch(0)
    assert batch.real_SL.sum(1).tolist() == [8, 8]
    assert batch.total_targets == 16
    assert data.validation_batch(9).total_targets == 2


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        ({"source": "text"}, "needs data.paths"),
        ({"source": "text", "paths": ("no/such/*.txt",)}, "no file matches"),
        ({"source": "stdlib", "paths": ("a.txt",)}, "set data.source=text"),
        ({"source": "hf"}, "needs data.dataset"),
        ({"tokenizer": "missing.json"}, "give 'bytes' or the path"),
    ],
)
def test_what_cannot_be_read_is_refused_with_the_remedy(config: dict, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        open_data(DataConfig.model_validate(config), train_config())


def test_folders_and_empty_files_are_refused_with_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"to take a folder's files write '.*/\*'"):
        open_data(text_config(tmp_path), train_config())
    (tmp_path / "empty.txt").touch()
    with pytest.raises(ValueError, match="holds no text"):
        open_data(text_config(tmp_path / "empty.txt"), train_config())


def test_more_ranks_than_sequences_or_a_ragged_share_is_refused() -> None:
    batch = made([numbered(9, 30)], train_config(batch=4)).batch(0)
    for ranks in (3, 8):
        with pytest.raises(ValueError, match=rf"multiple of {ranks}"):
            batch.for_rank(0, ranks)
    with pytest.raises(ValueError, match="choose a divisor of 2"):
        batch.for_rank(0, 2).micro_batches(3)


# --- tokenizers and datasets ---------------------------------------------------------------------------------


def tokenizer_file(folder: Path, special: list[str]) -> Path:
    tokenizers = pytest.importorskip("tokenizers")
    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=300, special_tokens=special, show_progress=False)
    model.train_from_iterator(["the cat sat on the mat"] * 4, trainer)
    model.save(str(folder / "tokenizer.json"))
    return folder / "tokenizer.json"


@pytest.mark.parametrize("special", [[], ["<|endoftext|>"]])
def test_a_tokenizer_file_gives_tokens_and_the_boundary(tmp_path: Path, special: list[str]) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    path = tokenizer_file(tmp_path, special)
    model = tokenizers.Tokenizer.from_file(str(path))
    (tmp_path / "cat.txt").write_text("the cat sat on the mat")
    data = open_data(text_config(tmp_path / "cat.txt", tokenizer=str(path)), train_config())
    size = model.get_vocab_size()
    assert (data.corpus.boundary, data.vocab_size) == ((0, size) if special else (size, size + 1))
    expected = model.encode("the cat sat on the mat").ids
    assert data.corpus.domains[0].tokens[1:-1].tolist() == expected


def test_hf_reads_local_files_and_saved_sets(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    rows = ["one document here", "and a second one", "", "the third of them"]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"body": r}) + "\n" for r in rows))
    datasets.Dataset.from_dict({"body": rows}).save_to_disk(str(tmp_path / "saved"))
    files = DataConfig(source="hf", paths=(str(tmp_path / "rows.jsonl"),), text_field="body")
    saved = DataConfig(source="hf", dataset=str(tmp_path / "saved"), text_field="body")
    a, b = (open_data(c, train_config()) for c in (files, saved))
    assert len(a.corpus.domains[0].starts) == 4
    assert a.hash == b.hash
    with pytest.raises(ValueError, match=r"choose one of \['body'\]"):
        open_data(files.model_copy(update={"text_field": "text"}), train_config())
