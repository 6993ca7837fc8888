"""The papers' tables on the GPUs of one host, each scheme in the same run; prints tables, writes JSON. Run by hand:

    python tests/bench/eight_gpus.py --out DIR [--tables verify,yard,llep,hp,hiermoe,laer,train] [--minutes 9]
    python tests/bench/eight_gpus.py --backend cpu --nproc 8 --size tiny       eight gloo ranks

Exactness comes first. Tables that the time left has no room for are named as not run. With NCCL_P2P_DISABLE=1 the
ranks talk through shared memory, as fast as one 200 Gb/s link between nodes.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from twinmoe.testing.processes import run_processes


@dataclass(frozen=True)
class Size:
    """How large the tables are: `full` for eight H100s, `half` for two, `tiny` for a test on the host."""

    gpt: tuple[int, int, int, int, int]
    """Experts, width, hidden width, k, tokens a rank: gpt-oss-120b."""
    deepseek: tuple[int, int, int, int, int]
    olmoe: tuple[int, int, int, int, int]
    heads: tuple[int, int, int, int, int]
    """Heads, width, hidden width, experts a head, tokens."""
    layers: int
    sequence: int
    repeats: int
    dtype: str = "bfloat16"
    ks: tuple[int, ...] = (2, 4, 8)


SIZES = {
    "full": Size(
        (128, 2880, 2880, 4, 32768), (256, 7168, 2048, 8, 16384), (64, 2048, 1024, 8, 16384),
        (16, 2048, 1024, 64, 16384), 4, 2048, 7,
    ),
    "half": Size(
        (32, 2880, 2880, 4, 16384), (32, 7168, 2048, 8, 8192), (64, 1024, 512, 8, 16384), (16, 2048, 1024, 32, 16384),
        2, 2048, 7,
    ),
    "tiny": Size((16, 64, 64, 2, 64), (16, 64, 32, 2, 64), (16, 64, 32, 2, 64), (8, 64, 32, 8, 64), 1, 32, 2, "float32",
                 (2,)),
}  # fmt: skip
SCHEMES = {
    "llep": ["ep", "llep", "llep,least_loaded.spill_order=source_first"],
    "laer": ["ep", "fsdp_ep", "laer", "llep"],
}


@dataclass(frozen=True)
class Job:
    """What the tables share."""

    world: int
    backend: str
    size: Size
    out: Path
    deadline: float
    skews: tuple[str, ...]

    def left(self) -> float:
        return self.deadline - time.perf_counter()


def cli(job: Job, words: list[str], seconds: float) -> dict[str, Any]:
    """The JSON object that a command prints last. RuntimeError with its error otherwise."""
    command = [sys.executable, "-m", "twinmoe.moe_core.cli", *words, "--json"]
    limit = max(5.0, min(seconds, job.left()))
    done = subprocess.run(command, capture_output=True, text=True, timeout=limit, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(words[:3])}: {(done.stderr or done.stdout)[-600:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def verify(job: Job) -> list[dict[str, Any]]:
    words = ["verify", "--level", "quick", "--worlds", str(job.world), "--backend", job.backend]
    found = cli(job, [*words, "--dtype", "float64"], 120)
    return [{k: v for k, v in found.items() if isinstance(v, int | float | str | bool)}]


def yardsticks(backend: Any, launch: Any, order: int) -> dict[str, float]:
    """TFLOP/s of a dense product and GB/s that cross in an all-to-all of 64 MiB a rank."""
    comm = backend.comm.connect(launch)
    group = comm.group("yard", [list(range(launch.size))])
    like = backend.ops.asarray(np.zeros(1, np.float32))
    dtype = torch.bfloat16 if like.device.type == "cuda" else torch.float32
    a, b = (torch.randn(order, order, device=like.device, dtype=dtype) for _ in range(2))
    x = torch.randn(launch.size, 2**24 // launch.size if order > 1024 else 1024, device=like.device)
    ms = [1e3 * timed(backend, comm, group, fn, 10) for fn in (lambda: a @ b, lambda: comm.all_to_all(x, group))]
    crossing = x.numel() * 4 * (launch.size - 1) / launch.size
    comm.close()
    return {"gemm_tflops": 2 * order**3 / ms[0] / 1e9, "all_to_all_gbs": crossing / ms[1] / 1e6, "all_to_all_ms": ms[1]}


def timed(backend: Any, comm: Any, group: Any, fn: Callable[[], Any], repeats: int) -> float:
    """Median over calls of the slowest rank's seconds."""
    found = []
    for _ in range(repeats + 2):
        comm.barrier()
        backend.trainer.synchronize()
        start = time.perf_counter()
        fn()
        backend.trainer.synchronize()
        found.append(float(comm.gather_to_host(np.array(time.perf_counter() - start), group).max()))
    return float(np.median(found[2:]))


