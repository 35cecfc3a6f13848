"""What is CUDA's alone, without a GPU.

Every path of every variant on fake CUDA tensors: nothing mixes devices, nothing copies to or waits for the host. What
decoding asks of its attention kernel, by a stand-in that looks at the values. CUDA graphs, by a stand-in that plays
operations back on the memory that they were recorded with."""

import re
from argparse import Namespace
from collections import Counter
from collections.abc import Callable

import pytest
import torch
from conftest import make_batch, make_model, tiny
from fake_cuda import Graph, build_guard, pretend, replace_graphs, write_code
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import bench
import ops
from engine import Engine
from generate import Decoder, Graphs, generate
from model import MoR, MoRConfig

# ---- every path, on fake tensors

SIZE = dict(vocab_size=512, block_size=192, n_layer=8, n_head=4, n_kv_head=2, d_model=64, d_ff=96)
VARIANTS = {
    "vanilla": {},
    "recursive": dict(n_recursion=3),
    "expert": dict(n_recursion=3, router="expert"),
    "expert, aux router": dict(n_recursion=3, router="expert", causality="aux_router"),
    "expert, share": dict(n_recursion=3, router="expert", kv="share"),
    "token": dict(n_recursion=3, router="token"),
    "token, bias": dict(n_recursion=3, router="token", balance="bias"),
    "token, share": dict(n_recursion=3, router="token", kv="share"),
    "random": dict(n_recursion=3, router="random"),
    "position, share": dict(n_recursion=3, router="position", kv="share"),
}


class Watch(TorchDispatchMode):
    """Notes operators whose tensors are on several devices: copies, and mixtures.

    What waits for a value (item, nonzero, a boolean index) raises by itself, as a fake tensor has no values."""

    def __init__(self):
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        out = op(*args, **(kwargs or {}))
        tensors = [t for t in tree_leaves((args, kwargs, out)) if isinstance(t, Tensor)]
        if len({t.device.type for t in tensors}) > 1:
            self.found.append(str(op))
        return out


def find_faults(function: Callable) -> list[str]:
    """Returns what a call of function() does that it should not."""
    with Watch() as watch:
        try:
            function()
        except Exception as e:  # whatever it is, it is the finding
            watch.found.append(f"{type(e).__name__}: {str(e).splitlines()[0]}")
    return watch.found


def list_paths(config: MoRConfig) -> dict[str, Callable]:
    """Returns a call for each path through the model, by name."""
    model = MoR(config)
    idx = torch.zeros(2, 128, dtype=torch.long)
    lengths = torch.zeros(2, dtype=torch.long)
    cache = model.make_cache(2, 160)

    def train(checkpoint_recursions: bool = False, **options):
        model.train()
        model.checkpoint_recursions = checkpoint_recursions
        with torch.enable_grad():
            with torch.autocast("cuda", dtype=torch.bfloat16):
                loss = model(idx, idx, **options).loss
            loss.backward()
        without = [name for name, p in model.named_parameters() if p.grad is None and "router" not in name]
        assert not without, f"no gradient for {without}"
        model.zero_grad()
        model.eval()

    paths = {
        "train": train,
        "train, documents": lambda: train(segments=idx),
        "train, recomputed": lambda: train(checkpoint_recursions=True),
        "causal": lambda: model.eval()(idx, routing="causal"),
        "prefill": lambda: model.prefill(idx, lengths, cache),
        "tight prefill": lambda: model.prefill(idx, lengths, cache, tight=True),
        "decode": lambda: model.decode(lengths, cache),
    }
    if config.router != "none":
        capacity = torch.ones(config.n_recursion)
        paths["train, capacity warm-up"] = lambda: train(capacity=capacity)
    return paths


def list_stages(config: MoRConfig) -> dict[str, Callable]:
    """Returns a call for each stage that serving compiles, by name."""
    args = Namespace(dtype="bf16", width=4, stages=["turn", "turn, top-k", "block"])
    stages = bench.list_stages(config, args)
    return {name: lambda function=function, rest=rest: function(*rest) for name, (function, *rest) in stages.items()}


def walk_every_path() -> dict[str, list[str]]:
    """Returns the faults by variant and path, of those that have any, and how many paths were walked."""
    faults = {}
    walked = 0
    with pretend():
        for variant, settings in VARIANTS.items():
            config = MoRConfig(**SIZE, **settings)
            for name, path in {**list_paths(config), **list_stages(config)}.items():
                walked += 1
                if found := find_faults(path):
                    faults[f"{variant}: {name}"] = found
    return faults | {"walked": walked}


