"""`plan` picks what the cluster's numbers say, within memory, tells why, and its file runs."""

from __future__ import annotations

from pathlib import Path

import pytest
from twinmoe.moe_core.choose_scheme import Advice, advise, scheme_of, write_scheme
from twinmoe.moe_core.combinations import ConfigError
from twinmoe.moe_core.compose import AXES, load_config
from twinmoe.moe_core.config import Config
from twinmoe.moe_core.run_folder import model_hash
from twinmoe.moe_core.scheme_auto import advice_line, settled
from twinmoe.moe_core.simulate_rates import rates_of_teraflops, shape_of
from twinmoe.moe_core.synthetic import Skew
from twinmoe.moe_core.trace_make import Synthetic, record_trace, write


def config_of(*words: str, far: float = 1e-9, memory: int | None = None) -> Config:
    levels = [
        {"name": "node", "size": 2, "alpha": 1e-5, "beta": 1e-11},
        {"name": "cluster", "size": None, "alpha": 3e-5, "beta": far},
    ]
    cluster = {"name": "test", "levels": levels, "device_memory_bytes": memory}
    base = ["model.hidden_size=256", "model.num_layers=2", "moe.num_experts=16", "moe.top_k=4", "model.vocab_size=257"]
    base += ["moe.expert_hidden_size=256", "train.global_batch_size=8", "train.sequence_length=512"]
    return load_config({"cluster": cluster}, [*base, *words])


def advice(config: Config, skew: str, teraflops: float = 1.0, ranks: int = 4) -> Advice:
    trace = record_trace(Synthetic(Skew.parse(skew), 16, config.moe.top_k, ranks, 512))
    return advise(config, ranks, trace, rates_of_teraflops(teraflops, shape_of(config, 4)))


def scheme(found: Advice) -> str:
    return found.winner.name.split(",")[0]


def test_slow_links_ask_for_deduplication_and_slow_devices_for_balance():
    slow_links = advice(config_of(far=1e-7), "balanced", teraflops=1000)
    assert scheme(slow_links) in ("hiermoe", "groupwise")
    slow_device = advice(config_of(far=1e-11), "hot:75:4", teraflops=0.02)
    plain = next(cost for cost in slow_device.ranked if cost.name.startswith("ep,expert_parallel_size=4"))
    assert plain.straggler > 2
    assert slow_device.winner.total < plain.total
    assert slow_device.winner.straggler < 1.3


def test_no_way_changes_the_function():
    config = config_of()
    hashes = {model_hash(cost.config) for cost in advice(config, "zipf:1").ranked}
    assert hashes == {model_hash(config)}


def test_ways_that_need_more_memory_are_left_out_and_none_is_an_error():
    every = advice(config_of(), "zipf:1").ranked
    middle = sorted(cost.memory for cost in every)[len(every) // 2]
    found = advice(config_of(memory=middle), "zipf:1")
    assert found.left_out
    assert all(cost.memory <= middle for cost in found.ranked)
    with pytest.raises(ConfigError, match="no way fits"):
        advice(config_of(memory=1000), "zipf:1")


def test_three_sentences_name_what_binds_the_runner_up_and_memory():
    first, second, third = advice(config_of(), "zipf:1").sentences()
    assert "bind it with" in first
    assert "loses most in" in second
    assert "GiB a rank" in third


def test_the_file_is_a_scheme_that_a_config_can_name(tmp_path: Path):
    found = advice(config_of(far=1e-7), "hot:75:4")
    path = tmp_path / "mine.yaml"
    write_scheme(found.winner.config, path, found.sentences())
    again = load_config({}, [f"parallel.scheme={path}", "moe.num_experts=16"])
    for axis in (*AXES, "expert_parallel_size", "tensor_parallel_size"):
        assert getattr(again.parallel, axis) == getattr(found.winner.config.parallel, axis)
    assert path.read_text().startswith("# ")
    assert scheme_of(found.winner.config)["planner"] == found.winner.config.parallel.planner
    with pytest.raises(ConfigError, match="exists"):
        write_scheme(found.winner.config, path, [])


def test_auto_is_plain_expert_parallelism_where_nothing_was_measured():
    for words in ([], ["cluster=testbed_2x2_100mbit"]):
        done = settled(load_config({}, [*words, "parallel.scheme=auto"]), 4)
        assert done.config.parallel.scheme == "ep"
        assert "bench" in done.reasons[0]
    plain = load_config({})
    assert settled(plain, 4).config is plain


def test_auto_decides_once_and_later_only_advises(tmp_path: Path):
    config = config_of("cluster.device_teraflops=0.05", "parallel.scheme=auto")
    done = settled(config, 4)
    assert done.config.parallel.scheme != "auto"
    assert done.config.train.trace_every > 0
    assert settled(config, 4).config == done.config
    from twinmoe.moe_core.compose import dump

    (tmp_path / "config.yaml").write_text(dump(load_config({}, ["parallel.scheme=laer"])))
    assert settled(config, 4, tmp_path).config.parallel.scheme == "laer"
    assert advice_line(done.config, 4, tmp_path) is None
    made = Synthetic(Skew.parse("hot:75:4"), 16, 4, 4, 512)
    write(tmp_path / "trace" / "ranks_00000.twtrace", made.info, made.records())
    told = advice_line(done.config, 4, tmp_path)
    assert told is not None
    assert done.config.parallel.scheme in told
