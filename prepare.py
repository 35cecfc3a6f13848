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
is below --val-fraction, whatever else is in the corpus. All is written to NAME.partial, which becomes NAME by one
rename at the end: an interrupted run leaves nothing that looks like data, and the next run replaces what it left.
"""

import argparse
import base64
import codecs
import fcntl
import glob
import hashlib
import importlib
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
from contextlib import contextmanager
from functools import cached_property, partial
from itertools import chain
from pathlib import Path

import numpy as np
import tiktoken
import tiktoken.load

from cli import Parser, fail

EOT = "<|endoftext|>"
# GPT-2's split pattern in tiktoken's spelling: equivalent to the original and to HF's ByteLevel, but faster
GPT2_PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""
# the same after HF's Digits(individual_digits=True), as SmolLM has it: a digit alone, with no space before it
DIGITS_PATTERN = r"""'(?:[sdmt]|ll|ve|re)|\p{N}| ?\p{L}++| ?[^\s\p{L}\p{N}]++|\s++(?:$|(?=\p{N}))|\s+(?!\S)|\s"""
# SHA-256 of OpenAI's rank files (as in tiktoken) that come with a pattern and special tokens of their own
OPENAI_RANKS = {
    "223921b76ee99bde995b7ff738513eef100fb51d18c93597a113bcffe865b2a7": "cl100k_base",
    "446a9538cb6c348e3516120d7c08b09f57c36495e2acfffe59a5bf8b0cfb1a2d": "o200k_base",
    "94b5ca7dff4d00767bc256fdd1b27e5b17361d7b8a5f968547f9f23eb70d2069": "p50k_base",
}
# text that tokenizers differ on
PROBE = "The fox can't jump 12345 times,\n\tself.x  = [0x1F] \n 7;\r\n na\u00efve \u4eac\u90fd \U0001f642 <b>"
# (magic, version) of a shard -> dtype of its tokens
SHARD_FORMATS = {(20240520, 1): np.dtype("<u2"), (20240801, 7): np.dtype("<u4")}
HEADER_BYTES = 1024
COMPRESSED = (".gz", ".zst")


# ---------------------------------------------------------------------------------------------------------------------
# Reading prepared data: what the other scripts import


