"""Files compose by one rule, later wins; every mistake is answered with one sentence that says what to do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from twinmoe.moe_core import packaged
from twinmoe.moe_core.combinations import RULES, ConfigError, check_ranks, check_trainable, mesh_of
from twinmoe.moe_core.compose import command_line_backend, dump, load_config
from twinmoe.moe_core.config import Config
from twinmoe.moe_core.keys import valid_keys
from twinmoe.moe_core.mesh import Mesh

ALL_NAMES = [(kind, name) for kind in ("experiments", "models") for name in packaged.names(kind)]


def write(path: Path, content: dict[str, Any] | str) -> Path:
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
    return path


# --- order ---------------------------------------------------------------------------------------


def test_base_then_model_then_cluster_then_scheme_then_own_keys_then_words(tmp_path: Path) -> None:
    write(
        tmp_path / "base.yaml",
        {"name": "base", "moe": {"top_k": 1, "num_experts": 4}, "train": {"steps": 1, "seed": 1}},
    )
    write(tmp_path / "model.yaml", {"model": {"hidden_size": 64}, "moe": {"num_experts": 16, "top_k": 4}})
    write(
        tmp_path / "cluster.yaml",
        {"cluster": {"name": "two", "levels": [{"name": "node", "size": 2}, {"name": "all"}]}},
    )
    own = {
        "base": "base.yaml",
        "model": "model.yaml",
        "cluster": "cluster.yaml",
        "parallel": {"scheme": "llep", "data_sharding": "full"},
        "moe": {"top_k": 3},
        "train": {"seed": 2},
    }
    config = load_config(write(tmp_path / "own.yaml", own), ["train.seed=3"])
    assert config.name == "base"
    assert (config.moe.num_experts, config.moe.top_k) == (16, 3)
    assert config.model.hidden_size == 64
    assert config.cluster.name == "two"
    assert (config.parallel.planner, config.parallel.residency) == ("least_loaded", "borrowed")
    assert config.parallel.data_sharding == "full"
    assert (config.train.steps, config.train.seed) == (1, 3)


def test_a_reference_replaces_what_it_describes() -> None:
    """A shape laid over the quick start keeps nothing of the quick start's shape."""
    config = load_config("quickstart", ["model=olmoe-1b-7b", "model.num_layers=2"])
    assert not config.model.tie_embeddings
    assert (config.model.num_layers, config.moe.num_experts) == (2, 64)
    assert config.train == load_config("quickstart").train


def test_words_apply_in_order() -> None:
    scheme_last = load_config("quickstart", ["parallel.planner=static", "parallel.scheme=llep"])
    assert scheme_last.parallel.planner == "least_loaded"
    scheme_first = load_config("quickstart", ["parallel.scheme=llep", "parallel.residency=fully_sharded"])
    assert scheme_first.parallel.residency == "fully_sharded"


def test_a_scheme_that_was_changed_loses_its_name() -> None:
    assert load_config("quickstart", ["parallel.scheme=llep"]).parallel.scheme == "llep"
    changed = load_config("quickstart", ["parallel.scheme=llep", "parallel.residency=fully_sharded"])
    assert changed.parallel.scheme == "custom"


def test_dotted_keys_in_a_file_are_settings(tmp_path: Path) -> None:
    path = write(tmp_path / "x.yaml", "model: mixtral-8x7b\nmodel.num_layers: 3\n")
    assert load_config(path).model.num_layers == 3


def test_numbers_with_an_exponent_are_numbers() -> None:
    """YAML 1.1 reads 1e-3 as text."""
    assert (
        load_config("quickstart", ["train.learning_rate=3e-4", "train.min_learning_rate=1E-5"]).train.learning_rate
        == 3e-4
    )


@pytest.mark.parametrize(("kind", "name"), ALL_NAMES)
def test_every_packaged_file_is_read_back_from_its_dump(kind: str, name: str) -> None:
    config = load_config(name)
    assert load_config(yaml.safe_load(dump(config))) == config


@pytest.mark.parametrize("scheme", packaged.names("schemes"))
def test_every_scheme_combines_and_names_all_axes(scheme: str) -> None:
    text = yaml.safe_load((packaged.folder() / "schemes" / f"{scheme}.yaml").read_text())["parallel"]
    assert {"planner", "placement", "transport", "residency", "data_sharding"} <= set(text)
    assert text["scheme"] == scheme
    assert load_config("quickstart", [f"parallel.scheme={scheme}"]).parallel.scheme == scheme