def find_known_faults() -> dict[str, list[str]]:
    """Returns what is found in calls that each have one fault, and in one that has none."""
    with pretend():
        x = torch.zeros(4)
        calls = {
            "none": lambda: x + 1,
            "copy": lambda: x.cpu(),
            "upload": lambda: torch.zeros(4, device="cpu").to("cuda"),
            "value": lambda: x.sum().item(),
            "mask": lambda: x[x > 0],
            "mixture": lambda: x + torch.zeros(4, device="cpu"),
        }
        return {name: find_faults(call) for name, call in calls.items()}


def test_faults_are_found():
    found = bench.run_in_fresh_process(find_known_faults, env={})
    assert found.pop("none") == []
    assert all(found.values()), found


def test_no_path_mixes_devices_or_waits(tmp_path):
    faults = bench.run_in_fresh_process(walk_every_path, env={"LD_PRELOAD": str(build_guard(tmp_path))})
    walked = faults.pop("walked")
    routed = sum("router" in settings for settings in VARIANTS.values())
    assert walked == 9 * len(VARIANTS) + 2 * routed  # capacity warm-up and blocks only where there is a router
    assert faults == {}


# ---- attention to a cache: what is compiled, and what is asked of the kernel


def write_serving_code() -> dict[str, str]:
    """Returns what is compiled for an H100 of a turn and of a block, 24 tokens a row."""
    config = MoRConfig(**SIZE | dict(n_layer=5, block_size=24), n_recursion=3, router="expert")
    args = Namespace(dtype="bf16", width=4, stages=["turn", "block"])
    with pretend():
        return {name: write_code(*stage) for name, stage in bench.list_stages(config, args).items()}


def test_windows_are_read_where_they_lie():
    pytest.importorskip("triton")
    code = bench.run_in_fresh_process(write_serving_code, env={})
    for name, layers in (("turn", 3), ("block", 1)):
        body = code[name][code[name].index("def call(") :]
        calls = re.findall(r"decode_parts\.default\((.*)\)", body)
        views = [re.findall(r"reinterpret_tensor\(arg\d+_1, \(\d+, (\d+), 2, 16\)", call) for call in calls]
        assert len(calls) == layers
        assert set(map(tuple, views)) == ({("24", "24")} if name == "turn" else {("16", "16")})  # of graph inputs


SMALL = {
    "vanilla": dict(n_layer=3),
    "expert": dict(n_layer=5, n_recursion=3, router="expert"),
    "expert-aux-share": dict(n_layer=5, n_recursion=3, router="expert", causality="aux_router", kv="share"),
    "token": dict(n_layer=5, n_recursion=3, router="token"),
    "token-share": dict(n_layer=5, n_recursion=3, router="token", kv="share"),
}
MAX_LEN = 40


def model_of(name: str) -> MoR:
    return make_model(tiny(**SMALL[name])).eval()