def load_meta(directory: str | Path) -> dict:
    """meta.json of a data directory. Shards without one (llm.c's) count as GPT-2's; bytes and documents are None."""
    path = Path(directory, "meta.json")
    if not path.parent.is_dir():
        fail(f"{directory}: no such data directory; make it with: python prepare.py python --out {directory}")
    if not path.exists():
        train, val = Shards(directory, "train"), Shards(directory, "val")
        if train.dtype.itemsize != 2:
            fail(f"{directory}: uint32 shards need a meta.json that names their tokenizer, vocab_size and eot")
        meta = dict(vocab_size=50257, tokenizer="gpt2", eot=50256, train_tokens=len(train), val_tokens=len(val))
        meta |= dict.fromkeys(["train_documents", "val_documents", "train_bytes", "val_bytes", "val_fraction"])
        return meta | dict(source=str(directory), split="as found")
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
                    f"{path}: damaged: its header says {count} tokens, the file has {size} bytes; copy or make it again"
                )
            # mmap cannot map nothing
            self.maps.append(np.memmap(path, dtype, "r", HEADER_BYTES, count) if count else np.empty(0, dtype))
        self.dtype = self.maps[0].dtype
        if any(m.dtype != self.dtype for m in self.maps):
            fail(f"{directory}: uint16 and uint32 {split} shards are mixed; keep one kind")
        self.ends = np.cumsum([len(m) for m in self.maps])  # [shards]

    def __len__(self) -> int:
        return int(self.ends[-1])

    def tokens(self, start: int, length: int) -> np.ndarray:
        """int64 [length]: tokens start .. start+length of the split, across shard borders. IndexError outside of it."""
        if start < 0 or length < 0 or start + length > len(self):
            raise IndexError(f"tokens {start} to {start + length} of a split of {len(self)}")
        parts, shard = [np.empty(0, np.int64)], int(np.searchsorted(self.ends, start, side="right"))
        while length:
            offset = start - int(self.ends[shard]) + len(self.maps[shard])
            parts.append(self.maps[shard][offset : offset + length])
            start, length, shard = start + len(parts[-1]), length - len(parts[-1]), shard + 1
        return np.concatenate(parts, dtype=np.int64)

    def blocks(self, T: int, tokens: int) -> np.ndarray:
        """int64 [E, T+1]: about `tokens` tokens as blocks spread evenly over the split; fixed, so losses compare."""
        available = (len(self) - 1) // T
        picks = np.linspace(0, available - 1, min(available, max(1, tokens // T))).round().astype(int)
        return np.stack([self.tokens(int(i) * T, T + 1) for i in picks])


# ---------------------------------------------------------------------------------------------------------------------
# Tokenizers: whatever their origin, a tiktoken.Encoding


def tokenizer_file(directory: str | Path) -> Path | None:
    """The rank file, or else tokenizer.json, in a directory of data, of a run, or of weights."""
    ranks = sorted(Path(directory).glob("*.tiktoken"))
    return next(chain(ranks, Path(directory).glob("tokenizer.json")), None)


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
    tiktoken.load.read_file = lambda url: requests.get(url, timeout=(4, 60)).content
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


def unspelled(ranks: dict[bytes, int]) -> bytes:
    """The single bytes that a vocabulary lacks."""
    return bytes(b for b in range(256) if bytes([b]) not in ranks)


class Lossy(tiktoken.Encoding):
    """A vocabulary that lacks some of the 256 bytes, as SmolLM's does: they are left out, which is what HF tokenizers
    do; tiktoken would crash."""

    @cached_property
    def missing(self) -> bytes:
        return unspelled(self._mergeable_ranks)

    def encode_ordinary(self, text: str) -> list[int]:
        import regex  # tiktoken depends on it

        raw = text.encode()
        if len(raw.translate(None, self.missing)) == len(raw):
            return super().encode_ordinary(text)
        pieces = (m[0].encode().translate(None, self.missing) for m in regex.finditer(self._pat_str, text))
        return [token for piece in pieces if piece for token in self._encode_single_piece(piece)]

    def encode_to_numpy(self, text: str, **options) -> np.ndarray:
        return np.array(self.encode_ordinary(text), np.uint32)


def make_encoding(name: str, ranks: dict[bytes, int], pattern: str, special: dict[str, int]) -> tiktoken.Encoding:
    kind = Lossy if unspelled(ranks) else tiktoken.Encoding
    return kind(name, pat_str=pattern, mergeable_ranks=ranks, special_tokens=special)


def write_ranks(path: Path, encoding: tiktoken.Encoding) -> None:
    """A rank file; pattern and special tokens, where they are not GPT-2's, go into a first line of our own."""
    ranks, pattern, special = encoding._mergeable_ranks, encoding._pat_str, encoding._special_tokens
    usual = pattern == GPT2_PATTERN and special == {EOT: max(ranks.values()) + 1} and not unspelled(ranks)
    lines = [] if usual else [b"#" + json.dumps(dict(pattern=pattern, special=special)).encode()]
    lines += [base64.b64encode(token) + b" %d" % rank for token, rank in sorted(ranks.items(), key=lambda x: x[1])]
    path.write_bytes(b"\n".join(lines) + b"\n")


def load_ranks(path: Path) -> tiktoken.Encoding:
    """The encoding of a rank file: lines of base64 token, space, rank, after what write_ranks may put first."""
    try:
        data = path.read_bytes()
    except OSError as e:
        fail(f"tokenizer {path}: {e.strerror}")
    if name := OPENAI_RANKS.get(hashlib.sha256(data).hexdigest()):
        from unittest.mock import patch

        with patch("tiktoken.load.read_file_cached", lambda *_: data):
            return tiktoken.get_encoding(name)
    ranks, more = {}, None
    for number, line in enumerate(data.splitlines(), 1):
        try:
            if number == 1 and line.startswith(b"#"):
                more = json.loads(line[1:])
            else:
                token, rank = line.split()
                ranks[base64.b64decode(token, validate=True)] = int(rank)
        except ValueError:
            fail(f"tokenizer {path}: line {number} is not a base64 token and its rank")
    distinct = len(set(ranks.values())) == len(ranks) and min(ranks.values(), default=0) >= 0
    if not distinct or (not more and unspelled(ranks)):
        fail(f"tokenizer {path}: needs all 256 single bytes and a rank of its own for each token")
    return make_encoding(path.stem, ranks, **more or dict(pattern=GPT2_PATTERN, special={EOT: max(ranks.values()) + 1}))


def byte_alphabet() -> dict[str, int]:
    """How HF's ByteLevel writes bytes: printable characters as themselves, the other 68 as U+0100 and on."""
    printable = [b for b in range(256) if chr(b).isprintable() and b != ord(" ")]
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
        # what tiktoken has no switch for
        fatal = ("normalizer", "end_of_word_suffix", "continuing_subword_prefix", "add_prefix_space")
        bad = {name: value for name, value in (model | last | t).items() if name in fatal}
        bad |= {
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
    eot = next((name for name in (EOT, "<|end_of_text|>", "</s>") if name in special), None)
    if eot is None:
        fail(f"tokenizer {path}: has no {EOT}, <|end_of_text|> or </s> to end documents with; use another tokenizer")
    name = path.parent.absolute().name if path.name == "tokenizer.json" else path.stem
    ranks = {bytes(letters[c] for c in w): i for w, i in vocab.items()}
    try:
        return make_encoding(name, ranks, pattern, {EOT: special.pop(eot)} | special)
    except ValueError as e:
        fail(f"tokenizer {path}: tiktoken cannot split by its pattern ({e}); use another tokenizer")


def difference(encoding: tiktoken.Encoding, bpe, texts: Iterable[str]) -> str | None:
    """The first of the texts, and of all tokens of the vocabulary, for which the HF tokenizer `bpe` gives other ids. It
    applies the list of merges, tiktoken any merge whose result is a token: equal in practice, so make sure."""
    for text in chain([PROBE], texts, (t.decode("utf-8", "replace") for t in encoding.token_byte_values())):
        if encoding.encode_ordinary(text) != bpe.encode(text, add_special_tokens=False).ids:
            return text
    return None


def same_tokenizer(a: tiktoken.Encoding, b: tiktoken.Encoding) -> bool:
    return a._mergeable_ranks == b._mergeable_ranks and a.encode_ordinary(PROBE) == b.encode_ordinary(PROBE)


def check_tokenizer(weights: str | Path, encoding: tiktoken.Encoding) -> None:
    """fail()s if a directory of weights has a tokenizer, and it is not the `encoding` of the data."""
    if (file := tokenizer_file(weights)) and not same_tokenizer(load_tokenizer(file), encoding):
        fail(f"the data's tokenizer {encoding.name} is not {file} of the weights: prepare with --tokenizer {weights}")


def train_tokenizer(documents: Iterable[str], vocab_size: int, path: Path) -> None:
    """Train a byte-level BPE with GPT-2's pattern and end-of-text; write it to `path` as a tokenizer.json."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet, progress = pre_tokenizers.ByteLevel.alphabet(), sys.stderr.isatty()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size - 1, initial_alphabet=alphabet, show_progress=progress)
    bpe.train_from_iterator(documents, trainer)
    bpe.add_special_tokens([EOT])
    bpe.save(str(path))


def check_conversion(path: Path, encoding: tiktoken.Encoding, documents: Iterable[str]) -> None:
    """fail()s if the encoding made of a tokenizer.json is not it, on the documents."""
    from tokenizers import Tokenizer

    # their own tokenizer without special tokens: in a corpus, the names of those are plain text
    bare = json.loads(path.read_text()) | {"added_tokens": [], "post_processor": None}
    if text := difference(encoding, Tokenizer.from_str(json.dumps(bare)), documents):
        fail(f"tokenizer {path}: tiktoken gives other ids for {text[:40]!r}...; use another tokenizer")


def save_tokenizer(enc: tiktoken.Encoding, directory: Path) -> None:
    """Write tokenizer.json for transformers; where that would not give the same ids, the rank file instead."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    letters, special = {b: c for c, b in byte_alphabet().items()}, enc._special_tokens
    vocab = {"".join(letters[b] for b in token): rank for token, rank in enc._mergeable_ranks.items()}
    # tiktoken merges any two tokens whose union is one
    halves = ((word[:i], word[i:]) for word in sorted(vocab, key=vocab.get) for i in range(1, len(word)))
    merges = [(a, b) for a, b in halves if a in vocab and b in vocab]
    bpe = Tokenizer(models.BPE(vocab | special, merges, ignore_merges=True))
    split = pre_tokenizers.Split(Regex(enc._pat_str.replace("{1,3}+", "{1,3}")), "isolated")
    bpe.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
    bpe.decoder = decoders.ByteLevel()
    if difference(enc, bpe, []) is not None:
        return write_ranks(directory / f"{enc.name}.tiktoken", enc)
    bpe.add_special_tokens(list(special))
    bpe.save(str(directory / "tokenizer.json"))
    config = dict(tokenizer_class="PreTrainedTokenizerFast", bos_token=EOT, eos_token=EOT)
    (directory / "tokenizer_config.json").write_text(json.dumps(config))


# ---------------------------------------------------------------------------------------------------------------------
# Sources: every one is an iterator of documents (str)


def resolve(sources: list[str]) -> list[str | Path]:
    """The sources with globs expanded into paths; fails over a missing or unknown file before anything is read."""
    resolved: list[str | Path] = []
    for source in sources:
        if source == "hf:":
            fail("hf: needs the name of a dataset, as hf:roneneldan/TinyStories")
        if source in ("python", "fineweb-edu") or source.startswith("hf:"):
            resolved.append("hf:HuggingFaceTB/smollm-corpus:fineweb-edu-dedup" if source == "fineweb-edu" else source)
            continue
        paths = [source] if os.path.exists(source) else sorted(glob.glob(source, recursive=True))
        if not paths:
            fail(f"{source}: no such file; sources are python, fineweb-edu, hf:NAME[:CONFIG], files and 'globs'")
        for path in map(Path, paths):
            if path.is_dir():
                fail(f"{path}: is a directory; give its files, such as '{path}/**/*.jsonl'")
            if kind(path) not in READERS:
                fail(f"{path}: unknown kind of file; .txt, .jsonl, .parquet (also .gz, .zst) can be read")
            resolved.append(path)
    return resolved


def kind(path: Path) -> str:
    """The file's suffix beneath its compression."""
    return Path(path.stem if path.suffix in COMPRESSED else path).suffix


def read_documents(sources: list[str | Path], field: str) -> Iterator[str]:
    for source in sources:
        if source == "python":
            yield from python_documents()
        elif isinstance(source, str):
            name, _, config = source.removeprefix("hf:").partition(":")
            if not Path(name).is_dir():
                ask_hub(name)
            yield from dataset_documents(source, field, name, config or None)
        else:
            try:
                yield from READERS[kind(source)](source, field)
            except (OSError, EOFError) as e:  # missing rights, damaged compression
                fail(f"{source}: cannot be read ({getattr(e, 'strerror', None) or e})")


# .txt and .jsonl are read by these few lines and not by `datasets`, which was measured: it reads JSON lines at 33 MB/s
# where json.loads does 500 (two threads tokenize 26), it infers a schema from the first rows and stops at a later row
# of another type in a column that nobody asked for, and its errors name neither file nor line.


def open_bytes(path: Path) -> io.BufferedReader:
    if path.suffix not in COMPRESSED:
        return path.open("rb")
    # pyarrow reads files of several gzip members or zstd frames, and a cut one is an error; zstandard.open() stops
    # silently after the first frame
    import pyarrow as pa

    return io.BufferedReader(pa.input_stream(str(path)))  # compression by suffix


def read_lines(path: Path, limit: int = -1) -> Iterator[tuple[int, str]]:
    """(number, text) of the lines of a UTF-8 file; a line of more than `limit` bytes comes in pieces."""
    number, rest = 0, b""
    with open_bytes(path) as file:
        for number, data in enumerate(iter(partial(file.readline, limit), b""), 1):
            data = rest + data
            try:
                line, used = codecs.utf_8_decode(data, "strict", False)  # a piece may end within a character
            except UnicodeDecodeError as e:
                fail(f"{path}: line {number} is not UTF-8 text ({e.reason}); convert the file, for example with iconv")
            rest = data[used:]
            yield number, line if number > 1 else line.removeprefix("\ufeff")
    if rest:
        fail(f"{path}: line {number} is not UTF-8 text (its last character is cut); repair the file")


def txt_documents(path: Path, field: str) -> Iterator[str]:
    lines, size = [], 0
    for _, line in read_lines(path, 1 << 20):  # the whole file may be one line
        end = line.strip() == EOT
        if not end:
            lines.append(line)
            size += len(line)
        if end or size >= 1 << 20 or (size >= 1 << 14 and line.isspace()):
            yield "".join(lines)
            lines, size = [], 0
    yield "".join(lines)


def jsonl_documents(path: Path, field: str) -> Iterator[str]:
    for number, line in read_lines(path):
        if line.isspace():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as e:
            fail(f"{path}: line {number} is not JSON ({e})")
        text = row.get(field) if isinstance(row, dict) else None
        if not isinstance(text, str):
            fail(f'{path}: line {number} has no text: {{"{field}": "..."}} expected; --field names another field')
        # JSON can hold half a surrogate pair, which no tokenizer takes
        yield text.encode("utf-8", "replace").decode() if "\\u" in line else text


def parquet_documents(path: Path, field: str) -> Iterator[str]:
    with tempfile.NamedTemporaryFile() as plain:
        if path.suffix in COMPRESSED:  # parquet is read from its end: unpack it
            with open_bytes(path) as file:
                shutil.copyfileobj(file, plain)
            plain.flush()
        name = plain.name if path.suffix in COMPRESSED else str(path)
        yield from dataset_documents(str(path), field, "parquet", data_files=name)


READERS = {".txt": txt_documents, ".jsonl": jsonl_documents, ".parquet": parquet_documents}


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


def dataset_documents(label: str, field: str, *args, **kwargs) -> Iterator[str]:
    """The split "train" of datasets.load_dataset(*args, **kwargs), streamed."""
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
    # docstrings of .py modules are in their sources; a second copy could sit in train and in val
    compiled = {*sys.builtin_module_names, *(path.name.split(".")[0] for path in library.glob("lib-dynload/*"))}
    for name in sorted(compiled & sys.stdlib_module_names):
        if "test" in name or name.startswith("xx"):
            continue
        try:
            module = importlib.import_module(name)
        except ImportError:  # compiled without its library: _tkinter, _dbm
            continue
        seen: set[str] = set()  # inherited ones repeat
        members = [(f"{name}.{key}", thing) for key, thing in sorted(vars(module).items()) if callable(thing)]
        yield "\n".join(doc for pair in [(name, module), *members] for doc in docstrings(*pair, seen))


def docstrings(name: str, thing: object, seen: set[str]) -> Iterator[str]:
    """The docstrings of a thing and, if it is a class, of what it holds, each under its name."""
    doc = getattr(thing, "__doc__", None)
    if isinstance(doc, str) and doc not in seen:
        seen.add(doc)
        yield f"{name}\n\n{doc.strip()}\n"
        for key, value in sorted(vars(thing).items()) if isinstance(thing, type) else []:
            yield from docstrings(f"{name}.{key}", value, seen)


# ---------------------------------------------------------------------------------------------------------------------
# Tokens


def place(text: bytes) -> float:
    """Where a document stands in [0, 1): it belongs to val below --val-fraction."""
    return int.from_bytes(hashlib.md5(text).digest(), "big") / 2**128


def first(documents: Iterable[str], size: float) -> Iterator[str]:
    """The documents of the first `size` characters."""
    for text in documents:
        yield text
        size -= len(text)
        if size < 0:
            return


class ShardWriter:
    """Appends documents to {split}_%06d.bin; the header of each, with its count, is written last."""

    def __init__(self, directory: Path, split: str, dtype: np.dtype, limit: int):
        self.directory, self.split, self.dtype, self.limit, self.file = directory, split, dtype, limit, None
        self.tokens = self.documents = self.bytes = 0

    def write(self, tokens: np.ndarray, size: int) -> None:
        """A document, end-of-text included, and the bytes of its text."""
        self.documents += 1
        self.bytes += size
        while len(tokens):
            shard, offset = divmod(self.tokens, self.limit)
            if offset == 0:
                self.close()
                self.file = open(self.directory / f"{self.split}_{shard:06d}.bin", "wb")
                self.file.write(bytes(HEADER_BYTES))
            part, tokens = tokens[: self.limit - offset], tokens[self.limit - offset :]
            self.file.write(part.data)
            self.tokens += len(part)

    def close(self) -> None:
        if self.file is not None:
            count = (self.file.tell() - HEADER_BYTES) // self.dtype.itemsize
            magic = next(key for key, dtype in SHARD_FORMATS.items() if dtype == self.dtype)
            self.file.seek(0)
            self.file.write(np.array([*magic, count], "<i4").data)
            self.file.close()


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

    wide = args.dtype == "uint32" or (args.dtype == "auto" and encoding.n_vocab > 65536)
    dtype = np.dtype("<u4" if wide else "<u2")
    train, val = writers = [ShardWriter(directory, split, dtype, args.shard_tokens) for split in ("train", "val")]

    def encode(batch: list[str]) -> list[tuple[float, int, np.ndarray]]:
        """(place, bytes, tokens with end-of-text) of each document."""
        rows = []
        for text in batch:
            raw, ids = text.encode(), encoding.encode_to_numpy(text, disallowed_special=())
            rows.append((place(raw), len(raw), np.append(ids, encoding.eot_token).astype(dtype)))
        return rows

    lowest, highest = 1.0, 0.0
    plain = all(isinstance(s, Path) and s.suffix in (".txt", ".jsonl") for s in sources)
    total = sum(s.stat().st_size for s in sources) if plain else None  # of the files; the text in them is less
    bar = tqdm(total=total, unit="B", unit_scale=True, desc="tokenize", disable=None)
    with bar, ThreadPoolExecutor(args.threads) as pool:
        done = in_order(pool, encode, batches(read_documents(sources, args.field)), 2 * args.threads)
        for where, size, tokens in chain.from_iterable(done):
            (val if where < args.val_fraction else train).write(tokens, size)
            lowest, highest = min(lowest, where), max(highest, where)
            bar.update(size)
            if args.max_tokens and train.tokens >= args.max_tokens:
                break
    for writer in writers:
        writer.close()
    source, documents = " ".join(args.source), train.documents + val.documents
    if documents == 0:
        fail(f"{source}: no text found")
    if documents == 1:
        fail(f"{source}: only one document, which cannot be split into train and val; add more text")
    if val.documents == 0:
        fail(f"none of the {documents} documents is in val: --val-fraction {lowest + 1e-3:.3f} takes the first")
    if train.documents == 0:
        fail(f"all {documents} documents are in val: --val-fraction {highest - 1e-3:.3f} or less leaves some to train")
    counts = {f"{w.split}_{key}": getattr(w, key) for w in writers for key in ("tokens", "documents", "bytes")}
    return counts | {"dtype": dtype.name}


# ---------------------------------------------------------------------------------------------------------------------
# Command line


@contextmanager
def replacing(out: Path, overwrite: bool) -> Iterator[Path]:
    """An empty, locked directory OUT.partial, which becomes OUT at the end, or is removed if the block fails."""
    target = out.resolve()  # a link stays
    if target.exists() and not target.is_dir():
        fail(f"--out {out}: is a file")
    if Path.cwd().is_relative_to(target):
        fail(f"--out {out}: holds the current directory; name another directory")
    occupied = target.exists() and any(target.iterdir())
    if occupied and not (target / "meta.json").exists():
        fail(f"--out {out}: exists and was not made by prepare.py; name another directory")
    if occupied and not overwrite:
        fail(f"--out {out}: is prepared already; use it, name another directory, or replace it with --overwrite")
    making = target.with_name(target.name + ".partial")
    making.mkdir(parents=True, exist_ok=True)
    lock = os.open(making, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        fail(f"--out {out}: another prepare.py is writing it; wait for that one or name another directory")
    try:
        for path in making.iterdir():  # what an interrupted run left
            path.unlink()
        yield making
        for path in (*making.iterdir(), making):
            sync(path)
        if occupied:
            old = tempfile.mkdtemp(prefix=target.name + ".old.", dir=target.parent)
            target.rename(old)  # rename wants an empty target
        making.rename(target)
        sync(target.parent)
        if occupied:
            shutil.rmtree(old, ignore_errors=True)
    except BaseException:
        shutil.rmtree(making, ignore_errors=True)
        raise
    finally:
        os.close(lock)


def sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def prepare(args: argparse.Namespace) -> dict:
    """Everything between the command line and the finished directory; returns meta.json's dict."""
    sources, name, encoding = resolve(args.source), find_tokenizer(args.tokenizer), None
    trained = name.startswith("train:")
    if trained:
        size = int(name[6:]) if name[6:].isdecimal() else 0
        if not 257 <= size <= 1 << 20:
            fail(
                f"--tokenizer {name}: train:N needs N from 257 (256 bytes and end-of-text) to {1 << 20}, as train:8192"
            )
    else:
        encoding = load_tokenizer(name)
        size = encoding.n_vocab
    if args.dtype == "uint16" and size > 65536:
        fail(f"--dtype uint16 holds ids below 65536, the vocabulary of {name} has {size}: use --dtype uint32 or auto")
    if args.shard_tokens >= 2**31:
        fail(f"--shard-tokens {args.shard_tokens}: the count in a shard's header is an int32, below {2**31}")
    with replacing(args.out, args.overwrite) as out:
        if trained:
            name = str(out / f"bpe{size}.json")
            sample = first(read_documents(sources, args.field), 64e6)
            train_tokenizer((t for t in sample if place(t.encode()) >= args.val_fraction), size, Path(name))
            encoding = load_tokenizer(name)
            if encoding.n_vocab < size:
                print(f"note: the corpus has no more pairs to merge: vocabulary {encoding.n_vocab}, not {size}")
        file = out / (f"{encoding.name}.tiktoken" if name.endswith(".json") else Path(name).name)
        if name.endswith(".json"):
            check_conversion(Path(name), encoding, first(read_documents(sources, args.field), 2e6))
            write_ranks(file, encoding)
        elif name.endswith(".tiktoken"):
            shutil.copyfile(name, file)
        if trained:
            os.unlink(name)
        meta = {"vocab_size": encoding.n_vocab, "tokenizer": file.name, "eot": encoding.eot_token}
        meta |= write_shards(sources, encoding, out, args)
        meta |= {"source": " ".join(args.source), "val_fraction": args.val_fraction, "split": "md5 of the text"}
        if "python" in sources:
            meta["python"] = sys.version.split()[0]
        (out / "meta.json").write_text(json.dumps(meta, indent=1))
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
    add = parser.add_argument
    add("source", nargs="*", default=["python"], help="what to read (default: python)")
    add("--out", type=Path, required=True, help="directory to make, such as data/python")
    add("--tokenizer", default="train:8192", help="default: %(default)s")
    add("--val-fraction", type=fraction, default=0.01, help="documents held out (default: %(default)s)")
    add("--field", default="text", help="column of .jsonl, .parquet and hub rows (default: %(default)s)")
    add("--max-tokens", type=count, help="stop after this many train tokens")
    add("--shard-tokens", type=count, default=100_000_000, help="tokens a shard (default: %(default)s)")
    add("--dtype", choices=["auto", "uint16", "uint32"], default="auto", help="default: by vocabulary")
    add("--threads", type=count, default=os.cpu_count(), help="default: all cores")
    add("--overwrite", action="store_true", help="replace an output directory that is already prepared")
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