@settings(max_examples=40, deadline=None)
@given(
    st.fixed_dictionaries(
        {
            "train.steps": st.integers(1, 10**6),
            "train.learning_rate": st.floats(1e-3, 1.0),
            "moe.capacity_factor": st.none() | st.floats(0.5, 4.0),
            "data.paths": st.lists(st.text("ab/*.é ", min_size=1), max_size=3),
            "name": st.text("abc-", min_size=1),
        }
    )
)
def test_any_settings_survive_the_dump(fields: dict[str, Any]) -> None:
    config = load_config({**fields, "data.source": "stdlib"})
    assert load_config(yaml.safe_load(dump(config))) == config


# --- mistakes ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("word", "told"),
    [
        ("train.stepz=2", "unknown key train.stepz; did you mean train.steps?"),
        ("steps=2", "unknown key steps; did you mean train.steps?"),
        ("moe.num_expert=2", "unknown key moe.num_expert; did you mean moe.num_experts?"),
        ("num_experts_per_tok=2", "here it is called moe.top_k"),
        ("moe.moe_router_topk=2", "here it is called moe.top_k"),
        ("moe.expert_num=2", "here it is called moe.num_experts"),
        ("moe.load_balance_coeff=1", "here it is called moe.bias_update_rate"),
        ("parallel.expert_model_parallel_size=2", "here it is called parallel.expert_parallel_size"),
        ("parallel.pipeline_parallel_size=2", "pipeline parallelism is not part of twinmoe"),
        ("model.kv_lora_rank=512", "MLA attention is not part of twinmoe"),
        ("xyzzy=1", "unknown key xyzzy; sections are"),
        ("train.steps=abc", "train.steps='abc' is not accepted: it should be a valid integer"),
        ("train.steps=true", "train.steps=True is not accepted"),
        ("train.steps=2.5", "train.steps=2.5 is not accepted"),
        ("train.dtype=fp8", "'float64', 'float32' or 'bfloat16'"),
        ("parallel.expert_parallel_size=four", "it should be a valid integer or 'auto'"),
        ("moe=3", "moe must hold keys and values, not 3"),
        ("moe.top_k=9", "moe.top_k=9 exceeds moe.num_experts=8"),
        ("moe.capacity_factor=abc", "moe: 'abc' is not a number or a fraction"),
        ("moe.capacity_factor=0", "choose one above 0 or null"),
        ("parallel.least_loaded.alpha=x", "parallel.least_loaded.alpha: 'x' is not a number or a fraction"),
        ("moe.router=magic", "moe.router=magic is unknown; choose one of"),
        ("train.steps", "not of the form key=value"),
        ("=3", "not of the form key=value"),
        ("data.paths=[a", "is not valid YAML"),
        ("parallel.scheme=foo", "there is no packaged name 'foo' in schemes; choose ep"),
        ("cluster=nowhere.yaml", "there is no file 'nowhere.yaml'"),
        ("cluster.levels=[{nam: x}]", "unknown key cluster.levels"),
    ],
)
def test_a_wrong_word_is_answered_in_one_sentence(word: str, told: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config("quickstart", [word])
    assert told in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("a: [1", "is not valid YAML"),
        ("- 1\n- 2\n", "must hold keys and values"),
        ("name: a\nname: b\n", "'name' is given twice (line 2"),
        ("base: x.yaml\n", "names itself"),
        ("base: other.yaml\n", "there is no file 'other.yaml'"),
        ("train: {steps: 0}\n", "greater than 0"),
        ("!!python/object/apply:os.system ['true']\n", "is not valid YAML"),
    ],
)
def test_a_wrong_file_is_answered_in_one_sentence(tmp_path: Path, text: str, told: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(write(tmp_path / "x.yaml", text))
    assert told in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_file_and_a_missing_name(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"there is no file .*absent.yaml"):
        load_config(tmp_path / "absent.yaml")
    with pytest.raises(ConfigError, match=r"no packaged name 'absent' in experiments; choose .*quickstart"):
        load_config("absent")
    write(tmp_path / "binary.yaml", "").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="can't be read as text"):
        load_config(tmp_path / "binary.yaml")


# --- what combines -------------------------------------------------------------------------------

PLANNER_RESIDENCY = {
    "static": {"owned", "fully_sharded"},
    "least_loaded": {"borrowed", "fully_sharded"},
    "relayout": {"fully_sharded", "borrowed"},
}


