"""Text to token shards: the data that train.py, eval.py and sample.py read.

    python prepare.py python --out data/python                          # the standard library's own text: no download
    python prepare.py fineweb-edu --out data/edu --tokenizer gpt2 --max-tokens 1e9             # streamed from the hub
    python prepare.py hf:roneneldan/TinyStories --out data/stories --tokenizer train:8192
    python prepare.py notes.txt 'books/**/*.jsonl.zst' --out data/books --val-fraction 0.02

Sources, one or several
    python            the Python that runs this: documentation topics, .py sources without tests, built-in docstrings
    fineweb-edu       HuggingFaceTB/smollm-corpus, fineweb-edu-dedup (the corpus of the MoR paper)
    hf:NAME[:CONFIG]  any dataset of the Hugging Face hub with a text column, streamed; its split "train"
    FILE or 'GLOB'    .txt, .jsonl, .parquet, plain or .gz/.zst. A .txt file is cut into documents at lines that say
                      <|endoftext|> and at the first blank line after 16 KiB; the others hold one document a row.

Tokenizers
    train:N           byte-level BPE with a vocabulary of N (end-of-text included), trained on the first 64 MB
    gpt2, cl100k_base, o200k_base, ...    tiktoken's, downloaded once or found in TIKTOKEN_CACHE_DIR
    FILE.tiktoken     a rank file; one that is not OpenAI's own is split by GPT-2's pattern
    DIR               the one of prepared data, of a run, or of a Hugging Face model (tokenizer.json, a byte-level BPE
                      as SmolLM's, Llama 3's or GPT-2's): for uptraining. It is converted, if tiktoken gives its ids.

The output directory holds train_%06d.bin and val_%06d.bin in the layout of llm.c and modded-nanogpt (a header of 256
int32: magic, version, count; then uint16, or uint32 for vocabularies above 65536), meta.json, and the rank file unless
the tokenizer is known by name. Shards that others made (FineWeb of llm.c, without meta.json) are read as well. Every
document ends with the end-of-text token. A document goes to val when the md5 of its text, read as a fraction of 2^128,
is below --val-fraction: a text is on the same side whatever else is in the corpus. All is written to NAME.partial,
which becomes NAME by one rename at the end: an interrupted run leaves nothing that looks like data, and the next run
replaces what it left.
"""

import argparse
import base64
import codecs
import fcntl
import glob
import hashlib
import importlib.machinery
import importlib.util
import io
import json
import os
import shutil
import sys
import tempfile
import time
import tokenize
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property, partial
from itertools import chain
from pathlib import Path
from typing import NoReturn

import numpy as np
import tiktoken
import tiktoken.load as tiktoken_load

EOT = "<|endoftext|>"
# GPT-2's split pattern in tiktoken's spelling: equivalent to the original and to HF's ByteLevel, but faster
GPT2_PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""
# the same after HF's Digits(individual_digits=True), as SmolLM has it: a digit alone, with no space before it
DIGITS_PATTERN = r"""'(?:[sdmt]|ll|ve|re)|\p{N}| ?\p{L}++| ?[^\s\p{L}\p{N}]++|\s++(?:$|(?=\p{N}))|\s+(?!\S)|\s"""
# text that tokenizers differ on
PROBE = (
    "The quick brown fox can't jump 12345 times,\n\tself.x  = [0x1F] \n 7;\r\n na\u00efve \u4eac\u90fd \U0001f642 <b>"
)
# (magic, version) of a shard -> dtype of its tokens
SHARD_FORMATS = {(20240520, 1): np.dtype("<u2"), (20240801, 7): np.dtype("<u4")}
HEADER_BYTES = 1024


def fail(message: str) -> NoReturn:
    """End the program over a user's mistake: one `error:` line, exit status 2."""
    print("error:", " ".join(str(message).split()), file=sys.stderr)
    sys.exit(2)


class Parser(argparse.ArgumentParser):
    """argparse with the same one-line errors as everything else."""

    def error(self, message: str) -> NoReturn:
        fail(f"{message} (see {self.prog} --help)")


# ---------------------------------------------------------------------------------------------------------------------
# Reading prepared data: what the other scripts import


def load_meta(directory: str | Path) -> dict:
    """meta.json of a data directory. Shards without one (llm.c's) count as GPT-2's; bytes and documents are None."""
    directory = Path(directory)
    if not directory.is_dir():
        fail(f"{directory}: no such data directory; make it with: python prepare.py python --out {directory}")
    path = directory / "meta.json"
    if not path.exists():
        train, val = Shards(directory, "train"), Shards(directory, "val")
        if train.dtype.itemsize != 2:
            fail(f"{directory}: uint32 shards need a meta.json that names their tokenizer, vocab_size and eot")
        meta = dict(vocab_size=50257, tokenizer="gpt2", eot=50256, train_tokens=len(train), val_tokens=len(val))
        meta |= dict(train_documents=None, val_documents=None, train_bytes=None, val_bytes=None)
        return meta | dict(source=str(directory), val_fraction=None, split="as found")
    try:
        meta = json.loads(path.read_text())
        missing = {"vocab_size", "tokenizer", "eot", "train_tokens", "val_tokens"} - set(meta)
    except (ValueError, TypeError, OSError) as e:
        fail(f"{path}: cannot be read ({e}); make the directory again with prepare.py")
    if missing:
        fail(f"{path}: has no {', '.join(sorted(missing))}; make the directory again with prepare.py")
    return meta


