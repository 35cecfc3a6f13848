"""
Text from a trained run, each token coloured by the number of recursions it took.

    python sample.py out/demo                                        # no prompt: the model begins a document
    python sample.py out/demo "The parser" --temperature 0.7 --samples 3
    python sample.py out/demo --file notes.txt --heatmap depth.png   # --file - reads standard input
    python sample.py out/demo --prompts prompts.jsonl > results.jsonl
    python sample.py out/demo "The" --max-depth 1                    # or --threshold 0.7: less work per token

RUN is a run directory (its newest good checkpoint) or a checkpoint file. Text goes to standard output, everything else
to standard error. A line of PROMPTS.jsonl is {"prompt": "..."}; its result adds "completion", "depth" (of each token
that was fed: the prompt's too, but not the last of "length") and "finish" ("stop" at end-of-text, or "length"), or an
"error", in the order of the prompts. They are served by continuous depth-wise batching (engine.py), --batch rows wide.

An empty prompt starts from end-of-text. A prompt must leave room for one token in the model's context, and generation
ends where the context does; it does not slide. Row i draws its randomness from --seed + i and the position of the token
alone, so a row gives the same in any batch.

For programs: `load_run`, and `generate`, which takes token ids and returns token ids; a `Decoder` keeps cache and
compiled functions between calls. Shapes: B rows, P prompt tokens with padding, V vocabulary.
"""

import codecs
import hashlib
import json
import os
import re
import sys
import time
from argparse import BooleanOptionalAction, Namespace, RawDescriptionHelpFormatter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from cli import Parser, fail
from engine import Engine, Graphs, Request, bucket, draw, prefill, setting_errors
from model import KVCache, MoR, MoRConfig, Pass, State
from prepare import load_tokenizer

# ----------------------------------------------------------------------------------------------------------------------
# checkpoints


DAMAGE = (OSError, ValueError)  # what read_checkpoint raises
DIGEST = hashlib.sha256().digest_size


def read_checkpoint(path: Path) -> dict:
    """A checkpoint whose every byte is as it was written; raises one of DAMAGE otherwise."""
    data = np.memmap(path, np.uint8, "r")
    if hashlib.sha256(data[:-DIGEST]).digest() != data[-DIGEST:].tobytes():
        raise ValueError("its checksum does not match, so it is damaged, or no checkpoint of train.py")
    return torch.load(path, map_location="cpu", weights_only=True)


def step_of(path: Path) -> int:
    """-1 for a file that this program did not name."""
    return int(path.stem[5:]) if re.fullmatch(r"ckpt_\d+", path.stem) else -1


def checkpoints(out: Path) -> list[Path]:
    """Oldest first."""
    return sorted((path for path in out.glob("ckpt_*.pt") if step_of(path) >= 0), key=step_of)


def load_run(path: str | Path, device: str = "cpu", dtype: torch.dtype | None = None) -> tuple[MoR, dict, dict]:
    """(model in eval mode, meta.json of its data, the checkpoint) of a run directory or a checkpoint file. In a
    directory the newest checkpoint that can be read counts. What is wrong ends the program in one line."""
    path, problem = Path(path), ""
    files = checkpoints(path)[::-1] if path.is_dir() else [path]
    if not path.exists() or not files:
        fail(f"{path} holds no checkpoint: give a run directory of train.py, or a ckpt_*.pt file")
    for file in files:
        try:
            checkpoint = read_checkpoint(file)
            config, weights = checkpoint["config"], checkpoint["model"]
            model = MoR(MoRConfig(**config["model"]))
            break
        except (KeyError, TypeError, *DAMAGE) as e:
            problem = f"{file} cannot be read: {e}"
        if file == files[-1]:
            fail(f"{problem}: name another checkpoint")
        print(f"warning: {problem}", file=sys.stderr)
    shapes, own = ({k: t.shape for k, t in sd.items()} for sd in (weights, model.state_dict()))
    if shapes != own:
        wrong = sorted(k for k in shapes.keys() | own.keys() if shapes.get(k) != own.get(k))
        fail(f"{file}: the weights do not fit the configuration in it ({', '.join(wrong[:3])} ...): it was altered")
    if bad := [name for name, w in weights.items() if not w.isfinite().all()]:
        fail(f"{file}: weights are not finite ({', '.join(bad[:3])} ...): take an earlier checkpoint")
    if config["data"]["vocab_size"] > model.config.vocab_size:
        fail(f"{file}: its data has {config['data']['vocab_size']} token ids, the model {model.config.vocab_size}")
    model.load_state_dict(weights)
    return model.to(device=device, dtype=dtype).eval(), config["data"], checkpoint


