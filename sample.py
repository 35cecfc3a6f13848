"""Text from a trained model, each token coloured by the number of recursions it took.

    python sample.py                                                 # out/demo; on a terminal: a prompt to type at
    python sample.py out/demo "The parser" --temperature 0.7 --samples 3
    python sample.py out/demo --file notes.txt --html depth.html     # --file - reads standard input
    python sample.py out/demo --prompts prompts.jsonl > results.jsonl
    python sample.py out/demo "The" --max-depth 1                    # or --threshold 0.7: less work per token
    python sample.py exported/demo "The"                             # or the directory of a Hugging Face Llama

MODEL is a run directory (its newest good checkpoint), a checkpoint file, or a directory of weights: what was exported,
a Hugging Face Llama, the authors' checkpoints. Text goes to standard output, everything else to standard error.

On a terminal without a prompt each line that you type is continued; an empty one begins a document. Ctrl-C ends a
continuation, Ctrl-D the program; what was compiled stays compiled in between.

A line of PROMPTS.jsonl is {"prompt": "..."}. Its result keeps what else is in it and adds "completion", "depth" (of
each token that was fed: the prompt's too, but not the last of "length") and "finish" ("stop" at end-of-text, or
"length"), or an "error", in the order of the prompts. They are served by continuous depth-wise batching (engine.py),
--batch rows wide.

An empty prompt starts from end-of-text. A prompt must leave room for one token in the model's context, and generation
ends where the context does; it does not slide. Row i draws its randomness from --seed + i and the position of the token
alone, so a row gives the same in any batch.
"""

import json
import os
import sys
import tempfile
import time
from argparse import BooleanOptionalAction, Namespace, RawDescriptionHelpFormatter
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

import prepare
from cache import KVCache
from checkpoint import open_model
from cli import Parser, fail, open_device, whole
from engine import Engine, Request
from generate import Decoder, Generated, bucket, check_request, generate, prepare_weights, setting_errors
from model import MoR
from prepare import load_tokenizer, read_text
from show import UNSAFE, Painter, paint, read_passage, routing_heatmap, token_bytes, write_page

DEMO = "out/demo"
MEMORY = (MemoryError, RuntimeError)  # what is raised for want of memory: torch's error is but a RuntimeError

# ----------------------------------------------------------------------------------------------------------------------
# command line


def read_flags(argv: list[str] | None) -> Namespace:
    """Returns the flags of the command line; ends the program over those that contradict each other."""
    parser = Parser(description=__doc__, formatter_class=RawDescriptionHelpFormatter, allow_abbrev=False)
    add = parser.add_argument
    add("run", nargs="?", metavar="MODEL", default=DEMO, help=f"run, checkpoint or weights (default: {DEMO})")
    add("prompt", nargs="?", metavar="PROMPT", help="text to continue")
    add("--file", metavar="FILE", help="read the prompt from a file, - for standard input")
    add("--prompts", metavar="FILE.jsonl", help="continue many prompts; results as JSON lines on standard output")
    add("--batch", type=whole, default=8, metavar="B", help="rows that run together (default: 8)")
    add("--samples", type=whole, default=1, metavar="N", help="continuations of the prompt (default: 1)")
    add("--max-new-tokens", type=whole, default=256, metavar="N", help="tokens per row at most (default: 256)")
    add("--temperature", type=float, default=0.8, metavar="T", help="0: always the likeliest token (default: 0.8)")
    add("--top-k", type=whole, metavar="K", help="draw among the K likeliest tokens")
    add("--top-p", type=float, default=1.0, metavar="P", help="draw among the likeliest of probability P (default: 1)")
    add("--seed", type=whole, default=0, metavar="S", help="of the draws (default: 0)")
    add("--stop", action=BooleanOptionalAction, default=True, help="end a row where the model does (default: yes)")
    add("--max-depth", type=whole, metavar="R", help="recursions per token at most (default: all)")
    add("--threshold", type=float, default=0.5, metavar="P", help="router probability to go on with (default: 0.5)")
    add("--slack", type=float, metavar="S", help="cache slots relative to capacity (default: the model's, 1.25)")
    add("--color", choices=("auto", "always", "never"), default="auto", help="auto: on a terminal without NO_COLOR")
    add("--heatmap", metavar="FILE.png", help="draw tokens against recursions, for the first sample")
    add("--html", metavar="FILE.html", help="write the samples as a page that shows all about each token")
    add("--tokenizer", metavar="T", help="name, file or directory, for weights without one of their own")
    add("--device", default="auto", metavar="D", help="cpu, cuda, ... (default: cuda if there is one)")
    add("--dtype", choices=("auto", "fp32", "bf16"), default="auto", help="auto: bf16 on cuda, else fp32")
    add("--quantize", choices=("int8",), help="weights of the layers and the head in one byte each")
    add("--compile", action=BooleanOptionalAction, help="compile first (default: if over 4000 steps are to be done)")
    add("--freeze", action="store_true", help="on CPUs, compile with weights packed as constants: twice the memory")
    args = parser.parse_intermixed_args(argv)  # options and PROMPT in any order

    if sum(given is not None for given in (args.prompt, args.file, args.prompts)) > 1:
        fail("give one of PROMPT, --file and --prompts")
    if args.prompts and (args.heatmap or args.html or args.samples != 1):
        fail("--heatmap, --html and --samples go with a single prompt, not with --prompts")
    for name in ("samples", "batch", "max_new_tokens"):
        if getattr(args, name) < 1:
            fail(f"--{name.replace('_', '-')} {getattr(args, name)} must be at least 1")
    if args.heatmap and not args.heatmap.endswith(".png"):
        fail(f"--heatmap {args.heatmap} must be a .png file")
    for name in ("heatmap", "html"):
        check_writable("--" + name, getattr(args, name))
    return args