class Shards:
    """The tokens of one split, memory-mapped; every header is checked against its file before the first read.

    Attributes: files (paths in order), dtype (uint16 or uint32, on disk). len() is the number of tokens.
    """

    def __init__(self, directory: str | Path, split: str):
        # llm.c names its shards fineweb_train_000001.bin: any prefix will do
        self.files = sorted(Path(directory).glob(f"*{split}_*.bin"))
        if not self.files:
            fail(f"{directory}: no {split}_*.bin in it; make data with: python prepare.py python --out data/python")
        self.maps = []
        for path in self.files:
            header, size = np.fromfile(path, "<i4", 256).tolist(), path.stat().st_size
            if len(header) < 256 or tuple(header[:2]) not in SHARD_FORMATS:
                fail(f"{path}: not a token shard (magic, version {header[:2]}; 20240520, 1 or 20240801, 7 expected)")
            dtype, count = SHARD_FORMATS[tuple(header[:2])], header[2]
            if count < 0 or size != HEADER_BYTES + count * dtype.itemsize:
                fail(
                    f"{path}: damaged: its header says {count} tokens, the file has {size} bytes; make or copy it again"
                )
            # mmap cannot map nothing
            self.maps.append(np.memmap(path, dtype, "r", HEADER_BYTES, count) if count else np.empty(0, dtype))
        self.dtype = self.maps[0].dtype
        if any(m.dtype != self.dtype for m in self.maps):
            fail(f"{directory}: uint16 and uint32 {split} shards are mixed; keep one kind")
        self.ends = np.cumsum([len(m) for m in self.maps])  # [shards]

    def __len__(self) -> int:
        return int(self.ends[-1])

    def blocks(self, T: int, tokens: int) -> np.ndarray:
        """int64 [E, T+1]: about `tokens` tokens as blocks spread evenly over the split; fixed, so losses compare."""
        available = (len(self) - 1) // T
        picks = np.linspace(0, available - 1, min(available, max(1, tokens // T))).round().astype(int)
        return np.stack([self.tokens(int(i) * T, T + 1) for i in picks])

    def tokens(self, start: int, length: int) -> np.ndarray:
        """int64 [length]: tokens start .. start+length of the split, across shard borders. IndexError outside of it."""
        if start < 0 or length < 0 or start + length > len(self):
            raise IndexError(f"tokens {start} to {start + length} of a split of {len(self)}")
        out, done = np.empty(length, np.int64), 0
        shard = int(np.searchsorted(self.ends, start, side="right"))
        while done < length:
            offset = start + done - int(self.ends[shard]) + len(self.maps[shard])
            part = self.maps[shard][offset : offset + length - done]
            out[done : done + len(part)] = part
            done, shard = done + len(part), shard + 1
        return out


def tokenizer_file(directory: str | Path) -> Path | None:
    """The rank file, or else tokenizer.json, in a directory of data, of a run, or of weights."""
    files = [*sorted(Path(directory).glob("*.tiktoken")), *Path(directory).glob("tokenizer.json")]
    return files[0] if files else None


def find_tokenizer(name: str | Path) -> str:
    """`name`, or what it stands for if it is a directory."""
    if not Path(name).is_dir():
        return str(name)
    file = tokenizer_file(name)
    if not file and not any(Path(name).glob("*.bin")):
        fail(f"tokenizer {name}: the directory holds no .tiktoken file and no tokenizer.json; name another")
    return str(file or load_meta(name)["tokenizer"])


def load_tokenizer(name_or_path: str | Path) -> tiktoken.Encoding:
    """A tiktoken encoding by name, from a .tiktoken rank file or a tokenizer.json, or the one of a directory."""
    name, names = find_tokenizer(name_or_path), tiktoken.list_encoding_names()
    if name.endswith(".tiktoken"):
        return load_ranks(Path(name))
    if name.endswith(".json"):
        return load_tokenizer_json(Path(name))
    if name not in names:
        fail(f"unknown tokenizer {name!r}: use train:N, FILE.tiktoken, a directory that has one, or {', '.join(names)}")
    if cache := os.environ.get("TIKTOKEN_CACHE_DIR"):
        # tiktoken itself looks only for a file named by the SHA-1 of the address
        if (file := Path(cache, f"{name}.tiktoken")).exists():
            return load_ranks(file)
    import requests

    # tiktoken sets no timeout: behind a firewall that drops packets it would wait for minutes
    tiktoken_load.read_file = lambda url: requests.get(url, timeout=(4, 60)).content
    # r50k_base is gpt2's vocabulary in another file, which may be the one in the cache
    for candidate in [name, "r50k_base"] if name == "gpt2" else [name]:
        try:
            return tiktoken.get_encoding(candidate)
        except (requests.RequestException, ValueError, OSError) as e:  # ValueError: not the file that its hash says
            reason = type(e).__name__
    fail(
        f"tokenizer {name} cannot be downloaded ({reason}). Without a network, set TIKTOKEN_CACHE_DIR to a directory "
        f"with {name}.tiktoken in it, or give --tokenizer the path of that file (gpt2.tiktoken is in the PyPI package "
        "mlx-whisper: pip download --no-deps mlx-whisper && unzip -j mlx_whisper*.whl '*/gpt2.tiktoken'), "
        "or train one: --tokenizer train:8192"
    )


class Lossy(tiktoken.Encoding):
    """A vocabulary that lacks some of the 256 bytes, as SmolLM's does: they are left out, which is what HF tokenizers
    do; tiktoken would crash."""

    @cached_property
    def missing(self) -> bytes:
        return bytes(set(range(256)) - {t[0] for t in self.token_byte_values() if len(t) == 1})

    def encode_ordinary(self, text: str) -> list[int]:
        import regex  # tiktoken depends on it

        raw = text.encode()
        if len(raw.translate(None, self.missing)) == len(raw):
            return super().encode_ordinary(text)
        pieces = (m[0].encode().translate(None, self.missing) for m in regex.finditer(self._pat_str, text))
        return [token for piece in pieces if piece for token in self._encode_single_piece(piece)]

    def encode_to_numpy(self, text: str, **options) -> np.ndarray:
        return np.array(self.encode_ordinary(text), np.uint32)


def write_ranks(path: Path, encoding: tiktoken.Encoding) -> None:
    """A rank file; pattern and special tokens, where they are not GPT-2's, go into a first line of our own."""
    ranks, pattern, special = encoding._mergeable_ranks, encoding._pat_str, encoding._special_tokens
    usual = pattern == GPT2_PATTERN and special == {EOT: max(ranks.values()) + 1}
    lines = [] if usual else [b"#" + json.dumps(dict(pattern=pattern, special=special)).encode()]
    lines += [base64.b64encode(token) + b" %d" % rank for token, rank in sorted(ranks.items(), key=lambda x: x[1])]
    path.write_bytes(b"\n".join(lines) + b"\n")


def load_ranks(path: Path) -> tiktoken.Encoding:
    """The encoding of a rank file (lines of base64 token, space, rank); end-of-text gets the first free id."""
    try:
        data = path.read_bytes()
    except OSError as e:
        fail(f"tokenizer {path}: {e.strerror}")
    # OpenAI's later encodings have patterns and special tokens of their own: recognise their files by tiktoken's hashes
    from tiktoken_ext import openai_public

    known = {
        "223921b76ee99bde995b7ff738513eef100fb51d18c93597a113bcffe865b2a7": openai_public.cl100k_base,
        "446a9538cb6c348e3516120d7c08b09f57c36495e2acfffe59a5bf8b0cfb1a2d": openai_public.o200k_base,
        "94b5ca7dff4d00767bc256fdd1b27e5b17361d7b8a5f968547f9f23eb70d2069": openai_public.p50k_base,
    }
    constructor = known.get(hashlib.sha256(data).hexdigest())
    if constructor:
        tiktoken_load.read_file = lambda url: data
        return tiktoken.Encoding(**constructor())
    ranks, more = {}, {}
    for number, line in enumerate(data.splitlines(), 1):
        try:
            if number == 1 and line.startswith(b"#"):
                more = json.loads(line[1:])
                continue
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except ValueError:
            fail(f"tokenizer {path}: line {number} is not a base64 token and its rank")
    distinct = len(set(ranks.values())) == len(ranks) and min(ranks.values(), default=0) >= 0
    if not distinct or (not more and any(bytes([b]) not in ranks for b in range(256))):
        fail(f"tokenizer {path}: needs all 256 single bytes and a rank of its own for each token")
    return make_encoding(path.stem, ranks, **more)


def make_encoding(
    name: str, ranks: dict[bytes, int], pattern: str = GPT2_PATTERN, special: dict[str, int] | None = None
) -> tiktoken.Encoding:
    special = special or {EOT: max(ranks.values()) + 1}
    whole = all(bytes([b]) in ranks for b in range(256))
    kind = tiktoken.Encoding if whole else Lossy
    return kind(name, pat_str=pattern, mergeable_ranks=ranks, special_tokens=special)


def byte_alphabet() -> dict[str, int]:
    """How HF's ByteLevel writes bytes: printable characters as themselves, the other 68 as U+0100 and on."""
    printable = [b for b in range(256) if b in range(33, 127) or b in range(161, 173) or b in range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}


def load_tokenizer_json(path: Path) -> tiktoken.Encoding:
    """The byte-level BPE of a Hugging Face tokenizer.json, where tiktoken can express it."""
    try:
        t = json.loads(path.read_text())
        model, steps = t["model"], t["pre_tokenizer"]
        steps = steps["pretokenizers"] if steps["type"] == "Sequence" else [steps]
        last, kinds = steps[-1], [s["type"] for s in steps]
        gpt2 = last.get("use_regex", True)  # splits by GPT-2's pattern itself
        special = {a["content"]: a["id"] for a in t["added_tokens"]}
        letters, vocab = byte_alphabet(), {w: i for w, i in model["vocab"].items() if w not in special}
        merged = list(dict.fromkeys(vocab["".join(m.split(" ") if isinstance(m, str) else m)] for m in model["merges"]))
        bad = {  # what tiktoken has no switch for
            "normalizer": t["normalizer"],
            "end_of_word_suffix": model.get("end_of_word_suffix"),
            "continuing_subword_prefix": model.get("continuing_subword_prefix"),
            "add_prefix_space": last.get("add_prefix_space"),
            "added tokens that are not special": [a["content"] for a in t["added_tokens"] if not a["special"]][:3],
            "merges in another order than ids": merged != sorted(merged),
            "tokens that are not bytes": [w for w in vocab if not set(w) <= letters.keys()][:3],
        }
        if kinds == ["ByteLevel"] and gpt2:
            pattern = GPT2_PATTERN
        elif kinds == ["Digits", "ByteLevel"] and gpt2 and steps[0]["individual_digits"]:
            pattern = DIGITS_PATTERN
        elif kinds == ["Split", "ByteLevel"] and not gpt2:
            pattern = steps[0]["pattern"]["Regex"]
            bad["split"] = (steps[0]["behavior"], steps[0]["invert"]) not in (("Isolated", False), ("Removed", True))
        else:
            bad["pre_tokenizer"] = ", ".join(kinds)
    except OSError as e:
        fail(f"tokenizer {path}: {e.strerror}")
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        fail(f"tokenizer {path}: not a byte-level BPE of Hugging Face ({type(e).__name__}: {e}); use another tokenizer")
    if bad := [f"{name} ({value})" for name, value in bad.items() if value]:
        fail(f"tokenizer {path}: tiktoken has nothing like its {', '.join(bad)}; use another tokenizer")
    ranks = {bytes(letters[c] for c in w): i for w, i in vocab.items()}
    eot = next((name for name in (EOT, "<|end_of_text|>", "</s>") if name in special), None)
    if eot is None:
        fail(f"tokenizer {path}: has no {EOT}, <|end_of_text|> or </s> to end documents with; use another tokenizer")
    try:
        return make_encoding(path.parent.absolute().name, ranks, pattern, {EOT: special.pop(eot)} | special)
    except ValueError as e:
        fail(f"tokenizer {path}: tiktoken cannot split by its pattern ({e}); use another tokenizer")


def same_tokenizer(a: tiktoken.Encoding, b: tiktoken.Encoding) -> bool:
    return a._mergeable_ranks == b._mergeable_ranks and a.encode_ordinary(PROBE) == b.encode_ordinary(PROBE)


def check_tokenizer(weights: str | Path, encoding: tiktoken.Encoding) -> None:
    """fail()s if a directory of weights has a tokenizer, and it is not the `encoding` of the data."""
    if (file := tokenizer_file(weights)) and not same_tokenizer(load_tokenizer(file), encoding):
        fail(
            f"the data's tokenizer {encoding.name} is not {file}, which the weights were made with; prepare the data "
            f"with it: --tokenizer {weights}"
        )


# ---------------------------------------------------------------------------------------------------------------------
# Sources: every one is an iterator of documents (str)


def resolve(sources: list[str]) -> list[str | Path]:
    """The sources with globs expanded into paths; fails over a missing or unknown file before anything is read."""
    resolved: list[str | Path] = []
    for source in sources:
        if source == "hf:":
            fail("hf: needs the name of a dataset, as hf:roneneldan/TinyStories")
        if source in ("python", "fineweb-edu") or source.startswith("hf:"):
            resolved.append(source)
            continue
        paths = [source] if os.path.exists(source) else sorted(glob.glob(source, recursive=True))
        if not paths:
            fail(f"{source}: no such file; sources are python, fineweb-edu, hf:NAME[:CONFIG], files and 'globs'")
        for path in map(Path, paths):
            if path.is_dir():
                fail(f"{path}: is a directory; give its files, such as '{path}/**/*.jsonl'")
            if kind(path) not in (".txt", ".jsonl", ".parquet"):
                fail(f"{path}: unknown kind of file; .txt, .jsonl, .parquet (also .gz, .zst) can be read")
            resolved.append(path)
    return resolved


def kind(path: Path) -> str:
    """The file's suffix beneath its compression."""
    return (path.with_suffix("") if path.suffix in (".gz", ".zst") else path).suffix


def read_documents(sources: list[str | Path], field: str) -> Iterator[str]:
    for source in sources:
        if source == "python":
            yield from python_documents()
        elif source == "fineweb-edu":
            yield from hub_documents("HuggingFaceTB/smollm-corpus", "fineweb-edu-dedup", field)
        elif isinstance(source, str):
            name, _, config = source.removeprefix("hf:").partition(":")
            yield from hub_documents(name, config or None, field)
        else:
            read = {".txt": txt_documents, ".jsonl": jsonl_documents, ".parquet": parquet_documents}[kind(source)]
            try:
                yield from read(source, field)
            except (OSError, EOFError) as e:  # missing rights, damaged compression
                fail(f"{source}: cannot be read ({e.strerror or e if isinstance(e, OSError) else e})")


# .txt and .jsonl are read by these few lines and not by `datasets`, which was measured: it reads JSON lines at 33 MB/s
# where json.loads does 500 (two threads tokenize 26), it infers a schema from the first rows and stops at a later row
# of another type in a column that nobody asked for, and its errors name neither file nor line.


def open_bytes(path: Path) -> io.BufferedReader:
    if path.suffix not in (".gz", ".zst"):
        return path.open("rb")
    # pyarrow reads files of several gzip members or zstd frames, and a cut one is an error; zstandard.open() stops
    # silently after the first frame
    import pyarrow as pa

    return io.BufferedReader(pa.input_stream(str(path), compression="gzip" if path.suffix == ".gz" else "zstd"))


def txt_documents(path: Path, field: str) -> Iterator[str]:
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    lines, size, number = [], 0, 0
    with open_bytes(path) as file:
        while data := file.readline(1 << 20):  # bounded: a file may be one line
            number += 1
            try:
                line = decoder.decode(data)
            except UnicodeDecodeError as e:
                fail(f"{path}: line {number} is not UTF-8 text ({e.reason}); convert the file, for example with iconv")
            if end := line.strip() == EOT:
                line = ""
            lines.append(line)
            size += len(line)
            if end or size >= 1 << 20 or (size >= 1 << 14 and line.isspace()):
                yield "".join(lines)
                lines, size = [], 0
    if decoder.getstate()[0]:
        fail(f"{path}: line {number} is not UTF-8 text (its last character is cut); repair the file")
    yield "".join(lines)


def jsonl_documents(path: Path, field: str) -> Iterator[str]:
    with open_bytes(path) as file:
        for number, line in enumerate(file, 1):
            if line.isspace():
                continue
            try:
                row = json.loads(line)
            except UnicodeDecodeError as e:
                fail(f"{path}: line {number} is not UTF-8 text ({e.reason}); convert the file, for example with iconv")
            except (ValueError, RecursionError) as e:
                fail(f"{path}: line {number} is not JSON ({e})")
            text = row.get(field) if isinstance(row, dict) else None
            if not isinstance(text, str):
                fail(f'{path}: line {number} has no text: {{"{field}": "..."}} expected; --field names another field')
            # JSON can hold half a surrogate pair, which no tokenizer takes
            yield text.encode("utf-8", "replace").decode() if b"\\u" in line else text


def parquet_documents(path: Path, field: str) -> Iterator[str]:
    with tempfile.NamedTemporaryFile(suffix=".parquet") as plain:
        if path.suffix in (".gz", ".zst"):  # parquet is read from its end: unpack it
            with open_bytes(path) as file:
                shutil.copyfileobj(file, plain)
            plain.flush()
        name = str(path) if path.suffix == ".parquet" else plain.name
        yield from dataset_documents(str(path), field, "parquet", data_files=name)


def ask_hub(name: str) -> None:
    """fail()s if the hub cannot give the dataset. `datasets` retries an unreachable hub for half a minute and then
    names no cause: ask once, first."""
    import huggingface_hub
    from huggingface_hub import errors

    try:
        huggingface_hub.HfApi().dataset_info(name, timeout=8)
    except errors.GatedRepoError:
        fail(f"hf:{name} is gated: accept its terms on the hub, then run: hf auth login")
    except (errors.RepositoryNotFoundError, errors.HFValidationError):
        fail(f"hf:{name}: the hub has no such dataset (a private one needs: hf auth login)")
    except Exception as e:  # the hub's client raises what its HTTP library of the day raises
        fail(
            f"hf:{name}: the hub cannot be reached ({type(e).__name__}: {e}). Check the network (HTTPS_PROXY, "
            "HF_ENDPOINT for a mirror, HF_HUB_OFFLINE unset), or read local files: prepare.py FILE or python, "
            "eval.py --task-data DIR"
        )


def hub_documents(name: str, config: str | None, field: str) -> Iterator[str]:
    """Stream the split "train" of a hub dataset, or of a local dataset directory."""
    if not Path(name).is_dir():
        ask_hub(name)
    yield from dataset_documents(f"hf:{name}", field, name, config)


def dataset_documents(label: str, field: str, *args, **kwargs) -> Iterator[str]:
    import datasets

    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # the error below says it once
    try:
        rows = datasets.load_dataset(*args, split="train", streaming=True, **kwargs)
        if rows.column_names and field not in rows.column_names:
            fail(f"{label}: no column {field!r}, it has {', '.join(rows.column_names)}; name one with --field")
        if rows.column_names:
            rows = rows.select_columns([field])  # parquet then reads no other column
        for number, row in enumerate(rows, 1):
            if not isinstance(row.get(field), str):
                fail(f"{label}: row {number} has no text in {field!r}; --field names another column")
            yield row[field]
    except Exception as e:  # likewise: anything from a bad configuration name to a broken download
        fail(f"{label}: cannot be read ({type(e).__name__}: {e})")


def python_documents() -> Iterator[str]:
    """The running interpreter's topics, its .py sources, and the docstrings of modules that have no .py source."""
    from pydoc_data.topics import topics

    yield from (topics[name] for name in sorted(topics))
    library = Path(os.__file__).parent
    # encodings: tables, not text; pydoc_data: the topics again
    skip = {"test", "tests", "idle_test", "site-packages", "dist-packages", "encodings", "pydoc_data"}
    for path in sorted(library.rglob("*.py")):
        if skip.isdisjoint(path.relative_to(library).parts):
            with tokenize.open(path) as file:  # obeys the source's coding line
                yield file.read()
    for name in sorted(sys.stdlib_module_names):
        # docstrings of .py modules are in their sources; a second copy could sit in train and in val
        if "test" not in name and not name.startswith("xx") and is_compiled(name):
            yield docstrings(name)


def is_compiled(name: str) -> bool:
    spec = importlib.util.find_spec(name) if name != "__main__" else None
    suffixes = tuple(importlib.machinery.EXTENSION_SUFFIXES)
    return spec is not None and (spec.origin == "built-in" or str(spec.origin).endswith(suffixes))


def docstrings(name: str) -> str:
    """The docstrings of a module, its functions and classes and their methods, each under its name."""
    try:
        module = importlib.import_module(name)
    except ImportError:  # compiled without its library: _tkinter, _dbm
        return ""
    seen, parts = set(), []

    def visit(label, thing):
        doc = getattr(thing, "__doc__", None)
        if isinstance(doc, str) and doc not in seen:  # inherited ones repeat
            seen.add(doc)
            parts.append(f"{label}\n\n{doc.strip()}\n")
            if isinstance(thing, type):
                for key, value in sorted(vars(thing).items()):
                    visit(f"{label}.{key}", value)

    visit(name, module)
    for key, value in sorted(vars(module).items()):
        if callable(value):
            visit(f"{name}.{key}", value)
    return "\n".join(parts)


# ---------------------------------------------------------------------------------------------------------------------
# Tokens


def is_val(text: bytes, fraction: float) -> tuple[bool, float]:
    """Whether a document belongs to val, and the number in [0, 1) that says so."""
    place = int.from_bytes(hashlib.md5(text).digest(), "big") / 2**128
    return place < fraction, place


def train_tokenizer(documents: Iterable[str], vocab_size: int, val_fraction: float, path: Path) -> tiktoken.Encoding:
    """Train a byte-level BPE with GPT-2's pattern on the train documents of the first 64 MB; write the rank file."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    held_out: list[str] = []

    def sample():
        size = 0
        for text in documents:
            size += len(text)
            if not is_val(text.encode(), val_fraction)[0]:
                yield text
            elif len(held_out) < 100:
                held_out.append(text)
            if size > 64e6:
                return

    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 1, initial_alphabet=alphabet, show_progress=sys.stderr.isatty(), special_tokens=[]
    )
    bpe.train_from_iterator(sample(), trainer)
    letters = byte_alphabet()
    assert set(letters) == set(alphabet), "the byte alphabet of HF tokenizers has changed"
    ranks = {bytes(letters[c] for c in token): rank for token, rank in bpe.get_vocab().items()}
    write_ranks(path, make_encoding(path.stem, ranks))
    encoding = load_ranks(path)
    if text := difference(encoding, bpe, held_out):
        fail(f"train:{vocab_size}: tiktoken and tokenizers disagree on {text[:40]!r}...; choose another size")
    return encoding


def difference(encoding: tiktoken.Encoding, bpe, texts: list[str]) -> str | None:
    """The first of the texts, and of all tokens of the vocabulary, for which the HF tokenizer `bpe` gives other ids. It
    applies the list of merges, tiktoken any merge whose result is a token: equal in practice, so make sure."""
    for text in [PROBE, *texts, *(t.decode("utf-8", "replace") for t in encoding.token_byte_values())]:
        if encoding.encode_ordinary(text) != bpe.encode(text, add_special_tokens=False).ids:
            return text
    return None


def convert_tokenizer(path: Path, encoding: tiktoken.Encoding, documents: Iterable[str], out: Path) -> None:
    """Write the rank file of a tokenizer.json, after a comparison on the first 2 MB of the corpus."""
    from tokenizers import Tokenizer

    # their own tokenizer without special tokens: in a corpus, the names of those are plain text
    bare = json.loads(path.read_text()) | {"added_tokens": [], "post_processor": None}
    texts, size = [], 0
    for text in documents:
        texts.append(text)
        size += len(text)
        if size > 2e6:
            break
    if text := difference(encoding, Tokenizer.from_str(json.dumps(bare)), texts):
        fail(f"tokenizer {path}: tiktoken gives other ids for {text[:40]!r}...; use another tokenizer")
    write_ranks(out, encoding)


def save_tokenizer(enc: tiktoken.Encoding, directory: Path) -> None:
    """Write tokenizer.json for transformers; where that would not give the same ids, the rank file instead."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    letters, ranks, merges = {b: c for c, b in byte_alphabet().items()}, enc._mergeable_ranks, []

    def spell(token: bytes) -> str:
        return "".join(letters[b] for b in token)

    for token in sorted(ranks, key=ranks.get):  # what a token was merged from: its own split by the ranks below its own
        parts = [bytes([b]) for b in token]
        while len(parts) > 2:
            i = min(range(len(parts) - 1), key=lambda i: ranks.get(parts[i] + parts[i + 1], 1 << 62))
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
        if len(parts) == 2:
            merges.append((spell(parts[0]), spell(parts[1])))
    special = enc._special_tokens
    bpe = Tokenizer(models.BPE({spell(t): i for t, i in ranks.items()} | special, merges, ignore_merges=True))
    split = pre_tokenizers.Split(Regex(enc._pat_str.replace("{1,3}+", "{1,3}")), "isolated")
    bpe.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
    bpe.decoder = decoders.ByteLevel()
    if difference(enc, bpe, []) is not None:
        return write_ranks(directory / f"{enc.name}.tiktoken", enc)
    bpe.add_special_tokens(list(special))
    bpe.save(str(directory / "tokenizer.json"))
    config = dict(tokenizer_class="PreTrainedTokenizerFast", bos_token=EOT, eos_token=EOT)
    (directory / "tokenizer_config.json").write_text(json.dumps(config))


class ShardWriter:
    """Appends tokens to {split}_%06d.bin; the header of each, with its count, is written last."""

    def __init__(self, directory: Path, split: str, dtype: np.dtype, limit: int):
        self.directory, self.split, self.dtype, self.limit = directory, split, dtype, limit
        self.file, self.shard, self.count, self.total = None, 0, 0, 0

    def write(self, tokens: np.ndarray) -> None:
        self.total += len(tokens)
        while len(tokens):
            if self.file is None:
                self.file = open(self.directory / f"{self.split}_{self.shard:06d}.bin", "wb")
                self.file.write(bytes(HEADER_BYTES))
            part, tokens = tokens[: self.limit - self.count], tokens[self.limit - self.count :]
            self.file.write(part.data)
            self.count += len(part)
            if self.count == self.limit:
                self.close()

    def close(self) -> None:
        if self.file is None:
            return
        header = np.zeros(256, "<i4")
        header[:2] = next(key for key, dtype in SHARD_FORMATS.items() if dtype == self.dtype)
        header[2] = self.count
        self.file.seek(0)
        self.file.write(header.data)
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()
        self.file, self.shard, self.count = None, self.shard + 1, 0


def batches(documents: Iterable[str], size: int = 1 << 20) -> Iterator[list[str]]:
    """Documents that are not blank, in lists of about `size` characters."""
    batch, total = [], 0
    for text in documents:
        if text and not text.isspace():
            batch.append(text)
            total += len(text)
        if total >= size:
            yield batch
            batch, total = [], 0
    if batch:
        yield batch


def encode(batch: list[str], encoding: tiktoken.Encoding, dtype: np.dtype, fraction: float) -> list[tuple]:
    """(is val, place, bytes, tokens with end-of-text) of each document."""
    rows = []
    for text in batch:
        raw = text.encode()
        ids = encoding.encode_to_numpy(text, disallowed_special=())
        rows.append((*is_val(raw, fraction), len(raw), np.append(ids, encoding.eot_token).astype(dtype)))
    return rows


def in_order(pool: ThreadPoolExecutor, function: Callable, items: Iterable, ahead: int) -> Iterator:
    """pool.map that takes no more than `ahead` items before their turn (pool.map takes them all: the whole corpus)."""
    flying: deque = deque()
    for item in items:
        flying.append(pool.submit(function, item))
        if len(flying) > ahead:
            yield flying.popleft().result()
    while flying:
        yield flying.popleft().result()


def write_shards(sources: list[str | Path], encoding: tiktoken.Encoding, directory: Path, args) -> dict:
    """Tokenize into both splits' shards; returns the counts for meta.json.

    Threads, not processes: tiktoken releases the GIL. Two threads were measured at 26 MB/s where one does 16, and
    nothing is pickled. Few batches are under way, so memory does not grow with the corpus.
    """
    from tqdm import tqdm

    dtype = np.dtype("<u4" if args.dtype == "uint32" or (args.dtype == "auto" and encoding.n_vocab > 65536) else "<u2")
    writers = [ShardWriter(directory, split, dtype, args.shard_tokens) for split in ("train", "val")]
    documents, sizes, lowest, highest = [0, 0], [0, 0], 1.0, 0.0
    plain = all(isinstance(s, Path) and s.suffix in (".txt", ".jsonl") for s in sources)
    total = sum(s.stat().st_size for s in sources) if plain else None  # of the files; the text in them is less
    bar = tqdm(total=total, unit="B", unit_scale=True, desc="tokenize", disable=None)
    with bar, ThreadPoolExecutor(args.threads) as pool:
        work = partial(encode, encoding=encoding, dtype=dtype, fraction=args.val_fraction)
        done = in_order(pool, work, batches(read_documents(sources, args.field)), 2 * args.threads)
        for val, place, size, tokens in chain.from_iterable(done):
            writers[val].write(tokens)
            documents[val] += 1
            sizes[val] += size
            lowest, highest = min(lowest, place), max(highest, place)
            bar.update(size)
            if args.max_tokens and writers[0].total >= args.max_tokens:
                break
    for writer in writers:
        writer.close()
    if sum(documents) == 0:
        fail(f"{' '.join(args.source)}: no text found")
    if sum(documents) == 1:
        fail(f"{' '.join(args.source)}: only one document, which cannot be split into train and val; add more text")
    if documents[1] == 0:
        fail(f"none of the {documents[0]} documents is in val: --val-fraction {lowest + 1e-3:.3f} takes the first")
    if documents[0] == 0:
        fail(
            f"all {documents[1]} documents are in val: --val-fraction {highest - 1e-3:.3f} or less leaves some to train"
        )
    meta = {}
    for i, split in enumerate(("train", "val")):
        meta |= {f"{split}_tokens": writers[i].total, f"{split}_documents": documents[i], f"{split}_bytes": sizes[i]}
    return meta | {"dtype": dtype.name}


# ---------------------------------------------------------------------------------------------------------------------
# Command line


def write_meta(path: Path, meta: dict) -> None:
    with path.open("w") as file:
        json.dump(meta, file, indent=1)
        file.flush()
        os.fsync(file.fileno())


def claim(out: Path, overwrite: bool) -> tuple[Path, int]:
    """An empty, locked directory OUT.partial and the lock's descriptor."""
    if out.exists() and not out.is_dir():
        fail(f"--out {out}: is a file")
    if out.exists() and any(out.iterdir()):
        if not (out / "meta.json").exists():
            fail(f"--out {out}: exists and was not made by prepare.py; name another directory")
        if not overwrite:
            fail(f"--out {out}: is prepared already; use it, name another directory, or replace it with --overwrite")
    partial_out = out.with_name(out.name + ".partial")
    partial_out.mkdir(parents=True, exist_ok=True)
    lock = os.open(partial_out, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        fail(f"--out {out}: another prepare.py is writing it; wait for that one or name another directory")
    for path in partial_out.iterdir():  # what an interrupted run left
        path.unlink()
    return partial_out, lock


def publish(partial_out: Path, out: Path) -> None:
    """OUT.partial becomes OUT. A directory that it replaces is moved away first, since rename wants an empty target."""
    if out.exists() and any(out.iterdir()):
        old = out.with_name(out.name + ".old")
        shutil.rmtree(old, ignore_errors=True)
        out.rename(old)
        partial_out.rename(out)
        shutil.rmtree(old)
    else:
        partial_out.rename(out)
    parent = os.open(out.parent, os.O_RDONLY)
    os.fsync(parent)
    os.close(parent)


def prepare(args: argparse.Namespace) -> dict:
    """Everything between the command line and the finished directory; returns meta.json's dict."""
    sources = resolve(args.source)
    name, size = find_tokenizer(args.tokenizer), 0
    if name.startswith("train:"):
        if not name[6:].isdecimal() or not 257 <= int(name[6:]) <= 1 << 20:
            fail(
                f"--tokenizer {name}: train:N needs N from 257 (256 bytes and end-of-text) to {1 << 20}, as train:8192"
            )
        size = int(name[6:])
    else:
        encoding = load_tokenizer(name)
        size = encoding.n_vocab
    if args.dtype == "uint16" and size > 65536:
        fail(f"--dtype uint16 holds ids below 65536, the vocabulary of {name} has {size}: use --dtype uint32 or auto")
    if args.shard_tokens >= 2**31:
        fail(f"--shard-tokens {args.shard_tokens}: the count in a shard's header is an int32, below {2**31}")
    out, lock = claim(args.out, args.overwrite)
    try:
        if name.startswith("train:"):
            name = f"bpe{size}.tiktoken"
            encoding = train_tokenizer(read_documents(sources, args.field), size, args.val_fraction, out / name)
            if encoding.n_vocab < size:
                print(f"note: the corpus has no more pairs to merge: vocabulary {encoding.n_vocab}, not {size}")
        elif name.endswith(".tiktoken"):
            name = shutil.copyfile(name, out / Path(name).name).name
        elif name.endswith(".json"):
            path, name = Path(name), f"{encoding.name}.tiktoken"
            convert_tokenizer(path, encoding, read_documents(sources, args.field), out / name)
        meta = write_shards(sources, encoding, out, args)
        meta = {"vocab_size": encoding.n_vocab, "tokenizer": name, "eot": encoding.eot_token} | meta
        meta |= {"source": " ".join(args.source), "val_fraction": args.val_fraction, "split": "md5 of the text"}
        if "python" in sources:
            meta["python"] = sys.version.split()[0]
        write_meta(out / "meta.json", meta)
        publish(out, args.out)
    finally:
        shutil.rmtree(out, ignore_errors=True)  # nothing is there after publish
        os.close(lock)
    return meta


def fraction(text: str) -> float:
    value = float(text)
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and 1 (0.01: one document in a hundred)")
    return value


def count(text: str) -> int:
    value = float(text)
    if not 1 <= value < 2**62:
        raise argparse.ArgumentTypeError(f"{text} is not a number from 1 up")
    return int(value)


def main() -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", nargs="*", default=["python"], help="what to read (default: python)")
    parser.add_argument("--out", type=Path, required=True, help="directory to make, such as data/python")
    parser.add_argument("--tokenizer", default="train:8192", help="default: %(default)s")
    parser.add_argument("--val-fraction", type=fraction, default=0.01, help="documents held out (default: %(default)s)")
    parser.add_argument(
        "--field", default="text", help="column of .jsonl, .parquet and hub rows (default: %(default)s)"
    )
    parser.add_argument("--max-tokens", type=count, help="stop after this many train tokens")
    parser.add_argument("--shard-tokens", type=count, default=100_000_000, help="tokens a shard (default: %(default)s)")
    parser.add_argument("--dtype", choices=["auto", "uint16", "uint32"], default="auto", help="default: by vocabulary")
    parser.add_argument("--threads", type=count, default=os.cpu_count(), help="default: all cores")
    parser.add_argument("--overwrite", action="store_true", help="replace an output directory that is already prepared")
    args = parser.parse_args()
    began = time.perf_counter()
    try:
        meta = prepare(args)
    except OSError as e:
        fail(f"{e.filename or args.out}: {e.strerror or e}; nothing was written")
    except KeyboardInterrupt:
        print("interrupted: nothing was written", file=sys.stderr)
        sys.exit(130)
    seconds, size = time.perf_counter() - began, meta["train_bytes"] + meta["val_bytes"]
    train, val = meta["train_tokens"], meta["val_tokens"]
    print(
        f"{args.out}: {size / 1e6:.1f} MB of text in {seconds:.1f} s, {train:,} train and {val:,} val tokens, "
        f"vocabulary {meta['vocab_size']}, {size / (train + val):.2f} bytes a token"
    )


if __name__ == "__main__":
    main()