def run_tokenizer(path: str | Path, checkpoint: dict):
    """The tokenizer of a run: by name, or its rank file, which is beside the checkpoint or in the data directory."""
    meta = checkpoint["config"]["data"]
    name, home = meta["tokenizer"], Path(path) if Path(path).is_dir() else Path(path).parent
    if name.endswith(".tiktoken"):
        places = [home / name, Path(checkpoint["config"]["train"]["data"], name)]
        name = next((p for p in places if p.exists()), None)
        if name is None:
            fail(f"tokenizer {meta['tokenizer']} is neither in {home} nor in {places[1].parent}: copy it to {home}")
    enc = load_tokenizer(name)
    if enc.n_vocab != meta["vocab_size"] or enc.eot_token != meta["eot"]:
        fail(f"tokenizer {name} has {enc.n_vocab} tokens, the checkpoint was trained with {meta['vocab_size']}")
    return enc


# ----------------------------------------------------------------------------------------------------------------------
# generation


class Decoder:
    """A model with a static cache for `batch` rows of up to `max_len` tokens, and the compiled functions that fill and
    read it: one prefill graph per bucket, one graph per decoding step (one per stage with early exit). Keep it between
    calls of `generate`. Raises ValueError as make_cache does."""

    def __init__(
        self, model: MoR, batch: int, max_len: int, *, threshold: float = 0.5, max_depth: int | None = None,
        slack: float | None = None, compile: bool = True, freeze: bool = False, early_exit: bool | None = None,
    ):  # fmt: skip
        self.model, self.cache = model, model.make_cache(batch, max_len, slack, threshold, max_depth)
        device, routed = model.wte.weight.device, model.config.router != "none"
        self.graphs, self.depth = Graphs(compile, freeze, device), self.cache.knobs["max_depth"]
        # Stopping when no row goes on costs a host sync per recursion: it pays where syncs are free and rows are few.
        self.early_exit = routed and (device.type == "cpu" and batch <= 4 if early_exit is None else early_exit)
        whole, real = (torch.zeros(batch, dtype=t, device=device) for t in (torch.long, torch.float32))
        self.left, self.stop = whole, whole[:1].clone()  # tokens still to draw per row; the token that ends a row
        self.ahead: Sequence = ()  # early exit: state and pass of the tokens drawn last, recursion 0 behind them
        self.knobs = dict(temperature=real, top_p=real.clone(), top_k=whole.clone(), seed=whole.clone())

    def choose(self, logits: Tensor, filtered: bool | None) -> Tensor:
        token = torch.where(self.left > 0, draw(logits, self.knobs, self.cache.position, filtered), -1)
        self.left.sub_(1)
        return token

    def step(self, token: Tensor, filtered: bool | None) -> tuple[Tensor, Tensor]:
        """Feeds a token per row [B] (-1: none) -> the next tokens [B] (-1: the row is over), depths of the fed [B]."""
        run = self.graphs.run
        if not self.early_exit:
            return run(("step", filtered), lambda t: self.leave(*self.enter(t, self.depth), filtered), token)
        s, p = self.ahead or run(("enter",), lambda t: self.enter(t, 1), token)
        for r in range(1, self.depth):
            if not s.active.any():  # the host sync
                break
            s = run(("recurse", r), lambda s, p, r=r: self.model.recurse(r, s, p), s, p)
        # the drawn token goes through recursion 0 in the same graph: a call less per token
        token, depth, *self.ahead = run(("turn", filtered), lambda s, p: self.turn(s, p, filtered), s, p)
        return token, depth

    def enter(self, token: Tensor, recursions: int) -> tuple[State, Pass]:
        p = self.model.decode_pass(torch.where(token == self.stop, -1, token), self.cache)
        s = self.model.decode_enter(token, p)
        for r in range(recursions):
            s = self.model.recurse(r, s, p)
        return s, p

    def leave(self, s: State, p: Pass, filtered: bool | None) -> tuple[Tensor, Tensor]:
        logits = self.model.decode_leave(s, p)
        return torch.where(p.valid[:, 0], self.choose(logits, filtered), -1), s.depth[:, 0]

    def turn(self, s: State, p: Pass, filtered: bool | None) -> tuple[Tensor, Tensor, State, Pass]:
        token, depth = self.leave(s, p, filtered)
        return token, depth, *self.enter(token, 1)


