"""The planner benchmark's rows and keys."""

from twinmoe.moe_core.bench_planner import Case, run, skewed


def test_rows_have_the_promised_keys_and_times():
    cases = [
        Case("least_loaded", 16, 4),
        Case("least_loaded", 16, 8),
        Case("relayout", 8, 4, 3),
        Case("relayout_plan", 8, 4, 3),
    ]
    result = run(cases, repeats=2)
    assert [row["planner"] for row in result["rows"]] == ["least_loaded", "least_loaded", "relayout", "relayout_plan"]
    for row in result["rows"]:
        assert {"planner", "num_experts", "ranks", "slots", "milliseconds"} <= set(row)
        assert row["milliseconds"] > 0
    assert [row["slots"] for row in result["rows"]][2:] == [3, 3]
    assert isinstance(result["growth"]["least_loaded"], float)
    assert result["growth"]["relayout"] is None
    assert result["compile_excluded"] is True


def test_counts_are_skewed_and_the_same_every_time():
    counts = skewed(32, 4)
    assert counts.sum(1).tolist() == [32768] * 4
    assert counts.sum(0).max() > 5 * counts.sum(0).mean()
    assert (counts == skewed(32, 4)).all()
