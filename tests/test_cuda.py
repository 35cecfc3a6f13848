"""Every path of every variant on fake CUDA tensors: nothing mixes devices, nothing copies to or waits for the host."""

from argparse import Namespace
from collections.abc import Callable

import torch
from fake_cuda import pretend
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import bench
from model import MoR, MoRConfig

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

    def train(**options):
        model.train()
        with torch.enable_grad(), torch.autocast("cuda", dtype=torch.bfloat16):
            model(idx, idx, **options)
        model.eval()

    paths = {
        "train": train,
        "train, documents": lambda: train(segments=idx),
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


def test_no_path_mixes_devices_or_waits():
    faults = bench.run_in_fresh_process(walk_every_path, env={})
    walked = faults.pop("walked")
    routed = sum("router" in settings for settings in VARIANTS.values())
    assert walked == 8 * len(VARIANTS) + 2 * routed  # capacity warm-up and blocks only where there is a router
    assert faults == {}