def check_writable(name: str, file: str | None) -> None:
    """Ends the program, before there is work to lose, if a file could not be written."""
    if file is None:
        return
    try:
        if Path(file).is_dir():
            fail(f"{name} {file} is a directory: name a file")
        tempfile.TemporaryFile(dir=Path(file).absolute().parent).close()
    except OSError as e:
        fail(f"{name} {file} cannot be written ({e.strerror}): name a file in a directory that exists")


# ----------------------------------------------------------------------------------------------------------------------
# what people give


def read_argument(text: str) -> str:
    """Returns a command-line argument as the UTF-8 that it was typed in, whatever the locale made of it."""
    try:
        return os.fsencode(text).decode()
    except UnicodeDecodeError as e:
        # surrogates are how Python hands on bytes that its own reading had no use for
        if any(0xD800 <= ord(c) < 0xE000 for c in text):
            fail(f"PROMPT is not UTF-8 text (byte {e.start}): put it into a file, converted with iconv")
        return text  # of a terminal with another encoding, which the locale knows


def read_records(file: str) -> list[dict]:
    """Returns the objects of a JSONL file, each with its "prompt"."""
    records = []
    for number, line in enumerate(read_text(file).split("\n"), 1):
        line = line.strip("\ufeff \t\r")  # files that were joined have byte-order marks in the middle
        if not line:
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as e:
            fail(f"{file}: line {number} is not JSON ({e})")
        if not isinstance(record, dict) or not isinstance(record.get("prompt"), str):
            fail(f'{file}: line {number} is not {{"prompt": "..."}}')
        records.append(record)
    return records or fail(f"{file}: there are no prompts in it")


def encode(enc, text: str, limit: int) -> list[int]:
    """Returns the tokens of a prompt, end-of-text for an empty one. Raises ValueError over what no model could take.

    limit: the model's context. What is sure to be longer is not tokenized: it could take minutes.
    """
    try:
        size = len(text.encode())
    except UnicodeEncodeError as e:
        raise ValueError(f"character {e.start} of the prompt is half a character (a lone surrogate)") from None
    longest = max(len(token) for token in enc.token_byte_values())
    if size > limit * longest:
        raise ValueError(f"the prompt has at least {size // longest} tokens, the context {limit}: shorten it")
    return prepare.encode(enc, text) or [enc.eot_token]