def yard(job: Job) -> list[dict[str, Any]]:
    order = 8192 if job.size.repeats > 2 else 128
    return [run_processes(job.world, "twinmoe.testing.bench.eight_gpus:yardsticks", {"order": order}, job.backend, 100)]


def schemes(job: Job, shape: tuple[int, ...], names: list[str], skews: list[str], more: list[str]) -> list[dict]:
    """`bench schemes` on one shape; each row with its gain over the first scheme and over its ceiling."""
    experts, width, hidden, k, tokens = shape
    words = ["bench", "schemes", "--nproc", str(job.world), "--backend", job.backend, "--dtype", job.size.dtype]
    words += ["--experts", str(experts), "--hidden", str(width), "--expert-hidden", str(hidden), "--top-k", str(k)]
    words += ["--tokens", str(tokens), "--repeats", str(job.size.repeats), *more]
    words += [w for name in names for w in ("--scheme", name)] + [w for skew in skews for w in ("--skew", skew)]
    rows = cli(job, words, 240)["rows"]
    base = {row["skew"]: row for row in rows if row["scheme"] == names[0]}
    return [
        {
            "experts": experts, "width": width, "k": k, "skew": r["skew"], "scheme": r["scheme"],
            "layer_ms": r["layer_milliseconds"], "transport_ms": r["transport_milliseconds"],
            "gain": base[r["skew"]]["layer_milliseconds"] / r["layer_milliseconds"], "rows_ceiling": r["rows_ceiling"],
            "mib": sum(r["bytes_per_level"].values()) / 2**20, "peak_gib": r["peak_memory_bytes"] / 2**30,
            "busiest_rows": r["busiest_rank_rows"],
        }
        for r in rows
    ]  # fmt: skip


def llep(job: Job) -> list[dict[str, Any]]:
    """Published skews (ids may repeat) and realistic ones, forward and backward, both spill orders."""
    rows = []
    for shape in (job.size.gpt, job.size.deepseek):
        published = [f"hot:{share}:1" for share in job.skews] + [f"hot:{share}:4" for share in job.skews]
        rows += schemes(job, shape, SCHEMES["llep"], ["balanced", *published], ["--repeat-ids"])
    return rows


