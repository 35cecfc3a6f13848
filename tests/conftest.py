"""Shared by all tests: models whose routing is decided clearly, golden vectors, and a clean compiler."""

import json
import signal
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import settings
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from model import MoR, MoRConfig  # noqa: E402

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # in a script's background, where programs under test would too
    signal.signal(signal.SIGINT, signal.default_int_handler)

settings.register_profile("nanomor", derandomize=True, deadline=None, database=None)
settings.load_profile("nanomor")

TINY = dict(vocab_size=61, block_size=48, n_layer=8, n_head=4, n_kv_head=2, d_model=32, d_ff=40)


def tiny(**overrides) -> MoRConfig:
    """A model of 8 unrolled layers (1 + 2x3 + 1 with three recursions) that a test runs in milliseconds."""
    return MoRConfig(**(TINY | overrides))


def make_model(config: MoRConfig, seed: int = 1) -> MoR:
    """A model with weights large enough that every part matters and routers decide far from their threshold."""
    model = MoR(config)
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=g)
            if p.dim() == 1:
                p.copy_(1 + 0.2 * noise)
            elif "router" in name:
                p.copy_(0.35 * noise)
            elif name == "wte.weight":
                p.copy_(noise)
            else:
                p.copy_(noise * p.size(1) ** -0.5)
        if config.router == "token" and config.balance == "bias":
            func = config.router_func or "softmax"
            model.balance_bias.copy_(
                torch.linspace(-0.2, 0.1, config.n_recursion) * (0.1 if func == "sigmoid" else 1.0)
            )
    return model


def make_batch(config: MoRConfig, B: int = 2, T: int = 20, seed: int = 1) -> tuple[Tensor, Tensor]:
    """idx and targets, int64 [B, T]; some targets are -100."""
    g = torch.Generator().manual_seed(seed)
    idx = torch.randint(config.vocab_size, (B, T), generator=g)
    targets = torch.randint(config.vocab_size, (B, T), generator=g)
    targets[:, ::7] = -100
    return idx, targets


def relative(a: Tensor, b: Tensor) -> float:
    """|a - b| / |b|."""
    return ((a.double() - b.double()).norm() / b.double().norm().clamp(min=1e-12)).item()


def load_golden(case: str) -> tuple[dict[str, Tensor], dict]:
    """Inputs, weights and outputs of the authors' code, and how they were made."""
    from safetensors import safe_open

    with safe_open(ROOT / "tests" / "data" / f"{case}.safetensors", "pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}, json.loads(file.metadata()["json"])  # noqa: SIM118


@pytest.fixture
def compiler():
    """torch._dynamo's counters, empty before the test; nothing compiled is left after it."""
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    yield counters
    torch._dynamo.config.error_on_recompile = False
    torch._dynamo.reset()
