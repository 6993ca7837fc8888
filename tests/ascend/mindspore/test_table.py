"""The op table says exactly where the two devices differ."""

from __future__ import annotations

from twinmoe.backends import protocol
from twinmoe.testing.conftest import load_or_skip
from twinmoe.testing.contract.test_signatures import differences

load_or_skip("mindspore-cpu")

from twinmoe.ascend.mindspore import hccl_comm, host_ops, npu_ops, npu_trainer, table  # noqa: E402
from twinmoe.ascend.mindspore.framework import ops  # noqa: E402


def test_every_entry_that_differs_is_listed_and_no_other() -> None:
    assert set(host_ops.__all__) == set(npu_ops.__all__)
    differing = {name for name in host_ops.__all__ if getattr(host_ops, name) is not getattr(npu_ops, name)}
    assert differing == set(table.DIFFERENT)


def test_every_entry_gives_a_reason() -> None:
    assert all(entry.host and entry.npu and entry.why for entry in table.DIFFERENT.values())


def test_kernels_left_aside_exist_and_say_why() -> None:
    for name, why in table.UNUSED.items():
        assert hasattr(ops.auto_generate, name) or hasattr(ops, name), name
        assert why


def test_ascend_has_the_contract_s_signatures() -> None:
    assert differences(protocol.Ops, npu_ops) == []
    assert differences(protocol.Comm, hccl_comm) == []
    assert differences(protocol.Trainer, npu_trainer) == []