def hiermoe(job: Job) -> list[dict[str, Any]]:
    """The ranks as nodes: one copy of a token per node against one per expert."""
    rows = []
    for inside in sorted({1, job.world // 2, job.world // 4} - {0}):
        cluster = job.out / f"nodes_{inside}.yaml"
        levels = [{"name": "node", "size": inside}, {"name": "cluster"}] if inside > 1 else [{"name": "cluster"}]
        cluster.write_text(yaml.safe_dump({"cluster": {"name": cluster.stem, "levels": levels}}))
        names = ["ep", "hiermoe,placement=fixed", "hiermoe,placement=fixed,deduplicate=false", "hiermoe"]
        found = schemes(job, job.size.olmoe, names, ["balanced", "together:2"], ["--cluster", str(cluster)])
        rows += [{"ranks_a_node": inside, **row} for row in found]
    return rows


def laer(job: Job) -> list[dict[str, Any]]:
    """Mixtral-like experts, eight with two chosen and sixteen with four, skewed."""
    _, width, hidden, _, tokens = job.size.olmoe
    shapes = [(8, width, 4 * hidden, 2, tokens), (16, width, 4 * hidden, 4, tokens)]
    shapes = [(max(e, job.world), *rest) for e, *rest in shapes]
    return [
        r
        for s in shapes
        for r in schemes(job, s, SCHEMES["laer"], ["balanced", "hot:60:2", "hot:80:1"], ["--repeat-ids"])
    ]


def hp(job: Job) -> list[dict[str, Any]]:
    """Head parallel against expert parallelism, of the multi-head layer and of a plain one of equal parameters."""
    heads, width, hidden, experts, tokens = job.size.heads
    options = {"heads": heads, "width": width, "hidden": hidden, "experts": experts, "tokens": tokens}
    options |= {"ks": list(job.size.ks), "dtype": job.size.dtype, "repeats": job.size.repeats}
    target = "twinmoe.testing.bench.eight_gpus_heads:rank"
    return run_processes(job.world, target, {"options": options}, job.backend, max(30, min(240, job.left())))["rows"]


def train(job: Job, names: tuple[str, ...] = ("ep", "hiermoe", "llep", "fsdp_ep", "laer")) -> list[dict[str, Any]]:
    """An OLMoE-like model end to end: milliseconds a step and tokens a second, median of the last steps."""
    experts, width, hidden, k, _ = job.size.olmoe
    settings = {
        "train.steps": 8, "train.dtype": job.size.dtype, "train.save_every": 0, "train.validate_every": 0,
        "train.global_batch_size": 4 * job.world, "train.sequence_length": job.size.sequence, "train.warmup_steps": 2,
        "model": "olmoe-1b-7b", "model.num_layers": job.size.layers, "model.hidden_size": width,
        "model.vocab_size": 257, "moe.num_experts": experts, "moe.expert_hidden_size": hidden, "moe.top_k": k,
        "parallel.expert_parallel_size": "auto",
    }  # fmt: skip
    rows = []
    for name in names:
        if job.left() < 45:
            rows.append({"scheme": name, "not_run": "no time left"})
            continue
        with tempfile.TemporaryDirectory() as folder:
            words = ["train", "quickstart", *(f"{k}={v}" for k, v in settings.items()), f"parallel.scheme={name}"]
            words += ["--nproc", str(job.world), "--run-dir", folder, f"backend={job.backend}"]
            try:
                summary = cli(job, words, 120)
            except (RuntimeError, subprocess.TimeoutExpired) as error:
                rows.append({"scheme": name, "failed": str(error)[-300:]})
                continue
            steps = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
        last = sorted(s["seconds"] for s in steps[3:] if "seconds" in s)
        seconds, tokens = last[len(last) // 2], steps[-1]["tokens"]
        rows.append({
            "scheme": name, "step_ms": 1e3 * seconds, "tokens_per_second": tokens / seconds,
            "peak_gib": summary["peak_memory_bytes"] / 2**30, "loss_last": summary["loss_last"],
        })  # fmt: skip
    return rows


TABLES: dict[str, Callable[[Job], list[dict[str, Any]]]] = {
    "verify": verify, "yard": yard, "llep": llep, "hp": hp, "hiermoe": hiermoe, "laer": laer, "train": train,
}  # fmt: skip


def show(name: str, rows: list[dict[str, Any]]) -> None:
    print(f"\n{name}", flush=True)
    for row in rows:
        cells = (f"{k} {v:.3f}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items())
        print("  " + "  ".join(cells), flush=True)


def main() -> None:
    """One table after another; a failing one is written down and the others go on."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/eight_gpus"))
    parser.add_argument("--tables", default=",".join(TABLES))
    parser.add_argument("--backend", default="cuda")
    parser.add_argument("--nproc", type=int)
    parser.add_argument("--size", choices=sorted(SIZES))
    parser.add_argument("--skews", default="30,50,80,95")
    parser.add_argument("--minutes", type=float, default=9.0)
    args = parser.parse_args()
    world = args.nproc or torch.cuda.device_count()
    size = SIZES[args.size or ("full" if world >= 8 else "half")]
    args.out.mkdir(parents=True, exist_ok=True)
    deadline = time.perf_counter() + 60 * args.minutes
    job = Job(world, args.backend, size, args.out, deadline, tuple(args.skews.split(",")))
    report: dict[str, Any] = {"world": world, "date": time.strftime("%Y-%m-%d"), "size": args.size}
    for name in args.tables.split(","):
        start = time.perf_counter()
        try:
            rows = TABLES[name](job) if job.left() > 20 else [{"not_run": "no time left"}]
        except (RuntimeError, AssertionError, OSError, subprocess.TimeoutExpired, TimeoutError) as error:
            rows = [{"failed": str(error)[-800:]}]
        report[name] = {"seconds": time.perf_counter() - start, "rows": rows}
        show(f"{name} ({report[name]['seconds']:.0f} s)", rows)
        (args.out / "eight_gpus.json").write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
