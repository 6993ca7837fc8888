"""The layer benchmark: its rows, what is counted, and that plain operations compute the same layer."""

from __future__ import annotations

import json

import numpy as np
import pytest
from twinmoe.backends.registry import Backend, load
from twinmoe.moe_core.bench_layer import ByteCounter, LayerRequest, run
from twinmoe.moe_core.cli import run as command_line
from twinmoe.moe_core.plain_ops import plain_ops

KEYS = {"shape", "ops", "forward_milliseconds", "milliseconds", "least", "most", "microseconds_per_row", "teraflops"}


def test_rows_have_fused_and_plain_operations_of_every_shape(backend: Backend) -> None:
    rows = run(backend, LayerRequest(tokens=64, repeats=1))["rows"]
    assert [(r["shape"], r["ops"]) for r in rows] == [
        (shape, kind) for shape in ("few-experts", "many-experts") for kind in ("fused", "plain")
    ]
    for fused, plain in zip(rows[::2], rows[1::2], strict=True):
        assert fused.keys() >= KEYS
        assert min(fused[key] for key in KEYS - {"shape", "ops"}) > 0
        assert 0 < fused["activation_bytes"] < plain["activation_bytes"]


def test_plain_operations_compute_the_same(backend: Backend) -> None:
    ops, rng = backend.ops, np.random.default_rng(0)
    plain = plain_ops(ops)
    x, w_up, w_down, weights = (
        ops.asarray(rng.standard_normal(shape).astype(np.float32)) for shape in ((6, 8), (2, 8, 10), (2, 5, 8), (4, 2))
    )
    counts, index = ops.asarray(np.array([4, 1])), ops.asarray(np.array([[0, 3], [1, -1], [5, 2], [-1, -1]]))
    for a, b in (
        (plain.expert_mlp(x, w_up, w_down, counts, "swiglu"), ops.expert_mlp(x, w_up, w_down, counts, "swiglu")),
        (plain.combine_rows(x, index, weights), ops.combine_rows(x, index, weights)),
    ):
        np.testing.assert_allclose(ops.to_numpy(a), ops.to_numpy(b), rtol=1e-5, atol=1e-6)


def test_bytes_are_those_of_new_floating_arrays() -> None:
    counter = ByteCounter(load("cpu").ops)
    ops, counter.counts = counter.ops, True
    x = ops.asarray(np.zeros((4, 8), np.float32))
    ops.argsort(ops.asarray(np.arange(3)))
    ops.cast(x, "float32")
    assert counter.bytes == 0
    ops.cast(ops.exp(x), "float64")
    assert counter.bytes == 4 * 8 * (4 + 8)


def test_skew_and_config_are_words_of_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["bench", "layer", "quickstart", "--tokens", "32", "--skew", "zipf:1", "--repeats", "1", "--backend", "cpu"]
    assert command_line([*words, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert [row["shape"] for row in report["rows"]] == ["quickstart"] * 2
    assert (report["backend"], report["dtype"], report["tokens"]) == ("cpu", "float32", 32)


@pytest.mark.parametrize("words", [["nowhere"], ["--dtype", "int8"], ["--skew", "odd"]])
def test_a_wrong_word_is_refused_in_one_sentence(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert command_line(["bench", "layer", *words, "--tokens", "8", "--backend", "cpu"]) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1
