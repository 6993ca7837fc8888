"""The table of names: every field exists, every foreign name leads to one, and the page is the table."""

from __future__ import annotations

from pathlib import Path

from twinmoe.moe_core.keys import valid_keys
from twinmoe.moe_core.words import NOT_OFFERED, WORDS, alias_table, as_markdown

PAGE = Path(__file__).parents[2] / "docs" / "words.md"


def test_every_word_names_a_field_once() -> None:
    fields = [word.field for word in WORDS]
    assert set(fields) <= set(valid_keys())
    assert len(set(fields)) == len(fields)


def test_names_of_other_systems_lead_to_our_fields() -> None:
    table = alias_table()
    assert table["moe_router_topk"] == table["num_experts_per_tok"] == table["num_experts_chosen"] == "moe.top_k"
    assert table["n_routed_experts"] == table["expert_num"] == table["num_moe_experts"] == "moe.num_experts"
    assert table["first_k_dense_replace"] == "model.num_dense_layers"
    assert table["load_balance_coeff"] == "moe.bias_update_rate", "a step size in torchtitan, not a loss weight"


def test_what_is_refused_by_name_is_no_alias() -> None:
    assert not set(NOT_OFFERED) & set(alias_table())


def test_the_page_is_the_table() -> None:
    assert PAGE.read_text(encoding="utf-8") == as_markdown()
