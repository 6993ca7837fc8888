"""Traces: what is written is read, a cut-off tail is not, groups are put together, others' files come in."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from twinmoe.moe_core.combinations import ConfigError
from twinmoe.moe_core.synthetic import Skew
from twinmoe.moe_core.trace import SUFFIX, Record, TraceInfo, TraceWriter, read, read_file
from twinmoe.moe_core.trace_make import Synthetic, import_array, import_megatron, record_of, write

INFO = TraceInfo(num_experts=8, top_k=2, ranks=4)


def made(step: int, layer: int = 0, seed: int = 0) -> Record:
    rng = np.random.default_rng((seed, step, layer))
    ids = {rank: np.argsort(rng.random((20, 8)), 1)[:, :2] for rank in range(4)}
    return record_of(step, layer, 0, ids, (4, 8))


def same(a: Record, b: Record) -> None:
    assert (a.step, a.layer, a.micro) == (b.step, b.layer, b.micro)
    for name in ("counts_RE", "ids_SK", "source_S"):
        np.testing.assert_array_equal(getattr(a, name), getattr(b, name))


def test_what_is_written_is_read(tmp_path: Path):
    path, records = tmp_path / f"a{SUFFIX}", [made(step, layer) for step in range(3) for layer in range(2)]
    write(path, INFO, records)
    info, found = read_file(path)
    assert info == INFO
    for a, b in zip(records, found, strict=True):
        same(a, b)
    trace = read(path)
    assert (trace.steps, trace.layers) == ([0, 1, 2], [0, 1])


@settings(max_examples=30, deadline=None)
@given(cut=st.integers(1, 400))
def test_a_tail_that_was_cut_off_is_ignored_and_overwritten(tmp_path_factory: pytest.TempPathFactory, cut: int):
    path = tmp_path_factory.mktemp("trace") / f"a{SUFFIX}"
    write(path, INFO, [made(step) for step in range(4)])
    whole = path.read_bytes()
    path.write_bytes(whole[:-cut])
    kept = [r.step for r in read_file(path)[1]]
    assert kept == list(range(len(kept)))
    assert len(kept) < 4
    with TraceWriter(path, INFO) as writer:
        writer.write([made(step) for step in range(len(kept), 4)])
    assert path.read_bytes() == whole


def test_a_damaged_frame_ends_what_is_read(tmp_path: Path):
    path = tmp_path / f"a{SUFFIX}"
    write(path, INFO, [made(step) for step in range(4)])
    data = bytearray(path.read_bytes())
    data[-10] ^= 1
    path.write_bytes(data)
    assert [r.step for r in read_file(path)[1]] == [0, 1, 2]


def test_an_existing_trace_of_something_else_is_refused(tmp_path: Path):
    path = tmp_path / f"a{SUFFIX}"
    write(path, INFO, [made(0)])
    with pytest.raises(ConfigError, match="another file"):
        TraceWriter(path, TraceInfo(16, 2, 4))
    with pytest.raises(ConfigError, match="exists"):
        write(path, INFO, [made(0)])
    path.write_text("no trace")
    with pytest.raises(ConfigError, match="not a trace"):
        read(path)
    with pytest.raises(ConfigError, match="no trace at"):
        read(tmp_path / "nowhere")


def test_files_of_expert_groups_are_one_trace_of_what_all_have(tmp_path: Path):
    folder = tmp_path / "trace"
    for first, steps in ((0, 3), (4, 2)):  # the second group was interrupted
        info = TraceInfo(8, 2, 4, first)
        write(folder / f"ranks_{first:05d}{SUFFIX}", info, [made(step, seed=first) for step in range(steps)])
    trace = read(tmp_path)
    assert trace.info.ranks == 8
    assert trace.steps == [0, 1]
    record = trace.records[1, 0, 0]
    np.testing.assert_array_equal(record.counts_RE, np.concatenate([made(1, seed=s).counts_RE for s in (0, 4)]))
    np.testing.assert_array_equal(record.source_S, np.concatenate([made(1).source_S, made(1).source_S + 4]))


def test_hundreds_of_experts_take_two_bytes_an_id():
    ids = np.random.default_rng(0).integers(0, 256, (4096, 8))
    record = record_of(0, 0, 0, {0: ids}, (1, 256))
    assert len(record.ids_SK) == 4096
    assert len(record.pack()) < 4096 * 8 * 2 + 4096 * 2 + 256 * 4 + 64
    same(record, Record.unpack(record.pack()))


def test_synthetic_choices_have_their_skew_drift_and_shift():
    synthetic = Synthetic(Skew.parse("hot:75:4"), 16, 2, ranks=4, tokens=512, layers=2, steps=4, drift=2, shift_at=3)
    records = {(r.step, r.layer): r.counts_RE.sum(0) for r in synthetic.records()}
    assert records[0, 0][:4].sum() == pytest.approx(0.75 * 4 * 1024, rel=0.01)
    assert records[1, 0][2:6].sum() == pytest.approx(0.75 * 4 * 1024, rel=0.01)
    hot = set(np.argsort(records[3, 0])[-4:].tolist())
    assert hot != {6, 7, 8, 9}
    assert set(np.argsort(records[0, 1])[-4:].tolist()) != {0, 1, 2, 3}


def test_megatrons_routing_trace_comes_in(tmp_path: Path):
    files = []
    for rank in range(2):
        lines = []
        for step in range(2):
            for layer in (1, 3):
                ids = [[(rank + step + t) % 4, (rank + step + t + layer) % 4] for t in range(3)]
                head = {"step": step, "stage": "pre_dispatch", "block": "decoder", "layer": layer, "rank": rank}
                lines.append(json.dumps({**head, "num_tokens": 3, "topk": 2, "top_indices": ids}))
        lines.append(json.dumps({"step": 0, "block": "mtp", "mtp_idx": 0, "layer": 1, "rank": rank}))
        files.append(tmp_path / f"rank_{rank}.jsonl")
        files[-1].write_text("\n".join(lines) + "\n")
    info, records = import_megatron(files, 4)
    assert (info.ranks, info.top_k, len(records)) == (2, 2, 4)
    first = next(r for r in records if (r.step, r.layer) == (0, 0))
    np.testing.assert_array_equal(first.ids_SK[:3], [[0, 1], [1, 2], [2, 3]])
    np.testing.assert_array_equal(first.counts_RE.sum(1), [6, 6])
    with pytest.raises(ConfigError, match="names expert 3 of 3"):
        import_megatron(files, 3)
    files[0].write_text('{"step": 0}\n')
    with pytest.raises(ConfigError, match="line 1 is no record"):
        import_megatron(files, 4)


def test_an_array_comes_in(tmp_path: Path):
    ids = np.random.default_rng(0).integers(0, 8, (2, 3, 4, 16, 2), dtype=np.int32)
    np.save(tmp_path / "ids.npy", ids)
    info, records = import_array(tmp_path / "ids.npy", 8)
    assert (info.ranks, len(records)) == (4, 6)
    np.testing.assert_array_equal(records[5].ids_SK, ids[1, 2].reshape(-1, 2))
    np.save(tmp_path / "wrong.npy", ids.astype(float))
    with pytest.raises(ConfigError, match="give integer ids"):
        import_array(tmp_path / "wrong.npy")
    np.save(tmp_path / "objects.npy", np.array([{}], object), allow_pickle=True)
    with pytest.raises(ConfigError, match="can't be read"):
        import_array(tmp_path / "objects.npy")