class Generated(NamedTuple):
    tokens: list[list[int]]  # new tokens of each row, without the stop token
    depth: list[list[int]]  # recursions of each token, prompt included
    stopped: list[bool]  # by the stop token, rather than by length
    prefill_seconds: float
    seconds: float  # of decoding
    overflow: int  # tokens that ended early for want of a cache slot


@torch.no_grad()
def generate(
    model: MoR, prompts: list[list[int]], max_new_tokens: int, *, temperature: float = 0.0, top_k: int | None = None,
    top_p: float = 1.0, seed: int | list[int] = 0, stop_token: int | None = None, on_token: Callable | None = None,
    decoder: Decoder | None = None, **options,
) -> Generated:  # fmt: skip
    """Continues all prompts in one batch; a row ends at stop_token, after max_new_tokens, or where the context does.

    on_token(row, token, depth) hears of every token as it becomes known, first those of the prompts, and (row, None,
    None) when a row ends. Row i draws with seed + i, or seed[i]. `decoder` brings cache and graphs of earlier calls;
    else one is made with **options (threshold, max_depth, slack, compile, freeze, early_exit). Raises ValueError."""
    check_request(model, prompts, max_new_tokens, temperature, top_k, top_p)
    lengths = [len(p) for p in prompts]
    if decoder is None:
        block = model.config.block_size
        decoder = Decoder(model, len(prompts), bucket(min(block, max(lengths) + max_new_tokens), block), **options)
    cache, decoder.ahead = decoder.cache, ()
    if len(prompts) > cache.batch or max(lengths) >= cache.max_len:
        size = f"{cache.batch} rows of {cache.max_len} tokens"
        raise ValueError(f"{len(prompts)} prompts of up to {max(lengths)} tokens do not fit a decoder for {size}")
    idle = [0] * (cache.batch - len(prompts))
    room = [min(max_new_tokens, cache.max_len - n) for n in lengths]
    decoder.left.copy_(torch.tensor(room + idle))
    decoder.stop.fill_(-1 if stop_token is None else stop_token)
    settings = dict(temperature=temperature, top_p=top_p, top_k=top_k or model.config.vocab_size)
    for name, value in settings.items():
        decoder.knobs[name].fill_(value)
    seeds = [seed + i for i in range(len(prompts))] if isinstance(seed, int) else seed
    decoder.knobs["seed"].copy_(torch.tensor([s % 2**32 for s in seeds] + idle))
    filtered = None if temperature == 0 else top_k is not None or top_p < 1  # of three graphs, the least that serves

    start = time.perf_counter()
    token = decoder.choose(prefill(decoder.graphs, model, prompts, cache), filtered)
    depth = [row[:n] for row, n in zip(cache.depth.tolist(), lengths, strict=False)]
    tokens, stopped, running = [[] for _ in prompts], [False for _ in prompts], set(range(len(prompts)))
    say = on_token or (lambda row, token, depth: None)
    for row, prompt in enumerate(prompts):
        for t, d in zip(prompt, depth[row], strict=True):
            say(row, t, d)
    prefilled = time.perf_counter()

    def read(host: Tensor, event: torch.cuda.Event | None) -> None:
        """Takes in what a step was fed, and the depths that it found."""
        if event is not None:
            event.synchronize()
        for row, (t, d) in enumerate(host.T.tolist()):
            if row not in running:
                continue
            if t < 0 or t == stop_token:
                stopped[row] = t == stop_token
                running.discard(row)
                say(row, None, None)
            else:
                tokens[row].append(t)
                depth[row].append(d)
                say(row, t, d)

    behind = None
    for _ in range(max(room)):  # the last step gives nothing but the depth of the last token
        fed = token
        token, d = decoder.step(fed, filtered)
        if behind is not None:  # the host reads step i while the device computes step i + 1
            read(*behind)
        behind = to_host(torch.stack((fed, d)))
        if not running:
            break
    read(*behind)
    for row in sorted(running):
        say(row, None, None)
    seconds = time.perf_counter() - prefilled
    return Generated(tokens, depth, stopped, prefilled - start, seconds, int(cache.overflow[: len(prompts)].sum()))


