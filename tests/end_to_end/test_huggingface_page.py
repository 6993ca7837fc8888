"""docs/huggingface.md: its model is made, trained and brought back as the page says, with fewer steps."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from twinmoe.moe_core import cli

pytest.importorskip("transformers", reason="transformers is not installed (extra hf)")
pytestmark = [pytest.mark.processes, pytest.mark.slow]

PAGE = (Path(__file__).parents[2] / "docs" / "huggingface.md").read_text(encoding="utf-8")


def test_the_path_without_a_download_is_as_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import AutoModelForCausalLM

    monkeypatch.chdir(tmp_path)
    text = [f"note {i}: the quick brown fox jumps over {i * i} lazy dogs. " * 8 for i in range(200)]
    Path("notes.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in text))
    (code,) = re.findall(r"```py\n(.*?)```", PAGE, re.DOTALL)
    exec(code, {"__name__": "page"})
    section = PAGE.partition("## Try it")[2].partition("\n## ")[0]
    commands = [line for line in section.splitlines() if line.startswith("twinmoe ")]
    assert len(commands) == 3
    for line in commands:
        words = shlex.split(line)[1:]
        if words[0] == "train":
            words += ["backend=cpu", "train.steps=2", "train.save_every=2", "train.sequence_length=32"]
        assert cli.run(words) == 0, line
    model, ours = (AutoModelForCausalLM.from_pretrained(place) for place in ("MODEL", "tuned"))
    assert [n for n, _ in model.named_parameters()] == [n for n, _ in ours.named_parameters()]
    assert Path("ours/SHA256SUMS").exists()
    assert Path("tuned/tokenizer.json").read_bytes() == Path("MODEL/tokenizer.json").read_bytes()


def test_the_script_with_a_trainer_runs_under_torchrun(tmp_path: Path) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    (tmp_path / "script.py").write_text(code)
    words = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "script.py"]
    streams: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    job = subprocess.Popen([sys.executable, *words], cwd=tmp_path, start_new_session=True, **streams)
    try:
        told, _ = job.communicate(timeout=200)
    finally:
        if job.poll() is None:
            os.killpg(job.pid, signal.SIGKILL)
    assert job.returncode == 0, told[-3000:]
    assert "train_loss" in told