@pytest.mark.parametrize("planner", PLANNER_RESIDENCY)
@pytest.mark.parametrize("residency", ["owned", "borrowed", "fully_sharded"])
def test_planner_and_residency_combine_as_designed(planner: str, residency: str) -> None:
    words = [f"parallel.planner={planner}", f"parallel.residency={residency}"]
    if residency in PLANNER_RESIDENCY[planner]:
        assert load_config("quickstart", words).parallel.residency == residency
        return
    with pytest.raises(ConfigError) as caught:
        load_config("quickstart", words)
    assert f"parallel.planner={planner} and parallel.residency={residency} do not combine: " in str(caught.value)


@pytest.mark.parametrize(
    ("words", "pair"),
    [
        (
            ["parallel.placement=swap", "parallel.residency=fully_sharded"],
            ("placement=swap", "residency=fully_sharded"),
        ),
        (["parallel.transport=groupwise"], ("transport=groupwise", "tensor_parallel_size=1")),
        (["parallel.head_parallel_size=2"], ("head_parallel_size=2", "num_heads=1")),
        (
            ["moe.num_heads=3", "moe.head_dim=8", "parallel.head_parallel_size=2"],
            ("head_parallel_size=2", "num_heads=3"),
        ),
        (["moe.num_heads=4"], ("num_heads=4", "head_dim=null")),
        (["moe.num_heads=4", "moe.head_dim=8", "moe.top_k=1"], ("num_heads=4", "top_k=1")),
        (["moe.top_k=1"], ("top_k=1", "norm_topk_prob=True")),
        (["moe.router=switch"], ("router=switch", "top_k=2")),
        (["moe.num_groups=3"], ("num_experts=8", "num_groups=3")),
        (["moe.num_groups=2", "moe.group_top_k=4"], ("group_top_k=4", "num_groups=2")),
        (["moe.num_groups=8", "moe.group_top_k=1"], ("top_k=2", "group_top_k=1")),
        (["moe.shared_expert_gate=true"], ("shared_expert_gate=True", "num_shared_experts=0")),
        (["model.num_dense_layers=9"], ("num_dense_layers=9", "num_layers=4")),
        (["train.min_learning_rate=1"], ("min_learning_rate=1.0", "learning_rate=0.002")),
        (["data.source=text"], ("source=text", "paths=()")),
    ],
)
def test_refused_pairs_are_named_with_a_remedy(words: list[str], pair: tuple[str, str]) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config("quickstart", words)
    sentence = str(caught.value)
    assert all(option in sentence for option in pair)
    assert any(verb in sentence for verb in ("choose", "set", "raise", "lower", "name"))


def test_every_rule_names_keys_that_exist() -> None:
    known = set(valid_keys())
    for rule in RULES:
        assert {rule.first, rule.second} <= known


# --- ranks ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "ranks", "mesh"),
    [
        ([], 1, Mesh()),
        ([], 4, Mesh(expert=4)),
        ([], 16, Mesh(data=2, expert=8)),
        (["moe.num_experts=6"], 4, Mesh(data=1, expert=4)),
        (["moe.num_experts=3"], 4, Mesh(data=2, expert=2)),
        (["parallel.expert_parallel_size=2"], 4, Mesh(data=2, expert=2)),
        (["parallel.tensor_parallel_size=2"], 8, Mesh(expert=4, tensor=2)),
    ],
)
def test_meshes(words: list[str], ranks: int, mesh: Mesh) -> None:
    assert check_ranks(load_config("quickstart", words), ranks) == mesh


@pytest.mark.parametrize(
    ("words", "ranks", "told"),
    [
        ([], 32, "32 ranks are more than train.global_batch_size=16 sequences; use at most 16"),
        ([], 3, "train.global_batch_size=16 can't be shared equally by 3 ranks"),
        (["parallel.expert_parallel_size=3"], 4, "does not divide 4 ranks"),
        (["parallel.expert_parallel_size=16"], 16, "16 ranks would share moe.num_experts=8"),
        (["train.micro_batch_size=3"], 4, "train.micro_batch_size=3 does not divide the 4 sequences"),
    ],
)
def test_ranks_that_do_not_fit(words: list[str], ranks: int, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        check_ranks(load_config("quickstart", words), ranks)


def test_a_layer_shape_is_not_trained() -> None:
    with pytest.raises(ConfigError, match="deepseek-v3 is the shape of a layer"):
        check_trainable(load_config("deepseek-v3"))


def test_mesh_of_a_default_config() -> None:
    assert mesh_of(Config(), 2) == Mesh(expert=2)


def test_the_command_line_backend_is_known_before_the_config_is_read() -> None:
    assert command_line_backend(["train.steps=3", "backend=cpu"]) == "cpu"
    assert command_line_backend(["train.steps=3"]) is None
