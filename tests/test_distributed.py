"""train.py under torchrun on gloo: DDP and FSDP against one process, checkpoints between them, kills and restarts."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from conftest import ROOT
from test_train import flags, losses, write_data

import train

STEPS = 6


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("shards"))


def torchrun(processes, args, restarts=0):
    argv = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", processes, "--max-restarts", restarts]
    return [sys.executable, *map(str, argv), str(ROOT / "train.py"), *map(str, args)]


def run(processes, args, timeout=300, env=None):
    """-> CompletedProcess; one process is started without torchrun."""
    argv = torchrun(processes, args) if processes > 1 else [sys.executable, str(ROOT / "train.py"), *map(str, args)]
    env = os.environ | {"OMP_NUM_THREADS": "1"} | (env or {})
    return subprocess.run(argv, capture_output=True, text=True, timeout=timeout, env=env)


def evaluations(out):
    return [row for row in train.read_metrics(out) if "val_loss" in row]


def close(a, b, tolerance=1e-4):
    assert losses(a).keys() == losses(b).keys() and losses(a)
    assert losses(a) == pytest.approx(losses(b), abs=tolerance)
    for one, two in zip(evaluations(a), evaluations(b), strict=True):
        assert one["val_loss"] == pytest.approx(two["val_loss"], abs=tolerance)
        assert one["selected"] == pytest.approx(two["selected"], abs=5e-3)
        assert one["agreement"] == pytest.approx(two["agreement"], abs=5e-3)


def config_of(steps):
    return ["--steps", steps, "--eval-every", 3, "--eval-tokens", 368, "--batch-tokens", 128, "--micro-batch", 1]


@pytest.fixture(scope="session")
def alone(data, tmp_path_factory):
    out = tmp_path_factory.mktemp("alone")
    train.main([str(a) for a in flags(data, out, *config_of(STEPS))])
    return out


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_two_processes_are_one(data, tmp_path, alone, parallel):
    """Losses, evaluations (23 blocks: not a multiple of 2) and metrics; then the checkpoint of half of it, continued by
    one process, and by the other kind of parallelism."""
    args = [*flags(data, tmp_path, *config_of(STEPS)), "--parallel", parallel, "--keep", 9]
    done = run(2, args)
    assert done.returncode == 0, done.stderr
    close(tmp_path, alone)
    assert done.stdout.count(f"/{STEPS}  loss") == STEPS  # one log, not two
    half = tmp_path / "ckpt_000003.pt"
    single = flags(data, tmp_path / "single", *config_of(STEPS), "--resume", half)
    train.main([str(a) for a in single])
    assert losses(tmp_path / "single") == pytest.approx({s: v for s, v in losses(alone).items() if s > 3}, abs=1e-4)
    other = "ddp" if parallel == "fsdp" else "fsdp"
    args = flags(data, tmp_path / "other", *config_of(STEPS), "--resume", half, "--parallel", other)
    assert run(2, args).returncode == 0
    close(tmp_path / "other", tmp_path / "single")


def test_mistakes_end_every_process(data, tmp_path):
    """One line of ours and no hang, before and after the processes have met."""
    cases = {
        "--steps 0 must be at least 1": ["--steps", 0],
        "cannot share": ["--batch-tokens", 48],
        "ids beyond the vocabulary": ["--data", write_data(tmp_path / "ids", vocab_size=39)],
        "every checkpoint in": ["--out", tmp_path / "damaged"],
    }
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "ckpt_000001.pt").write_bytes(b"no")
    for message, more in cases.items():
        done = run(2, [*flags(data, tmp_path / "run"), *more], timeout=120)
        ours = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
        assert done.returncode != 0 and len(ours) == 1 and message in ours[0], done.stderr
        assert "exitcode  : 2" in done.stderr and "line " not in done.stderr.split("error: ")[0]


def finish(data, out, steps, delay, rng, restarts=9):
    """Runs under torchrun with restarts; after `delay` seconds kill -9s one worker, or the whole job."""
    args = [*flags(data, out, *config_of(steps)), "--save-every", 1]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    argv = torchrun(2, args, restarts)
    job = subprocess.Popen(
        argv, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env, start_new_session=True
    )
    if delay is not None:
        deadline = time.monotonic() + 120
        while not list(out.glob("ckpt_*")) and job.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(delay)
        whole = rng.random() < 0.5
        workers = subprocess.run(["pgrep", "-P", str(job.pid)], capture_output=True, text=True).stdout.split()
        for pid in [*(workers if whole else workers[:1]), *([job.pid] if whole else [])]:
            try:
                os.kill(int(pid), signal.SIGKILL)
            except ProcessLookupError:
                pass
    output = job.communicate(timeout=600)[0]
    return job.returncode, output


def kill_trials(data, tmp_path, alone, trials, seed):
    rng = np.random.default_rng(seed)
    for trial in range(trials):
        out = tmp_path / str(trial)
        code, output = finish(data, out, STEPS, float(rng.uniform(0, 0.4)), rng)
        for path in out.glob("ckpt_*.pt"):
            train.read_checkpoint(path)
        if code != 0:  # the whole job was killed
            code, output = finish(data, out, STEPS, None, rng)
        assert code == 0, output
        close(out, alone)


def test_killed_worker_or_job_continues(data, tmp_path, alone):
    kill_trials(data, tmp_path, alone, 1, seed=0)


@pytest.mark.soak
def test_twenty_killed_jobs(data, tmp_path, alone):
    kill_trials(data, tmp_path, alone, 20, seed=None)


@pytest.mark.soak
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_1_2_4_processes_compiled(data, tmp_path, parallel):
    """30 steps. Compiled, so a recompile after the first step would raise."""
    args = [a for a in flags(data, "OUT", *config_of(30)) if a != "--no-compile"]
    for processes in (1, 2, 4):
        out = tmp_path / str(processes)
        more = ["--out", out, "--parallel", parallel if processes > 1 else "ddp"]
        done = run(processes, [*args, *more], timeout=1500)
        assert done.returncode == 0, done.stderr
    for processes in (2, 4):
        close(tmp_path / str(processes), tmp_path / "1")
        a, b = losses(tmp_path / str(processes)), losses(tmp_path / "1")
        print(parallel, processes, "largest difference", max(abs(a[s] - b[s]) for s in a))


def gathers(rank: int, path: str, port: int) -> None:
    """Counts the collectives of one FSDP step, two micro-batches, of a model with three recursions."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", rank=rank, world_size=2)
    world = train.World(torch.device("cpu"), rank, 2, rank)
    config = train.MoRConfig.preset("nano", n_recursion=3, router="expert", d_model=32, d_ff=48, vocab_size=50)
    wrapped = train.parallelise(train.MoR(config), train.TrainConfig(parallel="fsdp", compile=False), world)
    idx = torch.arange(32).view(2, 16)
    with torch.profiler.profile() as profile:
        for last in (False, True):
            train.sync_gradients(wrapped, last)
            wrapped(idx, idx).loss.backward()
    if rank == 0:
        Path(path).write_text(json.dumps({e.key: e.count for e in profile.key_averages() if e.key.startswith("c10d")}))
    dist.destroy_process_group()


def test_fsdp_gathers_the_shared_block_once_per_step(tmp_path):
    port = 29500 + os.getpid() % 2000
    torch.multiprocessing.spawn(gathers, (str(tmp_path / "counts"), port), nprocs=2)
    counts = json.loads((tmp_path / "counts").read_text())
    # The root group (embedding, block, routers, norm) is gathered and reduced once per step. First and last layer are
    # given back after each of the two forward passes, and kept once a backward pass has begun.
    assert counts == {"c10d::_allgather_base_": 1 + 2 * 3, "c10d::_reduce_scatter_base_": 3}
