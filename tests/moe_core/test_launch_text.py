"""The text for several nodes is what the page says, and says what the backend wants set."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from twinmoe.moe_core.launch_text import LAUNCHERS, Cluster, launch_text

PAGE = Path(__file__).parents[2] / "docs" / "multinode.md"


def test_the_page_shows_the_text_that_is_printed():
    (shown,) = re.findall(r"```sh\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    words = ["quickstart", "parallel.scheme=hiermoe"]
    assert shown == launch_text("torchrun", Cluster(2, 8), words, "/shared/a")


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_settings_are_quoted_and_variables_that_are_set_win(launcher: str):
    words = ["quickstart", "data.paths=[a b.txt]"]
    text = launch_text(launcher, Cluster(3, 4), words, "/shared/my runs", {"NCCL_SOCKET_IFNAME": "eth0"})
    assert "train quickstart 'data.paths=[a b.txt]' --run-dir '/shared/my runs'" in text
    assert 'export NCCL_SOCKET_IFNAME="${NCCL_SOCKET_IFNAME:-eth0}"\n' in text
    assert Cluster(3, 4).ranks == 12