def read_settings(args: Namespace, steps: int) -> tuple[dict, dict]:
    """Returns what the flags say of drawing tokens, and of a cache and its graphs. Raises ValueError."""
    if errors := setting_errors(args.max_new_tokens, args.temperature, args.top_k, args.top_p):
        raise ValueError("; ".join(errors))
    # beyond these, logits over temperature leave fp32; the draws no longer change long before
    temperature = min(max(args.temperature, 1e-30), 1e30) if args.temperature else 0.0
    top_k = args.top_k and min(args.top_k, 2**31)
    sampling = dict(temperature=temperature, top_k=top_k, top_p=args.top_p, stop_token=args.stop_token)
    slack = args.slack and min(args.slack, 1e9)
    options = dict(threshold=args.threshold, max_depth=args.max_depth, slack=slack, freeze=args.freeze)
    options["compile"] = steps > 4000 if args.compile is None else args.compile
    return sampling, options


# ----------------------------------------------------------------------------------------------------------------------
# one prompt, a terminal, many prompts


def wants_color(args: Namespace) -> bool:
    """Returns whether --color, or a terminal, asks for colours."""
    if args.color == "auto":
        return sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    return args.color == "always"


def print_legend(n: int) -> None:
    print("recursions:", *(paint(f" {d} ", d) for d in range(1, n + 1)), flush=True)


def draw_samples(decoder: Decoder, enc, ids: list[int], args: Namespace, sampling: dict) -> list[Generated]:
    """Writes `--samples` continuations of a prompt to standard output as they come, as many at a time as the decoder
    has rows."""
    painter = Painter(enc, wants_color(args), sys.stdout, args.samples)
    done = []
    for first in range(0, args.samples, decoder.cache.batch):
        rows = range(first, min(first + decoder.cache.batch, args.samples))

        def say(row: int, token: int | None, depth: int | None, first: int = first) -> None:
            painter(first + row, token, depth)

        seeds = [args.seed + i for i in rows]
        prompts = [ids] * len(rows)
        room = min(args.max_new_tokens, decoder.cache.max_len - len(ids))
        done.append(generate(decoder.model, prompts, room, seed=seeds, on_token=say, decoder=decoder, **sampling))
    return done


