"""Makes torch.compile write the code of an H100 on a machine without a GPU, so that launches can be counted anywhere.

    with pretend():                               # in a process of its own: torch.cuda is mocked for good
        count_launches(function, *arguments)      # fake tensors on "cuda"; nothing is computed

Tensors are torch's FakeTensors, which have a shape and a device but no memory. Inductor sees the properties of an H100,
writes its Triton kernels and the Python that launches them, and is stopped before it would load either. Needs a C++
compiler and, for counting, the package triton, which CPU builds of torch do not bring.
"""

import ctypes
import os
import re
import subprocess
import tempfile
import warnings
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace

import torch
import torch._dynamo.device_interface
import torch._functorch.config
import torch._inductor.config
import torch._inductor.fx_passes.joint_graph
import torch.nn.functional as F
from torch import Tensor
from torch._inductor.graph import GraphLowering
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

H100 = SimpleNamespace(
    name="NVIDIA H100 80GB HBM3",
    major=9,
    minor=0,
    multi_processor_count=132,
    total_memory=80 * 2**30,
    warp_size=32,
    regs_per_multiprocessor=65536,
    max_threads_per_multi_processor=2048,
    max_threads_per_block=1024,
    shared_memory_per_block=49152,
    shared_memory_per_block_optin=232448,
    shared_memory_per_multiprocessor=233472,
    L2_cache_size=50 * 2**20,
    gcnArchName="",
)
# Without a guard for it, torch refuses every operator on "cuda", and without hooks the backward pass. These do nothing.
GUARD = """
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

struct Guard final : c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::CUDA> {
  c10::Stream getStream(c10::Device) const noexcept override {
    return c10::Stream(c10::Stream::DEFAULT, c10::Device(c10::DeviceType::CUDA, 0));
  }
};
C10_REGISTER_GUARD_IMPL(CUDA, Guard)

namespace at {
struct Hooks : CUDAHooksInterface {
  Hooks(CUDAHooksArgs) {}
  bool hasCUDA() const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return false; }
  DeviceIndex deviceCount() const override { return 1; }
};
C10_REGISTER_CLASS(CUDAHooksRegistry, CUDAHooks, Hooks)
}
"""


class Written(Exception):
    """Stops Inductor when it has written its code."""

    def __init__(self, code: str):
        super().__init__("the code is written")
        self.code = code


def build_guard(directory: str | Path) -> Path:
    """Compiles the device guard and the hooks, and returns the library. Torch asks for hooks once, when it is imported:
    a process that is to run a backward pass must have the library in LD_PRELOAD."""
    lib = Path(torch.__file__).parent / "lib"
    source = Path(directory, "guard.cpp")
    library = Path(directory, "guard.so")
    source.write_text(GUARD)
    flags = ["-shared", "-fPIC", "-std=c++20", f"-I{lib.parent / 'include'}"]
    flags += [f"-L{lib}", "-lc10", "-ltorch_cpu", f"-Wl,-rpath,{lib}"]
    subprocess.run([os.environ.get("CXX", "c++"), source, "-o", library, *flags], check=True)
    return library


def load_guard() -> None:
    """Compiles and loads the device guard, unless it is there."""
    if "guard.so" not in os.environ.get("LD_PRELOAD", ""):
        with tempfile.TemporaryDirectory() as directory:
            ctypes.CDLL(str(build_guard(directory)))


def mock_device() -> None:
    """Answers what torch, Dynamo and Inductor ask about the device."""
    interface = torch._dynamo.device_interface.CudaInterface
    for place in (torch.cuda, interface, interface.Worker):
        place.is_available = staticmethod(lambda: True)
        place.device_count = staticmethod(lambda: 1)
        place.current_device = staticmethod(lambda: 0)
        place.get_device_properties = staticmethod(lambda device=None: H100)
        place.device = staticmethod(lambda index: nullcontext())
    torch.version.cuda = "13.0"
    torch.cuda.get_device_capability = lambda device=None: (9, 0)
    interface.get_compute_capability = staticmethod(lambda device=None: 90)
    torch.cuda.is_initialized = lambda: True
    torch.cuda._lazy_init = lambda: None
    torch.cuda.get_rng_state = lambda *args: torch.zeros(16, dtype=torch.uint8)
    torch.cuda.set_rng_state = lambda *args: None
    for name in ("getDevice", "setDevice", "exchangeDevice", "maybeExchangeDevice", "getCurrentRawStream"):
        setattr(torch._C, f"_cuda_{name}", lambda *args: 0)