def to_host(x: Tensor) -> tuple[Tensor, torch.cuda.Event | None]:
    """A copy of x in host memory, and the event to wait for before reading it."""
    if x.device.type != "cuda":
        return x.cpu(), None
    host, event = torch.empty(x.shape, dtype=x.dtype, pin_memory=True), torch.cuda.Event()
    host.copy_(x, non_blocking=True)
    event.record()
    return host, event


def check_request(
    model: MoR, prompts: list[list[int]], max_new_tokens: int, temperature: float, top_k: int | None, top_p: float
) -> None:
    c, bad = model.config, [] if prompts else ["there are no prompts"]
    for i, prompt in enumerate(prompts):
        if not 1 <= len(prompt) < c.block_size:
            bad.append(f"prompt {i} has {len(prompt)} tokens, but needs 1 to {c.block_size - 1}: the context less one")
        elif min(prompt) < 0 or max(prompt) >= c.vocab_size:
            bad.append(f"prompt {i} has token ids outside of the model's vocabulary of {c.vocab_size}")
    bad += setting_errors(max_new_tokens, temperature, top_k, top_p)
    if bad:
        raise ValueError("; ".join(bad))


# ----------------------------------------------------------------------------------------------------------------------
# showing depth

SHADES = (253, 153, 157, 222, 210, 177)  # xterm-256 backgrounds of depth 0, 1, 2, ...; the last serves all deeper ones


class Painter:
    """Writes the tokens of several rows to `out`, one row after the other although they arrive together. A character
    whose bytes are spread over tokens is written with its last byte, in the colour of that token."""

    def __init__(self, enc, color: bool, out, rows: int):
        self.enc, self.color, self.out, self.row = enc, color, out, 0
        self.waiting: list[list] = [[] for _ in range(rows)]
        self.decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def __call__(self, row: int, token: int | None, depth: int | None) -> None:
        self.waiting[row].append((token, depth))
        while self.row < len(self.waiting) and self.waiting[self.row]:
            self.write(*self.waiting[self.row].pop(0))
        self.out.flush()

    def write(self, token: int | None, depth: int | None) -> None:
        if token is not None:
            text = self.decoder.decode(token_bytes(self.enc, token))
            self.out.write(paint(text, depth) if self.color else text)
            return
        self.row += 1
        more = self.row < len(self.waiting)
        self.out.write(self.decoder.decode(b"", final=True) + "\n" + "-" * 16 * more + "\n" * more)


def paint(text: str, depth: int) -> str:
    """Control characters as pictures, or a terminal would obey them; line breaks bare, or colour would fill lines."""
    text = "".join(chr(0x2400 + ord(c)) if ord(c) < 32 and c not in "\n\t" else c for c in text)
    color = f"\x1b[30;48;5;{SHADES[min(depth, len(SHADES) - 1)]}m"
    return "\n".join(f"{color}{part}\x1b[0m" if part else "" for part in text.split("\n"))


def token_bytes(enc, token: int) -> bytes:
    try:
        return enc.decode_single_token_bytes(token)
    except KeyError:  # a model's vocabulary may be padded beyond the tokenizer's
        return "\N{REPLACEMENT CHARACTER}".encode()