@pytest.fixture
def calls(monkeypatch) -> list[tuple]:
    """Lets ops.decode_parts stand in for attention to a cache, in loops, and returns what it is asked: window and
    length of each row, and the number of parts, by call. It demands of its arguments what the kernel relies on."""
    calls = []

    def decode_parts(q, k, v, index, length, splits):
        B, one, H, E = q.shape
        windows, C, G, _ = k.shape
        row = list(range(B)) if index is None else index.tolist()
        assert one == 1 and k.shape == v.shape and k.size(3) == E and H % G == 0 and q.dtype == k.dtype == v.dtype
        assert q.stride(3) == k.stride(3) == v.stride(3) == 1 and k.stride() == v.stride()
        assert length.shape == (B,) and len(row) == B and splits >= 1
        assert length.is_contiguous() and (index is None or index.is_contiguous())
        assert all(1 <= n <= C for n in length.tolist()) and all(0 <= window < windows for window in row)
        end = k.storage_offset() + (windows - 1) * k.stride(0) + C * k.stride(1)
        assert end <= k.untyped_storage().size() // k.itemsize  # no window leaves the buffer
        calls.append((row, length.tolist(), splits))

        out = torch.zeros(B, splits, H, E, dtype=torch.float32)
        lse = torch.full((B, splits, H), -torch.inf)
        for b in range(B):
            n = int(length[b])
            each = -(-n // splits)
            for part in range(splits):
                at = slice(part * each, min(n, (part + 1) * each))
                for h in range(H if at.start < at.stop else 0):
                    keys, values = k[row[b], at, h // (H // G)], v[row[b], at, h // (H // G)]
                    score = (keys @ q[b, 0, h]) * E**-0.5
                    out[b, part, h] = score.softmax(0) @ values
                    lse[b, part, h] = score.logsumexp(0)
        return out, lse

    monkeypatch.setattr(ops, "decode_parts", decode_parts)
    monkeypatch.setattr(ops, "use_decode_kernel", lambda q: True)
    return calls


@pytest.mark.parametrize("name", ["vanilla", "expert", "token-share"])
def test_decoding_asks_the_kernel_for_the_slots_of_each_row(name, calls, monkeypatch):
    """Every layer of every recursion, with the rows' own lengths; one of three rows is idle; the same logits."""
    model = model_of(name)
    c = model.config
    idx, _ = make_batch(c, B=3)
    lengths = torch.tensor([5, 12, 1])
    cache, plain = model.make_cache(3, 20), model.make_cache(3, 20)
    for step in range(4):
        token = idx[:, 12 + step].clone()
        token[2] = -1 if step == 3 else token[2]
        if step == 0:
            model.prefill(idx[:, :12], lengths, cache)
            model.prefill(idx[:, :12], lengths, plain)
        logits = model.decode(token, cache)
        if step == 3 and name == "expert":  # the last recursion attends to the tokens that ran it
            assert calls[-2][1] == [max(1, n) for n in cache.fill[-1].tolist()]
        with monkeypatch.context() as patch:
            patch.setattr(ops, "use_decode_kernel", lambda q: False)
            expected = model.decode(token, plain)
        torch.testing.assert_close(logits[token >= 0], expected[token >= 0], atol=1e-4, rtol=0)
    assert len(calls) == 4 * c.n_layer  # every recursion is computed, and masked
    assert calls[0] == ([0, 1, 2], [6, 13, 2], 1) and calls[-1] == ([0, 1, 2], [9, 16, 4], 1)


@pytest.mark.parametrize("slack", [1.25, 0.6])  # 0.6: windows are filled to the last slot
@pytest.mark.parametrize("name", ["vanilla", "expert", "expert-aux-share"])
def test_serving_asks_the_kernel_for_windows_where_they_lie(name, slack, calls, monkeypatch):
    model = model_of(name)
    options = dict(slots=3, width=2, max_len=MAX_LEN, slack=slack, compile=False)
    results = []
    for stands_in in (True, False):
        monkeypatch.setattr(ops, "use_decode_kernel", lambda q, stands_in=stands_in: stands_in)
        engine = Engine(model, **options)
        requests = [engine.submit([7, 3 + i][: 1 + i % 2], 4 + 8 * i) for i in range(4)]
        engine.run()
        results.append([(r.tokens, r.depth, r.overflow) for r in requests])
    assert results[0] == results[1]
    assert (slack == 0.6 and "share" not in name) == any(overflow for _, _, overflow in results[0])

    # a lane's window begins at its row, and there at its recursion's first slot
    cache = engine.cache
    begins = {row * MAX_LEN for row in range(cache.batch)}
    begins |= {row * sum(cache.slots) + start for row in range(cache.batch) for start in cache.start}
    assert {window for row, _, _ in calls for window in row} <= begins
    assert len({n for _, length, _ in calls for n in length}) > 15  # rows at many depths


def test_few_rows_split_their_windows_and_many_do_not(calls):
    q, k = torch.randn(1, 1, 4, 8), torch.randn(1, 1000, 2, 8)
    for rows in (1, 30, 64):
        length = torch.tensor([1000, 1, 999]).repeat(22)[:rows]
        q, k = q[:1].expand(rows, -1, -1, -1), k[:1].expand(rows, -1, -1, -1)
        y = ops.attend_cache(q, k, k, None, length)
        mask = (torch.arange(1000) < length[:, None])[:, None, None]
        torch.testing.assert_close(y, ops.attend(q, k, k, mask), atol=1e-5, rtol=1e-5)
    assert [splits for _, _, splits in calls] == [4, 2, 1]


# ---- CUDA graphs, by a stand-in


@pytest.fixture
def cuda_graphs(monkeypatch) -> list[Graph]:
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    return replace_graphs(monkeypatch)


class Counted(Graphs):
    """Graphs on "CUDA" that count their calls by key."""

    def __init__(self, compile: bool = True):
        super().__init__(compile, False, torch.device("cuda"))
        self.calls = Counter()

    def run(self, key: tuple, function: Callable, *args):
        self.calls[key] += 1
        return super().run(key, function, *args)

    def expect(self, *unrecorded: str) -> list[int]:
        """Returns how often each graph should have been played: all calls but the first, which compiles."""
        return sorted(n - 1 for key, n in self.calls.items() if n > 1 and key[0] not in unrecorded)


@pytest.mark.parametrize("compile", [True, False])
@pytest.mark.parametrize("early_exit", [True, False])
@pytest.mark.parametrize("name", ["vanilla", "expert", "token", "token-share"])
def test_decoding_on_cuda_plays_everything_back(cuda_graphs, name, early_exit, compile):
    """Prefill, steps, and stages that hand over State and Pass; compiled or not; the same tokens and depths."""
    model = model_of(name)
    prompts, others = [[1, 2, 3], [4], [5] * 20], [[9] * 11, [3, 2]]
    decoder = Decoder(model, 3, MAX_LEN, slack=4, compile=False, early_exit=early_exit)
    decoder.graphs = Counted(compile)
    for batch, options in ((prompts, {}), (others, {}), (prompts, dict(temperature=1.0, seed=7)), (others, {})):
        ours = generate(model, batch, 12, decoder=decoder, **options)
        assert ours[:3] == generate(model, batch, 12, slack=4, compile=False, early_exit=False, **options)[:3]
    assert sorted(graph.replays for graph in cuda_graphs) == decoder.graphs.expect()
    stages = {key[0] for key in decoder.graphs.calls}
    assert stages == {"prefill", *(["enter", "recurse", "turn"] if decoder.early_exit else ["step"])}
    assert all(graph.options["stream"] == "stream of cpu" for graph in cuda_graphs)
    assert all(graph.options["capture_error_mode"] == "thread_local" for graph in cuda_graphs)


@pytest.mark.parametrize("name", ["vanilla", "expert", "expert-aux-share", "token"])
def test_serving_on_cuda_plays_back_a_graph_per_stage(cuda_graphs, name):
    model = model_of(name)
    options = dict(slots=7, width=4, max_len=MAX_LEN, turn_width=3, slack=0.6, compile=False)
    results = []
    for graphs in (Counted(), None):
        engine = Engine(model, **options)
        engine.graphs = graphs or engine.graphs
        requests = [engine.submit([7, 3 + i, 9][: 1 + i % 3], 4 + i) for i in range(12)]
        engine.run()
        results.append([(r.tokens, r.depth, r.overflow) for r in requests])
        if graphs is not None:
            played = graphs.expect("prefill")  # whose cache is another one for each seat
    assert results[0] == results[1]
    assert sorted(graph.replays for graph in cuda_graphs) == played


@torch.no_grad()
def test_a_graph_of_one_cache_is_not_played_for_another(cuda_graphs):
    model = model_of("expert")
    idx, lengths = torch.tensor([[1, 2, 3, 4]]), torch.tensor([4])
    graphs = Counted()
    run = lambda cache: graphs.run(("prefill",), lambda i, n, c: model.prefill(i, n, c), idx, lengths, cache)  # noqa: E731
    mine, other = model.make_cache(1, MAX_LEN), model.make_cache(1, MAX_LEN)
    first = run(mine)
    assert torch.equal(run(mine), first) and cuda_graphs[0].replays == 1
    assert torch.equal(run(other), first) and cuda_graphs[0].replays == 1
    assert torch.equal(other.k[1], mine.k[1]) and other.position.tolist() == [4]


@torch.no_grad()
@pytest.mark.parametrize("fault", ["reads what is gone", "waits for the host"])
def test_the_stand_in_finds_what_a_graph_cannot_hold(cuda_graphs, fault):
    owned = [torch.ones(2)]

    def function(x: Tensor) -> Tensor:
        if fault == "waits for the host":
            return x * x.sum().item()
        return x + owned[0]

    graphs = Counted()
    graphs.run(("f",), function, torch.ones(2))
    with pytest.raises(AssertionError, match="is gone|host sync"):
        graphs.run(("f",), function, torch.ones(2))
        owned.clear()
        graphs.run(("f",), function, torch.ones(2))
