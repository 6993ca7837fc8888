"""What can't be swapped, saved or run inside somebody else's loop is refused with the remedy."""

from __future__ import annotations

from typing import Any

import pytest
from twinmoe.backends.registry import BackendError
from twinmoe.moe_core import ConfigError, expert_parameters, replace_moe_blocks, restore_moe_blocks

torch = pytest.importorskip("torch")
pytest.importorskip("transformers", reason="transformers is not installed (extra hf)")

from twinmoe.testing.end_to_end.huggingface import MODELS, make_theirs  # noqa: E402

IDS = torch.arange(48).reshape(2, 24)


@pytest.mark.parametrize("name", MODELS)
def test_a_swapped_model_computes_the_same_and_is_itself_again_afterwards(name: str) -> None:
    theirs = make_theirs(name).double()
    theirs.set_experts_implementation("eager")
    before = {n: p.detach().clone() for n, p in theirs.named_parameters()}
    expected = theirs(input_ids=IDS, labels=IDS)
    expected.loss.backward()
    gradients = {n: p.grad for n, p in theirs.named_parameters()}
    theirs.zero_grad()
    assert replace_moe_blocks(theirs, backend="cpu") == (2 if name == "qwen2_moe mixed" else 3)
    found = theirs(input_ids=IDS, labels=IDS)
    found.loss.backward()
    torch.testing.assert_close(found.logits, expected.logits, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found.aux_loss, expected.aux_loss, rtol=1e-7, atol=0)
    for n, p in theirs.named_parameters():
        if n in gradients:
            torch.testing.assert_close(p.grad, gradients[n], rtol=1e-5, atol=1e-6, msg=n)
    restore_moe_blocks(theirs, "cpu")
    assert {n: p.shape for n, p in theirs.named_parameters()} == {n: p.shape for n, p in before.items()}
    assert all(torch.equal(p, before[n]) for n, p in theirs.named_parameters())


def test_experts_keep_the_models_dtype_and_follow_autocast() -> None:
    theirs = make_theirs("qwen3_moe").bfloat16()
    replace_moe_blocks(theirs, backend="cpu")
    assert {p.dtype for m in theirs.model.layers for p in expert_parameters(m.mlp.experts)} == {torch.bfloat16}
    assert theirs(input_ids=IDS).logits.dtype == torch.bfloat16
    wide = make_theirs("gpt_oss")
    replace_moe_blocks(wide, backend="cpu")
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast("cpu", dtype):
            wide(input_ids=IDS, labels=IDS).loss.backward()
    assert {p.grad.dtype for p in wide.parameters()} == {torch.float32}


def test_the_state_of_a_rank_is_not_handed_out_as_the_model(tmp_path: Any) -> None:
    theirs = make_theirs("mixtral")
    replace_moe_blocks(theirs, backend="cpu")
    with pytest.raises(RuntimeError, match="restore_moe_blocks"):
        theirs.state_dict()
    with pytest.raises(RuntimeError, match="restore_moe_blocks"):
        theirs.save_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("parallel", "told"),
    [
        ({"tensor_parallel_size": 2}, "tensor_parallel_size is for twinmoe's own loop"),
        ({"placement": "swap"}, "placement is for twinmoe's own loop"),
        ({"data_sharding": "full"}, "data_sharding is for twinmoe's own loop"),
        ({"shceme": "llep"}, "unknown key parallel.shceme"),
    ],
)
def test_what_the_loop_would_have_to_do_is_refused(parallel: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        replace_moe_blocks(make_theirs("mixtral"), parallel, "cpu")


def test_models_without_experts_and_other_frameworks_are_refused() -> None:
    with pytest.raises(ValueError, match="no module of the model holds experts"):
        replace_moe_blocks(torch.nn.Linear(2, 2), backend="cpu")
    with pytest.raises(BackendError, match="models of transformers are torch's"):
        replace_moe_blocks(make_theirs("mixtral"), backend="mindspore-cpu")
