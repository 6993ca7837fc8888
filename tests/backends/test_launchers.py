"""Launchers' variables become the same Launch, whoever set them; nonsense is refused in one sentence."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from twinmoe.backends.launchers import (
    LaunchError,
    device_index,
    expand_counts,
    first_host,
    is_scheduler,
    launcher_of,
    resolve,
)
from twinmoe.backends.protocol import Launch

TORCHRUN = {
    "RANK": "5",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "4",
    "MASTER_ADDR": "node0",
    "MASTER_PORT": "1234",
    "TORCHELASTIC_USE_AGENT_STORE": "True",
    "TORCHELASTIC_RESTART_COUNT": "2",
}
MSRUN = {
    "MS_ROLE": "MS_WORKER",
    "MS_WORKER_NUM": "4",
    "MS_NODE_ID": "3",
    "RANK_ID": "3",
    "DEVICE_ID": "3",
    "MS_SCHED_HOST": "node0",
    "MS_SCHED_PORT": "8118",
}
SLURM = {
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
    "SLURM_STEP_NUM_TASKS": "5",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2),1",
    "SLURM_STEP_NODELIST": "gpu[07-09]",
    "SLURM_JOB_ID": "10001",
}


def test_without_a_launcher_a_process_is_alone() -> None:
    assert resolve({}) == Launch()
    assert launcher_of({}) is None


def test_torchrun_variables() -> None:
    expected = Launch(5, 8, 1, 4, "node0", 1234, agent_store=True, attempt=2)
    assert resolve(TORCHRUN) == expected
    assert launcher_of(TORCHRUN) == "torchrun"


def test_msrun_variables_and_its_scheduler() -> None:
    assert resolve(MSRUN) == Launch(3, 4, 3, 4, "node0", 8118)
    scheduler = {**MSRUN, "MS_ROLE": "MS_SCHED", "RANK_ID": "0"}
    assert is_scheduler(scheduler)
    assert not is_scheduler(MSRUN)
    assert resolve(scheduler).size == 4


def test_slurm_variables() -> None:
    assert resolve(SLURM) == Launch(3, 5, 1, 2, "gpu07", 20001)


def test_slurm_port_and_address_can_be_given() -> None:
    launch = resolve({**SLURM, "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "77"})
    assert (launch.address, launch.port) == ("10.0.0.1", 77)


def test_a_slurm_batch_script_is_no_rank_of_its_job() -> None:
    """Outside srun a batch script sees SLURM_PROCID=0 and the size of the whole job."""
    assert launcher_of({"SLURM_PROCID": "0", "SLURM_NTASKS": "8", "SLURM_JOB_ID": "1"}) is None


def test_torchrun_inside_srun_counts_as_torchrun() -> None:
    assert resolve({**SLURM, **TORCHRUN}).rank == 5


@pytest.mark.parametrize(
    ("variables", "told"),
    [
        ({**TORCHRUN, "RANK": "x"}, "RANK"),
        ({**TORCHRUN, "RANK": "8"}, "rank 8 of 8"),
        ({**TORCHRUN, "LOCAL_RANK": "4"}, "local 4 of 4"),
        ({"MS_ROLE": "MS_WORKER"}, "MS_WORKER_NUM"),
        ({**SLURM, "SLURM_STEP_TASKS_PER_NODE": "two"}, "two"),
    ],
)
def test_impossible_variables_are_named(variables: dict[str, str], told: str) -> None:
    with pytest.raises(LaunchError, match=told.replace("(", r"\(")):
        resolve(variables)


@given(st.lists(st.tuples(st.integers(1, 16), st.integers(1, 5)), min_size=1, max_size=4))
def test_slurm_counts_expand(runs: list[tuple[int, int]]) -> None:
    text = ",".join(f"{n}(x{r})" if r > 1 else str(n) for n, r in runs)
    assert expand_counts(text) == [n for n, r in runs for _ in range(r)]


@pytest.mark.parametrize(
    ("nodes", "first"),
    [("login1", "login1"), ("a1,b2", "a1"), ("gpu[07-09,12],x", "gpu07"), ("r[1-2]n,x", "r1n"), ("n[3,5]", "n3")],
)
def test_slurm_first_host(nodes: str, first: str) -> None:
    assert first_host(nodes) == first


@pytest.mark.parametrize(("local", "visible", "index"), [(0, 8, 0), (7, 8, 7), (5, 1, 0), (0, 1, 0)])
def test_one_visible_device_is_the_process_s_own_whatever_its_rank(local: int, visible: int, index: int) -> None:
    assert device_index(local, visible) == index


@pytest.mark.parametrize("visible", [0, 4])
def test_a_process_without_a_device_is_told_so(visible: int) -> None:
    with pytest.raises(LaunchError, match=f"local rank 4 sees {visible} devices; start at most"):
        device_index(4, visible)