def mock_compiler() -> None:
    """Lets Inductor write code for the device that is not there, and stops it then."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    target = GPUTarget("cuda", 90, 32)
    driver.set_active(SimpleNamespace(get_current_target=lambda: target, get_current_device=lambda: 0))

    def stop(graph, code):
        raise Written(code.value)

    GraphLowering._compile_to_module_lines = stop
    warnings.simplefilter("ignore")  # they give advice to those who would run it
    # these passes run or time small graphs on the device
    torch._inductor.fx_passes.joint_graph.lazy_init = lambda *args: None
    torch._inductor.config.joint_graph_constant_folding = False
    torch._inductor.config.shape_padding = False
    # nor may code come from the cache on disk: then none would be written
    torch._inductor.config.fx_graph_cache = False
    torch._functorch.config.enable_autograd_cache = False
    torch._inductor.config.compile_threads = 1


def attend(q, k, v, mask=None, dropout=0.0, is_causal=False, scale=None, enable_gqa=False):
    """Returns scaled_dot_product_attention by the back-end that an H100 takes: FlashAttention, or with a mask cuDNN. A
    build without CUDA would take it apart into products."""
    if mask is None:
        return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, dropout, is_causal, scale=scale)[0]
    return torch.ops.aten._scaled_dot_product_cudnn_attention(q, k, v, mask, False, dropout, is_causal, scale=scale)[0]


@contextmanager
def pretend() -> Iterator[None]:
    """Makes tensors fake, and on "cuda" unless told otherwise. There is no way back: use a process of its own."""
    if not torch.backends.cuda.is_built():
        load_guard()
    mock_device()
    F.scaled_dot_product_attention = attend
    FakeTensorMode.avoid_device_init = True  # it never asks for the device, although that says that it is there
    with FakeTensorMode(allow_non_fake_inputs=True), torch.device("cuda"), torch.no_grad():
        yield


def write_code(function: Callable, *args) -> str:
    """Returns the Python that Inductor writes for function(*args): kernels, and `call`, which launches them."""
    mock_compiler()
    torch._dynamo.reset()
    # every index is clamped or was checked on the host, as generate.py says
    options = {"assert_indirect_indexing": False, "split_reductions": False}  # as Graphs has them
    try:
        torch.compile(function, fullgraph=True, dynamic=False, options=options)(*args)
    except torch._dynamo.exc.BackendCompilerFailed as e:
        if not isinstance(e.inner_exception, Written):
            raise
        return e.inner_exception.code
    raise AssertionError("nothing was compiled")


def count_launches(function: Callable, *args) -> Counter:
    """Returns how many kernels function(*args) launches: "triton", "matmul" and "other" (attention, sorts)."""
    code = write_code(function, *args)
    body = code[code.index("def call(") :]
    body = re.sub(r"#.*", "", body)
    found = Counter()
    for line in body.splitlines():
        if re.match(r"\s*triton_\w+\.run\(", line):
            found["triton"] += 1
        elif re.search(r"\bextern_kernels\.\w+\(", line):
            found["matmul"] += 1
        elif re.search(r"\btorch\.ops\.[\w.]+\(", line):
            found["other"] += 1
    return found


# ----------------------------------------------------------------------------------------------------------------------
# CUDA graphs, of real tensors on CPUs


class Outside:
    """A tensor that a graph reads and did not make. Whoever owns it must keep it, or its memory is soon another's."""

    def __init__(self, tensor: Tensor):
        self.tensor = weakref.ref(tensor)

    def find(self) -> Tensor:
        tensor = self.tensor()
        assert tensor is not None, "a graph reads a tensor that is gone"
        return tensor


class Recording(TorchDispatchMode):
    """torch.cuda.graph(graph) on tensors of any device: operations are noted for graph.replay(), and what they write is
    undone. What a CUDA graph cannot hold, reading a number or sending one, is an error."""

    def __init__(self, graph: "Graph", **options):
        super().__init__()
        graph.options = options
        self.graph = graph
        self.before: dict[int, tuple] = {}
        self.made: set[int] = set()

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        waits = ("aten::_local_scalar_dense", "aten::lift_fresh", "aten::nonzero")
        assert op.name() not in waits, f"{op} is a host sync"
        if op._schema.is_mutable:
            for x in tree_leaves((args, kwargs)):
                if isinstance(x, Tensor):
                    storage = x.untyped_storage()
                    self.before.setdefault(storage.data_ptr(), (storage, storage.clone()))
        noted = tree_map(self.note, (args, kwargs))
        out = op(*args, **kwargs)
        self.made |= {id(x) for x in tree_leaves(out)}
        self.graph.operations.append((op, *noted, out))
        return out

    def note(self, x):
        return Outside(x) if isinstance(x, Tensor) and id(x) not in self.made else x

    def __exit__(self, *error):
        super().__exit__(*error)
        for storage, content in self.before.values():
            storage.copy_(content)


class Graph:
    """torch.cuda.CUDAGraph: the same operations on the same memory."""

    made: list["Graph"] = []

    def __init__(self):
        self.operations: list[tuple] = []
        self.options: dict = {}
        self.replays = 0
        Graph.made.append(self)

    def replay(self):
        self.replays += 1
        for op, args, kwargs, out in self.operations:
            args, kwargs = tree_map(lambda x: x.find() if isinstance(x, Outside) else x, (args, kwargs))
            results = tree_leaves(op(*args, **kwargs))
            for old, new in zip(tree_leaves(out), results, strict=True):
                if (
                    isinstance(old, Tensor) and old.data_ptr() != new.data_ptr()
                ):  # neither a view of what it was given nor written in place
                    old.copy_(new)


def replace_graphs(monkeypatch) -> list[Graph]:
    """Lets CUDA graphs be recorded here, and returns the list of those that will be."""
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", Recording)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: f"stream of {device}")
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: "pool")
    monkeypatch.setattr(Graph, "made", [])
    return Graph.made