def continue_one(model: MoR, enc, text: str, args: Namespace) -> None:
    """Writes samples of one prompt to standard output, the pictures that were asked for, and what it all took."""
    block = model.config.block_size
    # a request that makes no sense ends here, before anything takes time
    ids = encode(enc, text, block)
    check_request(model, [ids], args.max_new_tokens, args.temperature, args.top_k, args.top_p)
    batch = min(args.batch, args.samples)
    new = min(args.max_new_tokens, block - len(ids))
    sampling, options = read_settings(args, -(-args.samples // batch) * new)
    decoder = Decoder(model, batch, bucket(len(ids) + new, block), vocab_size=enc.n_vocab, **options)
    if options["compile"]:  # apart, so that the speed below is that of decoding
        start = time.perf_counter()
        generate(model, [ids], 2, decoder=decoder, **sampling)
        print(f"compiled in {time.perf_counter() - start:.0f} s", file=sys.stderr)
    n = model.config.n_recursion
    if wants_color(args):
        print_legend(n)
    done = draw_samples(decoder, enc, ids, args, sampling)

    # the pictures, of what was really run: a full cache may have ended tokens early
    if args.heatmap:
        tokens = [token_bytes(enc, t) for t in ids + done[0].tokens[0]]
        routing_heatmap(tokens, done[0].depth[0], n, args.heatmap, prompt=len(ids))
    if args.html:
        knobs = dict(threshold=args.threshold, max_depth=args.max_depth)
        passages = []
        for out in done:
            for tokens, depth in zip(out.tokens, out.depth, strict=True):
                passage = read_passage(model, enc, ids + tokens, len(ids), **knobs)
                passages.append(passage._replace(depth=depth))
        write_page(args.html, passages, n, args.run, f"sampled at temperature {args.temperature:g}, seed {args.seed}")

    tokens = sum(len(row) for out in done for row in out.tokens)
    seconds = sum(out.seconds for out in done)
    prefill = sum(out.prefill_seconds for out in done)
    speed = f"{tokens} tokens in {seconds:.2f} s, {tokens / seconds:.0f} tokens/s; prompts of"
    speed += f" {args.samples * len(ids)} tokens in {prefill:.2f} s"
    depths = [row for out in done for row in out.depth]
    print(report(model, decoder.cache, speed, depths, sum(out.overflow for out in done)), file=sys.stderr)


def converse(model: MoR, enc, args: Namespace) -> None:
    """Continues each line that is typed at a terminal, with one decoder for all of them."""
    try:
        import readline  # noqa: F401 - input() then edits lines and remembers them
    except ImportError:
        pass
    sampling, options = read_settings(args, steps=0)
    decoder = Decoder(model, args.samples, model.config.block_size, vocab_size=enc.n_vocab, **options)
    print("type a text to be continued; Ctrl-D ends", file=sys.stderr)
    if wants_color(args):
        print_legend(model.config.n_recursion)
    while True:
        try:
            draw_samples(decoder, enc, encode(enc, input("> "), model.config.block_size), args, sampling)
        except EOFError:
            print()
            return
        except KeyboardInterrupt:  # of a line, or of its continuation
            print()
        except ValueError as e:  # of this line alone
            print("error:", e, file=sys.stderr)


def continue_many(model: MoR, enc, records: list[dict], args: Namespace) -> None:
    """Writes results as JSON lines in the order of the prompts, as early as that allows; a bad prompt fails alone."""
    block = model.config.block_size
    prompts: list[Any] = []  # token ids, or why there are none
    for record in records:
        try:
            prompts.append(encode(enc, record["prompt"], block))
        except ValueError as e:
            prompts.append(str(e))
    sizes = [len(p) for p in prompts if isinstance(p, list) and len(p) < block]
    new = [min(args.max_new_tokens, block - size) for size in sizes]
    max_len = max((size + n for size, n in zip(sizes, new, strict=True)), default=1)

    # an engine in which one of the two stages always has a full batch
    width = min(args.batch, len(prompts))
    slots = width if model.config.router == "none" else min(len(prompts), 2 * width - 1)
    sampling, options = read_settings(args, sum(new) // width)
    engine = Engine(model, slots, width, bucket(max_len, block), vocab_size=enc.n_vocab, **options)
    start = time.perf_counter()
    requests = []
    for i, prompt in enumerate(prompts):
        if isinstance(prompt, str):
            requests.append(Request([], 1, status="failed", error=prompt))
        else:
            room = max(1, min(args.max_new_tokens, block - len(prompt)))
            requests.append(engine.submit(prompt, room, seed=args.seed + i, **sampling))

    # results leave in order: what is done early waits for those before it
    printed = 0
    with tqdm(total=len(requests), unit=" prompts", disable=None) as bar:
        while engine.step() or printed < len(requests):
            while printed < len(requests) and requests[printed].status in ("done", "failed"):
                print(to_json(make_result(enc, records[printed], requests[printed])), flush=True)
                printed += 1
                bar.update()
    seconds = time.perf_counter() - start
    tokens = sum(len(r.tokens) for r in requests)
    speed = f"{tokens} tokens in {seconds:.2f} s, {tokens / seconds:.0f} tokens/s with the prompts"
    speed += " and compilation" if options["compile"] else ""
    overflow = sum(r.overflow for r in requests)
    print(report(model, engine.cache, speed, [r.depth for r in requests], overflow), file=sys.stderr)


def make_result(enc, record: dict, request: Request) -> dict:
    """Returns the record with what came of it, instead of what may have come of it before."""
    kept = {key: value for key, value in record.items() if key not in ("completion", "depth", "finish", "error")}
    if request.error:
        return kept | dict(error=request.error)
    completion = b"".join(token_bytes(enc, t) for t in request.tokens).decode("utf-8", "replace")
    finish = "length" if len(request.tokens) == request.max_new_tokens else "stop"
    return kept | dict(completion=completion, depth=request.depth, finish=finish)


def to_json(result: dict) -> str:
    """Returns one line of JSON whose characters are safe on a terminal, and for readers that split at U+2028."""
    return UNSAFE.sub(lambda match: f"\\u{ord(match[0]):04x}", json.dumps(result, ensure_ascii=False))


def report(model: MoR, cache: KVCache, speed: str, depths: list[list[int]], overflow: int) -> str:
    """Returns what is said after the text: speed and memory; of a recursive model also depth, and a vanilla cache."""
    c = model.config
    size = f"KV cache of {cache.batch} x {cache.max_len} tokens: {cache.nbytes / 1e6:.2f} MB"
    if c.n_recursion == 1:
        return f"{speed}\n{size}"
    flat = [d for row in depths for d in row]
    dtype = model.wte.weight.dtype
    vanilla = 2 * cache.batch * cache.max_len * c.n_layer * c.n_kv_head * c.head_dim * dtype.itemsize
    outer = vanilla * c.n_unshared // c.n_layer  # first and last layer cache every token in any model
    share = (cache.nbytes - outer) / (vanilla - outer)
    tight = (model.kv_bytes(cache.batch, cache.max_len, dtype) - outer) / (vanilla - outer)
    weights = sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
    lines = [
        f"{speed}; mean depth {sum(flat) / max(1, len(flat)):.2f} of {c.n_recursion}; weights {weights / 1e6:.2f} MB",
        f"{size}, vanilla's {vanilla / 1e6:.2f} MB; shared block alone {share:.1%} of vanilla's at slack"
        f" {cache.slack:g}, {tight:.1%} at slack 1",
    ]
    if overflow:
        lines.append(f"{overflow} tokens found a recursion's cache full and ended early: --slack gives it more slots")
    return "\n".join(lines)


def run(args: Namespace) -> None:
    """Continues what the flags name. The text is read before the model, whose loading takes longer to fail."""
    records = read_records(args.prompts) if args.prompts else []
    text = read_text(args.file) if args.file else read_argument(args.prompt or "")
    device = open_device(args.device)
    dtypes = dict(fp32=torch.float32, bf16=torch.bfloat16, auto=None if device == "cpu" else torch.bfloat16)
    if args.run == DEMO and not Path(DEMO).exists():
        fail(f"{DEMO} does not exist here: make demo trains it; or name a MODEL (sample.py --help)")
    model, enc, config = open_model(args.run, device, dtypes[args.dtype])
    model = prepare_weights(model, args.quantize)
    if args.tokenizer:
        enc = load_tokenizer(args.tokenizer)
    if enc is None:
        fail(f"{args.run} holds no tokenizer: name it with --tokenizer (a name, a file, or a directory that has one)")
    args.stop_token = config["data"].get("eos", enc.eot_token) if args.stop else None

    # without a prompt a terminal is asked; a pipe, or a page to be written, gets a document from its beginning
    asked = args.prompt is None and not args.file and not args.html and not args.heatmap
    terminal = sys.stdin is not None and sys.stdin.isatty() and sys.stdout.isatty()
    if records:
        continue_many(model, enc, records, args)
    elif asked and terminal:
        converse(model, enc, args)
    else:
        continue_one(model, enc, text, args)


def main(argv: list[str] | None = None) -> None:
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by who started the program
            setattr(sys, name, open(os.devnull, "w"))
    sys.stdout.reconfigure(encoding="utf-8", errors="backslashreplace")
    args = read_flags(argv)
    try:
        run(args)
        sys.stdout.flush()
    except KeyboardInterrupt:
        sys.exit(130)
    except ValueError as e:
        fail(str(e))
    except MEMORY as e:
        if not isinstance(e, MemoryError) and "memory" not in str(e):
            raise
        fail(f"out of memory on {args.device}: lower --batch, --samples or --max-new-tokens, or take a smaller model")
    except OSError as e:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # nothing more can be written, not even at the end
        if not isinstance(e, BrokenPipeError):  # the reader, say head, has seen enough
            fail(f"{e.filename or 'standard output'}: {e.strerror or e}")


if __name__ == "__main__":
    main()
