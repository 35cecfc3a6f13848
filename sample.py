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

import json
import os
import sys
import time
from argparse import BooleanOptionalAction, Namespace, RawDescriptionHelpFormatter
from pathlib import Path

import torch
from tqdm import tqdm

from checkpoint import load_run, run_tokenizer
from cli import Parser, fail
from engine import Engine, Request
from generate import Decoder, bucket, check_request, generate, setting_errors
from model import KVCache, MoR
from show import Painter, heatmap, paint, token_bytes

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