def heatmap(tokens: list[bytes], depth: list[int], n: int, file: str, prompt: int = 0, columns: int = 32) -> None:
    """A PNG with the tokens along the axis, `columns` to a line, and above each as many of n cells filled as it took
    recursions. The first `prompt` tokens, which were given, are in grey."""
    from matplotlib import font_manager, ft2font
    from matplotlib.colors import ListedColormap
    from matplotlib.figure import Figure

    font = ft2font.FT2Font(font_manager.findfont("DejaVu Sans Mono"))

    def label(token: bytes) -> str:
        text = token.decode("utf-8", "backslashreplace").translate({32: "␣", 10: "↵", 9: "⇥"})
        text = "".join(c if c.isprintable() and font.get_char_index(ord(c)) else f"\\u{ord(c):04x}" for c in text)
        return (text if len(text) <= 14 else text[:13] + "…").replace("$", r"\$")  # $ would begin a formula

    lines, wide = range(0, len(tokens), columns), min(columns, len(tokens))
    figure = Figure(figsize=(0.36 * wide + 0.8, len(lines) * (0.26 * n + 1.35)), layout="tight")
    colors = ListedColormap(["#f2f2f2"] + [(0.25, 0.45, 0.75, 0.35 + 0.65 * (r + 1) / n) for r in range(n)])
    for i, start in enumerate(lines):
        axis, here = figure.add_subplot(len(lines), 1, i + 1), range(start, min(start + columns, len(tokens)))
        cells = [[r + 1 if depth[t] > r else 0 for t in here] for r in range(n)]
        axis.pcolormesh(cells, cmap=colors, vmin=0, vmax=n, edgecolors="white", linewidth=1.5)
        axis.set(xlim=(0, wide), ylabel="recursion")
        axis.set_yticks([r + 0.5 for r in range(n)], range(1, n + 1))
        axis.set_xticks([t - start + 0.5 for t in here], [label(tokens[t]) for t in here], rotation=90, fontsize=9)
        for t, text in zip(here, axis.get_xticklabels(), strict=True):
            text.set(family="DejaVu Sans Mono", color="#888888" if t < prompt else "black")
        axis.tick_params(length=0)
        axis.spines[:].set_visible(False)
    figure.savefig(file, dpi=130)


# ----------------------------------------------------------------------------------------------------------------------
# command line


def read_flags(argv: list[str] | None) -> Namespace:
    parser = Parser(description=__doc__, formatter_class=RawDescriptionHelpFormatter, allow_abbrev=False)
    add = parser.add_argument
    add("run", metavar="RUN", help="run directory or checkpoint file")
    add("prompt", nargs="?", metavar="PROMPT", help="text to continue")
    add("--file", metavar="FILE", help="read the prompt from a file, - for standard input")
    add("--prompts", metavar="FILE.jsonl", help="continue many prompts; results as JSON lines on standard output")
    add("--batch", type=int, default=8, metavar="B", help="rows that run together (default: 8)")
    add("--samples", type=int, default=1, metavar="N", help="continuations of the prompt (default: 1)")
    add("--max-new-tokens", type=int, default=256, metavar="N", help="tokens per row at most (default: 256)")
    add("--temperature", type=float, default=0.8, metavar="T", help="0: always the likeliest token (default: 0.8)")
    add("--top-k", type=int, metavar="K", help="draw among the K likeliest tokens")
    add("--top-p", type=float, default=1.0, metavar="P", help="draw among the likeliest of probability P (default: 1)")
    add("--seed", type=int, default=0, metavar="S", help="of the draws (default: 0)")
    add("--stop", action=BooleanOptionalAction, default=True, help="end a row at end-of-text (default: yes)")
    add("--max-depth", type=int, metavar="R", help="recursions per token at most (default: all)")
    add("--threshold", type=float, default=0.5, metavar="P", help="router probability to go on with (default: 0.5)")
    add("--slack", type=float, metavar="S", help="cache slots relative to capacity (default: the model's, 1.25)")
    add("--color", choices=("auto", "always", "never"), default="auto", help="auto: on a terminal without NO_COLOR")
    add("--heatmap", metavar="FILE.png", help="draw tokens against recursions, for the first sample")
    add("--device", default="auto", metavar="D", help="cpu, cuda, ... (default: cuda if there is one)")
    add("--dtype", choices=("auto", "fp32", "bf16"), default="auto", help="auto: bf16 on cuda, else fp32")
    add("--compile", action=BooleanOptionalAction, help="compile first (default: if over 4000 steps are to be done)")
    add("--freeze", action="store_true", help="on CPUs, compile with weights packed as constants: twice the memory")
    args = parser.parse_args(argv)
    if sum(given is not None for given in (args.prompt, args.file, args.prompts)) > 1:
        fail("give one of PROMPT, --file and --prompts")
    if args.prompts and (args.heatmap or args.samples != 1):
        fail("--heatmap and --samples go with a single prompt, not with --prompts")
    if args.heatmap and not (args.heatmap.endswith(".png") and Path(args.heatmap).absolute().parent.is_dir()):
        fail(f"--heatmap {args.heatmap} must be a .png file in a directory that exists")
    for name in ("samples", "batch", "max_new_tokens"):
        if getattr(args, name) < 1:
            fail(f"--{name.replace('_', '-')} {getattr(args, name)} must be at least 1")
    return args


