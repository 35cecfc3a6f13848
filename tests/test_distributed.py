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
from test_train import losses, uptrain, write_data, write_llama

import checkpoint
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


@pytest.fixture(scope="session")
def llama(tmp_path_factory):
    return write_llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="session")
def flags(data, llama):
    """The command line of all runs here: uptraining, as that is the most that processes must agree on."""

    def make(out, *more, steps=STEPS, compile=False):
        model = ["--n-recursion", 3, "--router", "expert"]
        evaluation = ["--eval-every", 3, "--eval-tokens", 368]
        batch = ["--steps", steps, "--batch-tokens", 128, "--micro-batch", 1]
        args = uptrain(data, out, llama, *model, *evaluation, *batch, *more)
        return [a for a in args if not (compile and a == "--no-compile")]

    return make


@pytest.fixture(scope="session")
def alone(flags, tmp_path_factory):
    out = tmp_path_factory.mktemp("alone")
    train.main(flags(out))
    return out


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_two_processes_are_one(flags, tmp_path, alone, parallel):
    """Losses, evaluations (23 blocks: not a multiple of 2) and metrics; then the checkpoint of half of it, continued by
    one process, and by the other kind of parallelism."""
    done = run(2, flags(tmp_path, "--parallel", parallel, "--keep", 9))
    assert done.returncode == 0, done.stderr
    close(tmp_path, alone)
    assert done.stdout.count(f"/{STEPS}  loss") == STEPS  # one log, not two
    half = ("--resume", tmp_path / "ckpt_000003.pt")
    train.main(flags(tmp_path / "single", *half))
    assert losses(tmp_path / "single") == pytest.approx({s: v for s, v in losses(alone).items() if s > 3}, abs=1e-4)
    other = "ddp" if parallel == "fsdp" else "fsdp"
    done = run(2, flags(tmp_path / "other", *half, "--parallel", other))
    assert done.returncode == 0, done.stderr
    close(tmp_path / "other", tmp_path / "single")


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_two_processes_with_muon_are_one(flags, tmp_path, parallel):
    """fsdp has only parts of the matrices; then one process goes on from the half of it, exactly where one would be."""
    muon = ("--optimizer", "muon", "--keep", 9)
    train.main(flags(tmp_path / "alone", *muon))
    done = run(2, flags(tmp_path / "two", *muon, "--parallel", parallel))
    assert done.returncode == 0, done.stderr
    close(tmp_path / "two", tmp_path / "alone")
    train.main(flags(tmp_path / "single", *muon, "--resume", tmp_path / "two" / "ckpt_000003.pt"))
    late = {s: v for s, v in losses(tmp_path / "alone").items() if s > 3}
    assert losses(tmp_path / "single") == pytest.approx(late, abs=1e-4)


def test_the_line_for_eight_gpus_starts(tmp_path):
    """torchrun --nproc_per_node=8 train.py --preset 360M, up to the plan: its batch can be shared by eight."""
    data = write_data(tmp_path / "data", train_tokens=2_200_000, val_tokens=3000)
    done = run(8, ["--preset", "360M", "--data", data, "--out", tmp_path / "run", "--dry-run"], timeout=600)
    assert done.returncode == 0, done.stderr
    assert "9438 steps of 2097152 tokens" in done.stdout
    assert "128 sequences per step and process" in done.stdout and not (tmp_path / "run").exists()


def test_restarts_do_not_meet_the_dead(monkeypatch, capsys):
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")
    monkeypatch.setenv("GROUP_WORLD_SIZE", "1")
    server = dist.TCPStore("127.0.0.1", 0, is_master=True)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(server.port))
    for attempt in ("0", "1"):
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", attempt)
        store = train.meeting_place()
        assert not store.check(["address"])
        store.set("address", attempt)
    monkeypatch.setenv("GROUP_WORLD_SIZE", "2")
    with pytest.raises(SystemExit):
        train.meeting_place()
    assert "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1" in capsys.readouterr().err
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "False")
    assert train.meeting_place() is None


def test_mistakes_end_every_process(flags, tmp_path):
    """One line of ours and no hang, before and after the processes have met."""
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "ckpt_000001.pt").write_bytes(b"no")
    small = write_llama(tmp_path / "small", vocab_size=30)
    cases = {
        "a vocabulary of 30 is below": flags(tmp_path / "run", "--init-from", small),
        "every checkpoint in": flags(tmp_path / "damaged"),
    }
    for message, args in cases.items():
        done = run(2, args, timeout=120)
        ours = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
        assert done.returncode != 0 and len(ours) == 1 and message in ours[0], done.stderr
        assert "exitcode  : 2" in done.stderr and "line " not in done.stderr.split("error: ")[0]


def finish(args, out, delay, rng, restarts=1):
    """Runs under torchrun with one restart; after `delay` seconds kill -9s one worker, or the whole job."""
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


def kill_trials(flags, tmp_path, alone, trials, seed):
    rng = np.random.default_rng(seed)
    for trial in range(trials):
        out = tmp_path / str(trial)
        args = flags(out, "--save-every", 1)
        code, output = finish(args, out, float(rng.uniform(0, 0.4)), rng)
        for path in out.glob("ckpt_*.pt"):
            checkpoint.read_checkpoint(path)
        if code != 0:  # the whole job was killed
            code, output = finish(args, out, None, rng)
        assert code == 0, output
        close(out, alone)


def test_killed_worker_or_job_continues(flags, tmp_path, alone):
    kill_trials(flags, tmp_path, alone, 1, seed=0)


def test_processes_on_gpus_join_by_nccl(monkeypatch):
    """By stand-ins: each process takes its own GPU; tensors there travel by nccl, those in host memory by gloo."""
    calls = []
    for rank, name in ((3, "RANK"), (4, "WORLD_SIZE"), (1, "LOCAL_RANK")):
        monkeypatch.setenv(name, str(rank))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda i: calls.append(("set_device", i)))
    monkeypatch.setattr(torch, "set_float32_matmul_precision", lambda p: calls.append(("precision", p)))
    monkeypatch.setattr(dist, "init_process_group", lambda *args, **kwargs: calls.append((*args, kwargs)))
    world = train.join_world(train.TrainConfig(data="data", out="out"))
    joined = ("cpu:gloo,cuda:nccl", dict(store=None, rank=3, world_size=4))
    assert calls == [("set_device", 1), ("precision", "high"), joined]
    assert (world.device, world.rank, world.size) == (torch.device("cuda", 1), 3, 4)


@pytest.mark.soak
def test_twenty_killed_jobs(flags, tmp_path, alone):
    kill_trials(flags, tmp_path, alone, 20, seed=None)


@pytest.mark.soak
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_1_2_4_processes_compiled(flags, tmp_path, parallel):
    """30 steps. Compiled, so a recompile after the first step would raise."""
    for processes in (1, 2, 4):
        more = ["--parallel", parallel if processes > 1 else "ddp"]
        done = run(processes, flags(tmp_path / str(processes), *more, steps=30, compile=True), timeout=1500)
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