def read_text(file: str) -> str:
    try:
        return (sys.stdin.buffer.read() if file == "-" else Path(file).read_bytes()).decode()
    except OSError as e:
        fail(f"{file}: {e.strerror}")
    except UnicodeDecodeError as e:
        fail(f"{file}: not UTF-8 text (byte {e.start})")


def read_prompts(file: str) -> list[str]:
    prompts = []
    for number, line in enumerate(read_text(file).split("\n"), 1):
        if line.strip():
            try:
                prompts.append(json.loads(line)["prompt"].encode().decode())  # a string without lone surrogates
            except (ValueError, TypeError, KeyError, AttributeError):
                fail(f'{file}: line {number} is not {{"prompt": "..."}}')
    return prompts or fail(f"{file}: there are no prompts in it")


def report(model: MoR, cache: KVCache, seconds: str, depths: list[list[int]], overflow: int) -> str:
    c, dtype = model.config, model.wte.weight.dtype
    flat = [d for row in depths for d in row]
    vanilla = 2 * cache.batch * cache.max_len * c.n_layer * c.n_kv_head * c.head_dim * dtype.itemsize
    outer = vanilla * c.n_unshared // c.n_layer  # first and last layer cache every token in any model
    tight = model.kv_bytes(cache.batch, cache.max_len, dtype)
    share, share_tight = ((n - outer) / (vanilla - outer) for n in (cache.nbytes, tight))
    lines = [
        f"{seconds}; mean depth {sum(flat) / max(1, len(flat)):.2f} of {c.n_recursion}",
        f"KV cache of {cache.batch} x {cache.max_len} tokens: {cache.nbytes / 1e6:.2f} MB, vanilla's"
        f" {vanilla / 1e6:.2f} MB; shared block alone {share:.1%} of vanilla's at slack {cache.slack:g},"
        f" {share_tight:.1%} at slack 1",
    ]
    if overflow:
        lines.append(f"{overflow} tokens found a recursion's cache full and ended early: --slack gives it more slots")
    return "\n".join(lines)


def settings(args: Namespace, meta: dict, steps: int) -> tuple[dict, dict]:
    """What the flags say of drawing tokens, and of a cache and its graphs."""
    sampling = dict(temperature=args.temperature, top_k=args.top_k, top_p=args.top_p)
    if errors := setting_errors(args.max_new_tokens, **sampling):
        raise ValueError("; ".join(errors))
    sampling["stop_token"] = meta["eot"] if args.stop else None
    compile = steps > 4000 if args.compile is None else args.compile
    options = dict(threshold=args.threshold, max_depth=args.max_depth, slack=args.slack)
    return sampling, options | dict(compile=compile, freeze=args.freeze)


def continue_one(model: MoR, enc, meta: dict, prompt: list[int], args: Namespace) -> None:
    """Samples of one prompt, `--batch` at a time."""
    color = args.color == "always" or (args.color == "auto" and sys.stdout.isatty() and not os.environ.get("NO_COLOR"))
    block, batch = model.config.block_size, min(args.batch, args.samples)
    new = min(args.max_new_tokens, block - len(prompt))
    sampling, options = settings(args, meta, -(-args.samples // batch) * new)
    check_request(model, [prompt], args.max_new_tokens, args.temperature, args.top_k, args.top_p)
    decoder = Decoder(model, batch, bucket(len(prompt) + new, block), **options)
    if options["compile"]:
        start = time.perf_counter()
        generate(model, [prompt], 2, decoder=decoder, **sampling)
        print(f"compiled in {time.perf_counter() - start:.0f} s", file=sys.stderr)
    if color:
        print("recursions:", *(paint(f" {d} ", d) for d in range(1, model.config.n_recursion + 1)))
    painter, done = Painter(enc, color, sys.stdout, args.samples), []
    for first in range(0, args.samples, batch):
        rows = range(first, min(first + batch, args.samples))
        seeds, say = [args.seed + i for i in rows], lambda row, *token, first=first: painter(first + row, *token)
        done.append(generate(model, [prompt] * len(rows), new, seed=seeds, on_token=say, decoder=decoder, **sampling))
    if args.heatmap:
        tokens = [token_bytes(enc, t) for t in prompt + done[0].tokens[0]]
        heatmap(tokens, done[0].depth[0], model.config.n_recursion, args.heatmap, prompt=len(prompt))
    new, seconds = sum(len(t) for out in done for t in out.tokens), sum(out.seconds for out in done)
    speed = f"{new} tokens in {seconds:.2f} s, {new / seconds:.0f} tokens/s; prompts of {args.samples * len(prompt)}"
    speed += f" tokens in {sum(out.prefill_seconds for out in done):.2f} s"
    depths = [row for out in done for row in out.depth]
    print(report(model, decoder.cache, speed, depths, sum(out.overflow for out in done)), file=sys.stderr)


def continue_many(model: MoR, enc, meta: dict, texts: list[str], prompts: list[list[int]], args: Namespace) -> None:
    """Results as JSON lines in the order of the prompts, as early as that allows; a prompt too long fails alone."""
    block, width = model.config.block_size, min(args.batch, len(prompts))
    new = [max(1, min(args.max_new_tokens, block - len(p))) for p in prompts]
    sampling, options = settings(args, meta, sum(new) // width)
    max_len = max((len(p) + n for p, n in zip(prompts, new, strict=True) if len(p) < block), default=1)
    slots = width if model.config.router == "none" else min(len(prompts), 2 * width - 1)
    engine, start, printed = Engine(model, slots, width, bucket(max_len, block), **options), time.perf_counter(), 0
    requests = []
    for i, (prompt, n) in enumerate(zip(prompts, new, strict=True)):
        requests.append(engine.submit(prompt, n, seed=args.seed + i, **sampling))
    with tqdm(total=len(requests), unit=" prompts", disable=None) as bar:
        while engine.step() or printed < len(requests):
            while printed < len(requests) and requests[printed].status in ("done", "failed"):
                print(json.dumps(result(enc, texts[printed], requests[printed]), ensure_ascii=False), flush=True)
                printed += 1
            bar.update(len(requests) - len(engine.waiting) - engine.slots + len(engine.free) - bar.n)
    seconds, tokens = time.perf_counter() - start, sum(len(r.tokens) for r in requests)
    speed = f"{tokens} tokens in {seconds:.2f} s, {tokens / seconds:.0f} tokens/s with the prompts"
    speed += " and compilation" if options["compile"] else ""
    overflow = sum(r.overflow for r in requests)
    print(report(model, engine.cache, speed, [r.depth for r in requests], overflow), file=sys.stderr)


def result(enc, text: str, request: Request) -> dict:
    if request.error:
        return dict(prompt=text, error=request.error)
    completion = b"".join(token_bytes(enc, t) for t in request.tokens).decode("utf-8", "replace")
    finish = "length" if len(request.tokens) == request.max_new_tokens else "stop"
    return dict(prompt=text, completion=completion, depth=request.depth, finish=finish)


def main(argv: list[str] | None = None) -> None:
    args = read_flags(argv)
    texts = read_prompts(args.prompts) if args.prompts else [read_text(args.file) if args.file else args.prompt or ""]
    device = ("cuda" if torch.cuda.is_available() else "cpu") if args.device == "auto" else args.device
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as e:  # torch raises either, by device
        fail(f"--device {device}: {str(e).splitlines()[0]}")
    dtypes = dict(fp32=torch.float32, bf16=torch.bfloat16, auto=None if device == "cpu" else torch.bfloat16)
    model, meta, checkpoint = load_run(args.run, device, dtypes[args.dtype])
    enc = run_tokenizer(args.run, checkpoint)
    prompts = [enc.encode_ordinary(text) or [meta["eot"]] for text in texts]
    sys.stdout.reconfigure(encoding="utf-8")
    try:
        if args.prompts:
            continue_many(model, enc, meta, texts, prompts, args)
        else:
            continue_one(model, enc, meta, prompts[0], args)
        sys.stdout.flush()
    except ValueError as e:
        fail(str(e))
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # the reader, say head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    main()
