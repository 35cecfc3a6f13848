"""Text to token shards: the data that train.py, eval.py and sample.py read.

    python prepare.py python --out data/python                          # the standard library's own text: no download
    python prepare.py debian --out data/debian --val-fraction 0.0225
    python prepare.py fineweb-edu --out data/edu --tokenizer gpt2 --max-tokens 1e9             # streamed from the hub
    python prepare.py hf:roneneldan/TinyStories --out data/stories --tokenizer train:8192
    python prepare.py notes.txt 'books/**/*.jsonl.zst' --out data/books --val-fraction 0.02

Sources, one or several
    python            the Python that runs this: documentation topics, .py sources without tests, built-in docstrings
    debian            English prose, 213 MB, of 23 packages of documentation from Debian 12, by `apt-get download`:
                      the same text everywhere. debian-small: 63 MB of 6 packages. debian:DIR: the .deb files in DIR
    fineweb-edu       HuggingFaceTB/smollm-corpus, fineweb-edu-dedup (the corpus of the MoR paper)
    hf:NAME[:CONFIG]  any dataset of the Hugging Face hub with a text column, streamed; its split "train"
    FILE or 'GLOB'    .txt, .jsonl (also .ndjson, .json: an object a line), .parquet, plain or .gz/.zst. A .txt file is
                      cut into documents at lines that say <|endoftext|> and at the first blank line after 16 KiB; the
                      others hold one document a row. A path that exists is that file, whatever characters are in it.

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
rename at the end: an interrupted run leaves nothing that looks like data, and the next run replaces what it left. In a
mount point, which cannot be renamed, it is written to NAME/.partial, and the files are moved at the end.
"""

import argparse
import base64
import codecs
import errno
import fcntl
import glob
import gzip
import hashlib
import importlib.util
import io
import json
import lzma
import multiprocessing
import os
import re
import shutil
import socket
import subprocess
import sys
import tarfile
import tempfile
import time
import tokenize
import zlib
from argparse import ArgumentTypeError
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from functools import cache, cached_property, partial
from itertools import chain
from pathlib import Path

import numpy as np
import tiktoken
import tiktoken.load

from cli import Parser, fail, spell, whole

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
# a word that no tokenizer is trained on: that takes the square of its length, 0.3 s for 10,000, 32 s for 100,000
LONG_WORD = 10_000
UNBROKEN = re.compile(rf"(?<!\s)\s{{{LONG_WORD}}}|(?<!\S)\S{{{LONG_WORD}}}")
LONG_RUNS = re.compile(rf"\s{{{LONG_WORD},}}|[^\W\d_]{{{LONG_WORD},}}|\d{{{LONG_WORD},}}|(?:[^\w\s]|_){{{LONG_WORD},}}")
# text that tokenizers differ on
PROBE = "The fox can't jump 12345 times,\n\tself.x  = [0x1F] \n 7;\r\n na\u00efve \u4eac\u90fd \U0001f642 <b>"
# (magic, version) of a shard -> dtype of its tokens
SHARD_FORMATS = {(20240520, 1): np.dtype("<u2"), (20240801, 7): np.dtype("<u4")}
HEADER_BYTES = 1024
COMPRESSED = (".gz", ".zst")
# within an output directory that cannot be replaced by a rename: what is being written
UNFINISHED = ".partial"
# within a directory that is being written: proof that it is ours, lock, and name of the holder
LOCK = ".prepare.lock"
# the names of the files in an output directory
OUTPUTS = rf"(train|val)_\d{{6}}\.bin|meta\.json|.*\.tiktoken|{re.escape(LOCK)}"


# ---------------------------------------------------------------------------------------------------------------------
# People's text and numbers


def read_text(file: str | Path) -> str:
    """Returns the text of a UTF-8 file, or of standard input for "-", without a byte-order mark.

    Ends the program with one line over what cannot be read or is not UTF-8.
    """
    try:
        if str(file) != "-":
            data = Path(file).read_bytes()
        elif sys.stdin is None:
            fail("-: there is no standard input to read from; name a file")
        else:
            data = sys.stdin.buffer.read()
        return data.removeprefix(codecs.BOM_UTF8).decode()
    except OSError as e:
        fail(f"{file}: {e.strerror or e}")
    except UnicodeDecodeError as e:
        number = data.count(b"\n", 0, e.start) + 1
        fail(f"{file}: {explain_encoding(number, data, e.reason)}")


def explain_encoding(number: int, data: bytes, reason: str) -> str:
    """Returns why line `number`, in the bytes `data` of a file, is not UTF-8, and the remedy."""
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return "is UTF-16 text; convert it to UTF-8: iconv -f UTF-16 -t UTF-8"
    return f"line {number} is not UTF-8 text ({reason}); convert the file, for example with iconv"


def replace_surrogates(text: str) -> str:
    """Returns the text with "?" for lone surrogates: JSON can hold them, no tokenizer takes them."""
    return text.encode("utf-8", "replace").decode()


def read_json(path: Path) -> dict:
    """Returns the object in a JSON file. Raises ValueError for anything else in it, OSError where it cannot be read."""
    value = json.loads(path.read_bytes().removeprefix(codecs.BOM_UTF8))
    if not isinstance(value, dict):
        raise ValueError(f"{type(value).__name__} instead of an object")
    return value


# ---------------------------------------------------------------------------------------------------------------------
# Reading prepared data: what the other scripts import


def load_meta(directory: str | Path) -> dict:
    """Returns meta.json of a data directory.

    Shards without one (llm.c's) count as GPT-2's; their bytes and documents are None.
    """
    path = Path(directory, "meta.json")
    if not path.parent.is_dir():
        fail(f"{directory}: no such data directory; make it with: python prepare.py python --out {directory}")
    if not path.exists():
        train = Shards(directory, "train")
        val = Shards(directory, "val")
        if train.dtype.itemsize != 2:
            fail(f"{directory}: uint32 shards need a meta.json that names their tokenizer, vocab_size and eot")
        meta = dict(vocab_size=50257, tokenizer="gpt2", eot=50256, train_tokens=len(train), val_tokens=len(val))
        meta |= dict.fromkeys(["train_documents", "val_documents", "train_bytes", "val_bytes", "val_fraction"])
        return meta | dict(source=str(directory), split="as found")
    try:
        meta = read_json(path)
        missing = {"vocab_size", "tokenizer", "eot", "train_tokens", "val_tokens"} - set(meta)
    except (ValueError, OSError) as e:
        fail(f"{path}: cannot be read ({e}); make the directory again with prepare.py")
    if missing:
        fail(f"{path}: has no {', '.join(sorted(missing))}; make the directory again with prepare.py")
    return meta


def find_shards(directory: Path, split: str) -> list[Path]:
    """Returns the shards of a split, in order of their names, of which `split` is the last word before the number.

    fineweb_train_000001.bin (llm.c's) and TinyStories_train.bin are of train, pretrain_val_000000.bin is of val only.
    """
    name = re.compile(rf"(?P<set>(?:[^.].*)?[^a-zA-Z0-9]|){split}(?:[^a-zA-Z0-9]?\d+(?:-of-\d+)?)?\.bin")
    found = [(path, name.fullmatch(path.name)) for path in sorted(directory.glob("*.bin"))]
    files = [path for path, match in found if match]
    sets = sorted({match["set"] for _, match in found if match})
    if not files:
        fail(f"{directory}: no {split}_*.bin in it; make data with: python prepare.py python --out data/python")
    if len(sets) > 1:
        names = " and ".join(f"{name}{split}" for name in sets[:2])
        fail(f"{directory}: holds shards of several data sets ({names}); keep one in a directory")
    return files


class Shards:
    """Holds the tokens of one split, memory-mapped. Every header is checked against its file before the first read.

    Attributes: files (paths in order), dtype (uint16 or uint32, on disk). len() is the number of tokens.
    """

    def __init__(self, directory: str | Path, split: str):
        if Path(directory, UNFINISHED).exists() and not Path(directory, "meta.json").exists():
            fail(f"{directory}: prepare.py was stopped while it wrote this; run it again")
        self.files = find_shards(Path(directory), split)
        self.maps = []
        for path in self.files:
            header = np.fromfile(path, "<i4", 256).tolist()
            size = path.stat().st_size
            if len(header) < 256 or tuple(header[:2]) not in SHARD_FORMATS:
                fail(f"{path}: not a token shard (magic, version {header[:2]}; 20240520, 1 or 20240801, 7 expected)")
            dtype = SHARD_FORMATS[tuple(header[:2])]
            count = header[2]
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
        """Returns tokens start .. start+length of the split, int64 [length], across shard borders.

        Raises IndexError outside of the split.
        """
        if start < 0 or length < 0 or start + length > len(self):
            raise IndexError(f"tokens {start} to {start + length} of a split of {len(self)}")
        parts = [np.empty(0, np.int64)]
        shard = int(np.searchsorted(self.ends, start, side="right"))
        while length:
            offset = start - int(self.ends[shard]) + len(self.maps[shard])
            part = self.maps[shard][offset : offset + length]
            parts.append(part)
            start += len(part)
            length -= len(part)
            shard += 1
        return np.concatenate(parts, dtype=np.int64)

    def blocks(self, T: int, tokens: int) -> np.ndarray:
        """Returns about `tokens` tokens as blocks spread evenly over the split, int64 [E, T+1].

        They are the same in every call, so that losses compare.
        """
        available = (len(self) - 1) // T
        picks = np.linspace(0, available - 1, min(available, max(1, tokens // T))).round().astype(int)
        return np.stack([self.tokens(int(i) * T, T + 1) for i in picks])


# ---------------------------------------------------------------------------------------------------------------------
# Tokenizers: whatever their origin, a tiktoken.Encoding


def read_tokenizer_name(directory: Path) -> tuple[str | None, Path]:
    """Returns the tokenizer that a directory's meta.json (data) or config.json (a run) names, and where its file is.

    The name is None where neither names one: shards of others, weights of Hugging Face, a lone rank file.
    """
    for file in (directory / "meta.json", directory / "config.json"):
        if not file.exists():
            continue
        try:
            config = read_json(file)
        except (ValueError, OSError) as e:
            fail(f"{file}: cannot be read ({e})")
        # a run keeps what it knows of its data under "data", and the path to it under "train"
        data = config if file.name == "meta.json" else config.get("data")
        if not isinstance(data, dict) or not isinstance(data.get("tokenizer"), str):
            continue
        name = data["tokenizer"]
        train = config.get("train")
        if isinstance(train, dict) and not (directory / name).exists():
            return name, Path(train.get("data", directory))
        return name, directory
    return None, directory


def tokenizer_file(directory: str | Path) -> Path | None:
    """Returns the rank file that a directory of data or of a run names, or the only one in it, or its tokenizer.json.

    None where there is none: a tokenizer known by name, or a directory without one. A directory that was used again
    can hold rank files of other tokenizers: these are never taken.
    """
    directory = Path(directory)
    name, home = read_tokenizer_name(directory)
    if name is not None:
        return home / name if name.endswith(".tiktoken") and (home / name).exists() else None
    ranks = [path for path in sorted(directory.glob("*.tiktoken")) if not path.name.startswith(".")]
    if len(ranks) > 1:
        fail(f"tokenizer {directory}: holds {ranks[0].name} and {ranks[1].name}; name one of these files")
    return next(chain(ranks, directory.glob("tokenizer.json")), None)


def find_tokenizer(name: str | Path) -> str:
    """Returns `name`, or the file or name that it stands for if it is a directory."""
    if not Path(name).is_dir():
        return str(name)
    if file := tokenizer_file(name):
        return str(file)
    named, home = read_tokenizer_name(Path(name))
    if named is not None:
        if named.endswith(".tiktoken"):
            fail(f"tokenizer {name}: its {named} is neither there nor in {home}; copy it there")
        return named
    if not any(Path(name).glob("*.bin")):
        fail(f"tokenizer {name}: the directory holds no .tiktoken file and no tokenizer.json; name another")
    return str(load_meta(name)["tokenizer"])


def load_tokenizer(name_or_path: str | Path) -> tiktoken.Encoding:
    """Returns a tiktoken encoding by name, from a .tiktoken rank file or a tokenizer.json, or the one of a directory.

    Ends the program if there is none, or if it cannot be downloaded within seconds.
    """
    name = find_tokenizer(name_or_path)
    names = tiktoken.list_encoding_names()
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


def encode(encoding: tiktoken.Encoding, text: str) -> list[int]:
    """Returns the ids of any text; names of special tokens in it are plain text. See encode_array."""
    return encode_array(encoding, text).tolist()


def encode_array(encoding: tiktoken.Encoding, text: str) -> np.ndarray:
    """Returns the ids of any text as uint32 [tokens]: those that tiktoken gives, also where its regex gives up.

    Between 300,000 and a million white-space characters in a row overflow the stack of that regex. Lone surrogates
    become "?".
    """
    if not text.isascii():
        text = replace_surrogates(text)
    try:
        # not encode_ordinary, in which the same overflow is a panic, which is no Exception and writes to the terminal
        return encoding.encode_to_numpy(text, disallowed_special=())
    except ValueError:
        return encode_pieces(encoding, text)


def encode_pieces(encoding: tiktoken.Encoding, text: str) -> np.ndarray:
    """Returns the ids, uint32 [tokens], of any text, without the bytes that a Lossy vocabulary lacks.

    The regex module, on which tiktoken depends, splits any text by the same patterns, but at a fifth of the speed.
    """
    import regex

    missing = getattr(encoding, "missing", b"")
    ids: list[int] = []
    for match in regex.finditer(encoding._pat_str, text):
        if piece := match[0].encode().translate(None, missing):
            ids += encoding._encode_single_piece(piece)
    return np.array(ids, np.uint32)


def find_missing_bytes(ranks: dict[bytes, int]) -> bytes:
    """Returns the single bytes that a vocabulary lacks."""
    return bytes(b for b in range(256) if bytes([b]) not in ranks)


class Lossy(tiktoken.Encoding):
    """Encodes with a vocabulary that lacks some of the 256 bytes, as SmolLM's does.

    They are left out, which is what HF tokenizers do; tiktoken would crash.
    """

    @cached_property
    def missing(self) -> bytes:
        return find_missing_bytes(self._mergeable_ranks)

    def encode_ordinary(self, text: str) -> list[int]:
        return encode(self, text)

    def encode_to_numpy(self, text: str, **options) -> np.ndarray:
        raw = text.encode()
        if len(raw.translate(None, self.missing)) == len(raw):
            return super().encode_to_numpy(text, **options)
        return encode_pieces(self, text)


def make_encoding(name: str, ranks: dict[bytes, int], pattern: str, special: dict[str, int]) -> tiktoken.Encoding:
    """Returns the encoding of a vocabulary. Raises ValueError for a pattern that tiktoken cannot use."""
    cls = Lossy if find_missing_bytes(ranks) else tiktoken.Encoding
    return cls(name, pat_str=pattern, mergeable_ranks=ranks, special_tokens=special)


def write_ranks(path: Path, encoding: tiktoken.Encoding) -> None:
    """Writes a rank file; pattern and special tokens, where they are not GPT-2's, go into a first line of our own."""
    ranks = encoding._mergeable_ranks
    pattern = encoding._pat_str
    special = encoding._special_tokens
    usual = pattern == GPT2_PATTERN and special == {EOT: max(ranks.values()) + 1} and not find_missing_bytes(ranks)
    lines = [] if usual else [b"#" + json.dumps(dict(pattern=pattern, special=special)).encode()]
    lines += [base64.b64encode(token) + b" %d" % rank for token, rank in sorted(ranks.items(), key=lambda x: x[1])]
    path.write_bytes(b"\n".join(lines) + b"\n")


def load_ranks(path: Path) -> tiktoken.Encoding:
    """Returns the encoding of a rank file: lines of base64 token, space, rank, after what write_ranks may put first."""
    try:
        data = path.read_bytes().removeprefix(codecs.BOM_UTF8)
    except OSError as e:
        fail(f"tokenizer {path}: {e.strerror}")
    if name := OPENAI_RANKS.get(hashlib.sha256(data).hexdigest()):
        from unittest.mock import patch

        with patch("tiktoken.load.read_file_cached", lambda *_: data):
            return tiktoken.get_encoding(name)
    # every line gives a token its rank, but for a first line of ours
    ranks: dict[bytes, int] = {}
    more = None
    for number, line in enumerate(data.splitlines(), 1):
        try:
            if number == 1 and line.startswith(b"#"):
                more = json.loads(line[1:])
            else:
                token, rank = line.split()
                ranks[base64.b64decode(token, validate=True)] = int(rank)
        except ValueError:
            fail(f"tokenizer {path}: line {number} is not a base64 token and its rank")
    # tiktoken itself accepts less, and crashes later
    distinct = len(set(ranks.values())) == len(ranks) and min(ranks.values(), default=0) >= 0
    if not distinct or (not more and find_missing_bytes(ranks)):
        fail(f"tokenizer {path}: needs all 256 single bytes and a rank of its own for each token")
    return make_encoding(path.stem, ranks, **more or dict(pattern=GPT2_PATTERN, special={EOT: max(ranks.values()) + 1}))


def make_byte_letters() -> dict[str, int]:
    """Returns the byte of each letter of HF's ByteLevel: printable ones are themselves, the other 68 U+0100 and on."""
    printable = [b for b in range(256) if chr(b).isprintable() and b != ord(" ")]
    others = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}


def load_tokenizer_json(path: Path) -> tiktoken.Encoding:
    """Returns the byte-level BPE of a Hugging Face tokenizer.json. Ends the program if tiktoken cannot express it."""
    try:
        t = read_json(path)
        model = t["model"]
        steps = t["pre_tokenizer"]
        steps = steps["pretokenizers"] if steps["type"] == "Sequence" else [steps]
        last = steps[-1]
        kinds = [s["type"] for s in steps]
        gpt2 = last.get("use_regex", True)  # splits by GPT-2's pattern itself
        special = {a["content"]: a["id"] for a in t["added_tokens"]}
        # ranks: the vocabulary without special tokens, merges in order of their results
        letters = make_byte_letters()
        vocab = {w: i for w, i in model["vocab"].items() if w not in special}
        pairs = [m.split(" ") if isinstance(m, str) else m for m in model["merges"]]
        merged = list(dict.fromkeys(vocab["".join(pair)] for pair in pairs))
        # what tiktoken has no switch for
        fatal = ("normalizer", "end_of_word_suffix", "continuing_subword_prefix", "add_prefix_space")
        bad = {name: value for name, value in (model | last | t).items() if name in fatal}
        bad |= {
            "added tokens that are not special": [a["content"] for a in t["added_tokens"] if not a["special"]][:3],
            "merges in another order than ids": merged != sorted(merged),
            "tokens that are not bytes": [w for w in vocab if not set(w) <= letters.keys()][:3],
        }
        # the pattern that splits text before it is merged
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


def find_difference(encoding: tiktoken.Encoding, bpe, texts: Iterable[str]) -> str | None:
    """Returns the first text, or token of the vocabulary, that the HF tokenizer `bpe` encodes otherwise.

    It applies the list of merges, tiktoken any merge whose result is a token: equal in practice, so make sure.
    """
    for text in chain([PROBE], texts, (t.decode("utf-8", "replace") for t in encoding.token_byte_values())):
        if encode(encoding, text) != bpe.encode(text, add_special_tokens=False).ids:
            return text
    return None


def same_tokenizer(a: tiktoken.Encoding, b: tiktoken.Encoding) -> bool:
    """Returns whether two encodings have one vocabulary and split alike."""
    return a._mergeable_ranks == b._mergeable_ranks and a.encode_ordinary(PROBE) == b.encode_ordinary(PROBE)


def check_tokenizer(weights: str | Path, encoding: tiktoken.Encoding) -> None:
    """Ends the program if a directory of weights has a tokenizer file that is not the `encoding` of the data."""
    if (file := tokenizer_file(weights)) and not same_tokenizer(load_tokenizer(file), encoding):
        fail(f"the data's tokenizer {encoding.name} is not {file} of the weights: prepare with --tokenizer {weights}")


def train_tokenizer(documents: Iterable[str], vocab_size: int, path: Path) -> None:
    """Trains a byte-level BPE with GPT-2's pattern and end-of-text, and writes it to `path` as a tokenizer.json."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    progress = sys.stderr is not None and sys.stderr.isatty()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size - 1, initial_alphabet=alphabet, show_progress=progress)
    bpe.train_from_iterator(map(drop_long_words, documents), trainer)
    bpe.add_special_tokens([EOT])
    bpe.save(str(path))


def drop_long_words(text: str) -> str:
    """Returns the text without its runs of LONG_WORD and more letters, digits, signs or white space."""
    if len(text) < LONG_WORD or not UNBROKEN.search(text):
        return text
    return LONG_RUNS.sub(" ", text)


def check_conversion(path: Path, encoding: tiktoken.Encoding, documents: Iterable[str]) -> None:
    """Ends the program if the encoding made of a tokenizer.json is not it, on the documents."""
    from tokenizers import Tokenizer

    # their own tokenizer without special tokens: in a corpus, the names of those are plain text
    bare = read_json(path) | {"added_tokens": [], "post_processor": None}
    if text := find_difference(encoding, Tokenizer.from_str(json.dumps(bare)), map(drop_long_words, documents)):
        fail(f"tokenizer {path}: tiktoken gives other ids for {text[:40]!r}...; use another tokenizer")


def save_tokenizer(enc: tiktoken.Encoding, directory: Path) -> bool:
    """Writes tokenizer.json for transformers, or the rank file where that would not give the same ids.

    Returns whether it is the former."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    letters = {b: c for c, b in make_byte_letters().items()}
    special = enc._special_tokens
    vocab = {"".join(letters[b] for b in token): rank for token, rank in enc._mergeable_ranks.items()}
    # tiktoken merges any two tokens whose union is one
    halves = ((word[:i], word[i:]) for word in sorted(vocab, key=vocab.get) for i in range(1, len(word)))
    merges = [(a, b) for a, b in halves if a in vocab and b in vocab]
    bpe = Tokenizer(models.BPE(vocab | special, merges, ignore_merges=True))
    try:
        split = pre_tokenizers.Split(Regex(enc._pat_str.replace("{1,3}+", "{1,3}")), "isolated")
        bpe.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
        bpe.decoder = decoders.ByteLevel()
        same = find_difference(enc, bpe, []) is None
    except Exception:  # the class of its errors over a pattern that its own regular expressions lack
        same = False
    if not same:
        write_ranks(directory / f"{enc.name}.tiktoken", enc)
        return False
    bpe.add_special_tokens(list(special))
    bpe.save(str(directory / "tokenizer.json"))
    config = dict(tokenizer_class="PreTrainedTokenizerFast", bos_token=EOT, eos_token=EOT, pad_token=EOT)
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return True


# ---------------------------------------------------------------------------------------------------------------------
# Sources: every one is an iterator of documents (str), of None for a row that is null, and of BadRow


class BadRow(ValueError):
    """Says which row holds no text, and why."""


def resolve_sources(sources: list[str]) -> list[str | Path]:
    """Returns the sources, globs expanded into paths. A missing or unknown file ends the program before any work."""
    resolved: list[str | Path] = []
    for source in sources:
        # sources known by name
        if source == "hf:":
            fail("hf: needs the name of a dataset, as hf:roneneldan/TinyStories")
        if source == "fineweb-edu":
            resolved.append("hf:HuggingFaceTB/smollm-corpus:fineweb-edu-dedup")
            continue
        name, _, directory = source.partition(":")
        if name in ("debian", "debian-small"):
            if directory and not Path(directory).is_dir():
                fail(f"{source}: no directory {directory}; {name} alone downloads the packages")
            resolved.append(source)
            continue
        if source == "python" or (name == "hf" and not os.path.isfile(source)):
            resolved.append(source)
            continue
        # a path that exists is no pattern, whatever characters are in it
        paths = [source] if os.path.exists(source) else sorted(glob.glob(source, recursive=True))
        if not paths:
            fail(f"{source}: no such file; sources are python, debian, fineweb-edu, hf:NAME[:CONFIG], files, 'globs'")
        for path in map(Path, paths):
            if path.is_dir():
                fail(f"{path}: is a directory; give its files, such as '{path}/**/*.jsonl'")
            if find_format(path) not in READERS:
                fail(f"{path}: unknown kind of file; .txt, .jsonl, .parquet (also .gz, .zst) can be read")
            resolved.append(path)
    return resolved


def find_format(path: Path) -> str:
    """Returns the suffix of a file beneath its compression, in lower case."""
    name = Path(path.name.lower())
    return Path(name.stem).suffix if name.suffix in COMPRESSED else name.suffix


def read_documents(
    sources: list[str | Path], field: str, skip_bad: bool = False, skipped: Counter | None = None
) -> Iterator[str]:
    """Yields the documents of all sources.

    A null row is skipped. A row without text ends the program, or is skipped with `skip_bad`. `skipped` counts both.
    """
    skipped = Counter() if skipped is None else skipped
    for source in sources:
        for text in read_source(source, field):
            if isinstance(text, str):
                yield text
            elif text is None:
                skipped["null"] += 1
            elif skip_bad:
                skipped["bad"] += 1
            else:
                fail(f"{source}: {text}, or leave such rows out with --skip-bad")


def read_source(source: str | Path, field: str) -> Iterator[str | None | BadRow]:
    """Yields what one source holds. Ends the program where it cannot be read."""
    if source == "python":
        yield from read_python()
    elif isinstance(source, str) and source.startswith("debian"):
        yield from read_debian(source)[0]
    elif isinstance(source, str):
        name, _, config = source.removeprefix("hf:").partition(":")
        if not Path(name).is_dir():
            ask_hub(name)
        yield from read_dataset(source, field, name, config or None)
    else:
        import zstandard

        try:
            yield from READERS[find_format(source)](source, field)
        except (OSError, EOFError, zlib.error, zstandard.ZstdError) as e:  # missing rights, damaged compression
            fail(f"{source}: cannot be read ({getattr(e, 'strerror', None) or e})")


# .txt, .jsonl and .parquet are read by these few lines and not by `datasets`, which was measured: it reads JSON lines
# at 33 MB/s where json.loads does 500 (two threads tokenize 26), it infers a schema from the first rows and stops at a
# later row of another type in a column that nobody asked for, its errors name neither file nor line, it takes a path
# for a pattern, and it stops at parquet whose first row group is empty.


class ZstdFile(io.RawIOBase):
    """Reads a .zst file of any number of frames and any window. A cut frame raises EOFError.

    zstandard.open() stops without a word after the first frame and at a cut one. pyarrow refuses the windows above
    128 MB of zstd --long.
    """

    def __init__(self, path: Path):
        import zstandard

        self.file = path.open("rb")
        self.decompressor = zstandard.ZstdDecompressor(max_window_size=1 << 31)
        self.frame = None  # the one that is under way
        self.packed = b""  # read from the file, not yet unpacked
        self.plain = b""  # unpacked, not yet given out

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        """Fills `buffer` as far as one step goes; returns the bytes written, 0 at the end of the file."""
        while not self.plain:
            self.packed = self.packed or self.file.read(1 << 17)
            if not self.packed:
                if self.frame is not None:
                    raise EOFError("the file ends within a zstd frame")
                return 0
            self.frame = self.frame or self.decompressor.decompressobj()
            self.plain = self.frame.decompress(self.packed)
            self.packed = self.frame.unused_data
            if self.frame.eof:
                self.frame = None
        size = min(len(buffer), len(self.plain))
        buffer[:size] = self.plain[:size]
        self.plain = self.plain[size:]
        return size

    def close(self) -> None:
        self.file.close()
        super().close()


def open_bytes(path: Path) -> io.BufferedIOBase:
    """Returns a file opened for reading bytes, unpacked if its suffix says .gz or .zst."""
    suffix = path.suffix.lower()
    if suffix == ".gz":
        # Python's own: pyarrow takes the zeros with which some writers pad for a damaged member
        return io.BufferedReader(gzip.open(path), 1 << 20)
    if suffix == ".zst":
        return io.BufferedReader(ZstdFile(path), 1 << 20)
    return path.open("rb")


def read_lines(path: Path, limit: int = -1) -> Iterator[str]:
    """Yields the lines of a UTF-8 file; a line of more than `limit` bytes comes in pieces.

    Byte-order marks are left out at the beginning of any line: files are concatenated.
    """
    number = 0
    rest = b""
    with open_bytes(path) as file:
        for number, data in enumerate(iter(partial(file.readline, limit), b""), 1):
            data = rest + data
            try:
                line, used = codecs.utf_8_decode(data, "strict", False)  # a piece may end within a character
            except UnicodeDecodeError as e:
                fail(f"{path}: {explain_encoding(number, data, e.reason)}")
            rest = data[used:]
            yield line.removeprefix("\ufeff")
    if rest:
        fail(f"{path}: line {number} is not UTF-8 text (its last character is cut); repair the file")


def read_txt(path: Path, field: str) -> Iterator[str]:
    """Yields the documents of plain text, cut at end-of-text lines and at blank lines after 16 KiB."""
    lines: list[str] = []
    size = 0
    for line in read_lines(path, 1 << 20):  # the whole file may be one line
        end = line.strip() == EOT
        if not end:
            lines.append(line)
            size += len(line)
        if end or size >= 1 << 20 or (size >= 1 << 14 and line.isspace()):
            yield "".join(lines)
            lines = []
            size = 0
    yield "".join(lines)


def read_jsonl(path: Path, field: str) -> Iterator[str | None | BadRow]:
    """Yields the text of each line, a JSON object, in `field`."""
    with open_bytes(path) as file:
        for number, data in enumerate(file, 1):
            data = data.removeprefix(codecs.BOM_UTF8)
            if not data.strip():
                continue
            try:
                row = json.loads(data.decode())
            except UnicodeDecodeError as e:
                yield BadRow(explain_encoding(number, data, e.reason))
                continue
            except (ValueError, RecursionError) as e:
                yield BadRow(f"line {number} is not JSON ({e}): one object a line is expected")
                continue
            if not isinstance(row, dict) or not isinstance(row.get(field, 0), str | None):
                what = f'{{"{field}": "..."}} expected; --field names another field'
                yield BadRow(f"line {number} has no text: {what}")
                continue
            yield replace_surrogates(row[field]) if row[field] and b"\\u" in data else row[field]


def read_parquet(path: Path, field: str) -> Iterator[str | None | BadRow]:
    """Yields the text of each row in the column `field`."""
    import pyarrow as pa
    import pyarrow.parquet

    with open_bytes(path) as file, tempfile.TemporaryFile() as plain:
        if path.suffix.lower() in COMPRESSED:  # parquet is read from its end: unpack it
            shutil.copyfileobj(file, plain)
            file = plain
        try:
            # an open file: pyarrow takes some names for addresses, and cannot open those that are not UTF-8
            with pa.parquet.ParquetFile(file) as table:
                names = table.schema_arrow.names
                if field not in names:
                    fail(f"{path}: no column {field!r}, it has {', '.join(names)}; name one with --field")
                batches = table.iter_batches(batch_size=1024, columns=[field])
                values = (value for batch in batches for value in batch.column(0).to_pylist())
                yield from check_rows(values, field)
        except (pa.ArrowException, ValueError) as e:
            fail(f"{path}: cannot be read ({e})")


def check_rows(values: Iterable, field: str) -> Iterator[str | None | BadRow]:
    """Yields the values of a column, and BadRow for what is neither text nor null."""
    for number, value in enumerate(values, 1):
        if value is None or isinstance(value, str):
            yield value
        else:
            yield BadRow(f"row {number} has no text in {field!r}; --field names another column")


READERS = {
    ".txt": read_txt,
    ".jsonl": read_jsonl,
    ".ndjson": read_jsonl,
    ".json": read_jsonl,
    ".parquet": read_parquet,
}


def ask_hub(name: str) -> None:
    """Ends the program if the hub cannot give the dataset.

    `datasets` retries an unreachable hub for half a minute and then names no cause: ask once, first.
    """
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


def read_dataset(label: str, field: str, name: str, config: str | None) -> Iterator[str | None | BadRow]:
    """Yields the text of each row of a dataset of the hub, or in a local directory: its split "train", streamed."""
    if os.path.isdir(name) and glob.escape(name) != name:
        fail(f"{label}: `datasets` takes such a path for a pattern; rename the directory, or give its files")
    try:
        import datasets

        datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # the error below says it once
        builder = datasets.load_dataset_builder(name, config)
        if hasattr(builder.config, "batch_size"):
            # otherwise as many rows as the first row group of a parquet file has, which may be none
            builder.config.batch_size = builder.config.batch_size or 1024
        rows = builder.as_streaming_dataset(split="train")
        if rows.column_names and field not in rows.column_names:
            fail(f"{label}: no column {field!r}, it has {', '.join(rows.column_names)}; name one with --field")
        if rows.column_names:
            rows = rows.select_columns([field])  # parquet then reads no other column
        yield from check_rows((row.get(field, BadRow) for row in rows), field)
    except Exception as e:  # anything from a bad configuration name to a broken download
        home = isinstance(e, OSError) and e.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR)
        remedy = "; set HF_HOME to a directory that can be written" if home else ""
        fail(f"{label}: cannot be read ({type(e).__name__}: {e}){remedy}")


def read_python() -> Iterator[str]:
    """Yields the running interpreter's topics, its .py sources, and the docstrings of modules without a source."""
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
        yield "\n".join(doc for pair in [(name, module), *members] for doc in find_docstrings(*pair, seen))


def find_docstrings(name: str, thing: object, seen: set[str]) -> Iterator[str]:
    """Yields the docstrings of a thing and, if it is a class, of what it holds, each under its name."""
    doc = getattr(thing, "__doc__", None)
    if isinstance(doc, str) and doc not in seen:
        seen.add(doc)
        yield f"{name}\n\n{doc.strip()}\n"
        for key, value in sorted(vars(thing).items()) if isinstance(thing, type) else []:
            yield from find_docstrings(f"{name}.{key}", value, seen)


# ---------------------------------------------------------------------------------------------------------------------
# The source `debian`: prose of documentation packages, the same text wherever the same packages are

# package -> (version, SHA-256 of its .deb), all of Debian 12; of a repeated paragraph the first package's is kept
DEBIAN = {
    "anarchism": ("15.3-3", "cf21c10948b00e923c62eb31c39a3390413fa26c5ee0e3b925feb0ec7fe42948"),
    "perl-doc": ("5.36.0-7+deb12u4", "f4269cff4576d6f02a6756df842988e58451c7e945b08517dd235531b24e48f8"),
    "python3.11-doc": ("3.11.2-6+deb12u9", "5b3594189d6ef9a6963ce0347fd307a1cc67620ad697e144db366070e2e146be"),
    "postgresql-doc-15": ("15.20-0+deb12u1", "4c44bf2c599f208b3f46454a6cf7a72e25ec46ff74d37b59dd31ad76b00eebb7"),
    "sqlite3-doc": ("3.40.1-2+deb12u2", "466e30d7066e2641fa13e56bc662a2ad521b8cc9c17dde9c9dac3d4f105e32f2"),
    "debian-handbook": ("11.20220922", "3d5dbeac1f1afc9c094eab9d0f701f6ecff99c4927d5a4794cf6c85678134faa"),
    "dict-wn": ("1:3.0-37", "ed99e0bf162815dc1cc69de3727eedd7112ddf170badf83dbde26209e0724a8c"),
    "dict-gcide": ("0.48.5+nmu2", "7b0af5cfde3cbdef5e9d6e78f92ec335ced7c2790f37a40f49bebc6f7347ac0f"),
    "linux-doc-6.1": ("6.1.192-2", "d1d1b5a602f0d439ecc39e713e044bf2df30d839fb4bf8a7b859ba3273c47993"),
    "openjdk-17-doc": ("17.0.21.1+2-1~deb12u1", "3e04db24dbcb31d598774973998f1d8212e3424e288befbfef235077325f841d"),
    "ghc-doc": ("9.0.2-4", "a7c77e36c8906f82eef411ceeba13b7d663b7766a5ecc6659e3405889e0429c9"),
    "racket-doc": ("8.7+dfsg1-1", "d50139b4bf806cd280bd18146ca2e7579cede5da23cc7f5c663044596af4e00f"),
    "erlang-doc": ("1:25.2.3+dfsg-1+deb12u4", "7d172cecfdd9c2930b27c776ad226ffcc84670375cf830c79ee41c6944e8a1c8"),
    "vim-doc": ("2:9.0.1378-2+deb12u2", "6a7e9419d1e249ab5eabd4753bf600e807ccd564dbd9621d0fb90fa30d25e36d"),
    "git-doc": ("1:2.39.5-0+deb12u3", "3c89668a11053a6bafade3de1f611f4613db31e082af63f43d8c5b69ad8795ec"),
    "rust-doc": ("1.63.0+dfsg1-2", "96ef96fe6df87d939ca713bd7df3d15c2b778ccb892eca025c4ee504146f697b"),
    "freebsd-manpages": ("12.2-1", "2d4a9606bd59d4c71e6d8355dee3d2624b0ebdab79d3ab5e9169ed7fbb0c197a"),
    "dict-foldoc": ("20230119-1", "745cbedb55c2da609cc88ee0284e9d11a67a11ae3709daf7bad0e895ac3294c3"),
    "cmake-doc": ("3.25.1-1", "6e805a758ffed87cc7ea234cf0a7a1bb8ae78b93d8b5783e7fb989a6320f8133"),
    "python-django-doc": ("3:3.2.25-0+deb12u7", "87307f067916df72e17180d35b7cde5c7ea6080336cda518efd7f6e66988a7ca"),
    "manpages-dev": ("6.03-2", "96f55cb5e26231d5567c89b692bced63825a14a2d5bd18fdf16ea2ed44eb9838"),
    "fortunes": ("1:1.99.1-7.3", "41d0551dc0ff52f875a2ecef7c39da2f672ab468c37e170119f7e0245a9d63c5"),
    "apache2-doc": ("2.4.71-1~deb12u1", "a7b3d1131c1c63dbf9999b28e75f9a133d30f70492b419936bd51759ac77a01f"),
}
DEBIAN_SMALL = 6  # the first packages make debian-small
# HTML elements that begin a paragraph, and those that hold no prose
BLOCKS = set("p div section article main blockquote pre br h1 h2 h3 h4 h5 h6 ul ol li dl dt dd table tr th td".split())
DROPPED = set("head header nav footer form button script noscript style svg select".split())
# names of the files that are plain text, and of those left out: lists of changes, licences, indices, translations
PLAIN_TEXT = re.compile(r".*\.(txt|text|md|rst|adoc|pod|dict)")
LEFT_OUT = re.compile(
    r"changelog|copyright$|genindex|searchindex|[._-](ca|cs|da|de|es|fr|hu|it|ja|ko|nl|pl|pt|ru|tr|vi|zh)(\.|[_-]|$)"
)
# English sentences have these; tables, code and other languages do not
COMMON_WORDS = (" a ", " and ", " be ", " in ", " is ", " it ", " of ", " that ", " the ", " to ")


@cache
def read_debian(source: str) -> tuple[list[str], list[str]]:
    """Returns (documents, names of the .deb files) of debian, debian-small, or either with a directory: debian:DIR.

    A paragraph that came before is dropped, and then a document below 200 characters. Documents are in the order of
    a hash, so that the packages are mixed. They stay in memory (0.3 GB): training a tokenizer reads them as well.
    """
    from tqdm import tqdm

    if importlib.util.find_spec("lxml") is None:
        fail(f"{source}: needs lxml to read HTML; run: pip install lxml")
    name, _, directory = source.partition(":")
    packages = list(DEBIAN)[: DEBIAN_SMALL if name == "debian-small" else None]
    # what has been read, and (hash, text, package) of each document
    seen: set[bytes] = set()
    found: list[tuple[str, str, str]] = []
    # processes, since a walk through HTML holds the GIL; spawned, since the fork of a process with threads may hang
    workers = ProcessPoolExecutor(min(os.cpu_count() or 1, len(packages)), multiprocessing.get_context("spawn"))
    with tempfile.TemporaryDirectory() as downloads, workers:
        # the packages: what apt gave must be the listed ones, what the user gives may be newer
        if not directory:
            download_packages(source, Path(downloads), packages)
        files = find_packages(source, Path(directory or downloads), packages)
        for package, file in zip(packages, files, strict=True):
            if hash_file(file) == DEBIAN[package][1]:
                continue
            if not directory:
                fail(f"{source}: {file.name} as downloaded has not the listed SHA-256; try again, or another mirror")
            print(f"note: {file.name} is not the listed {DEBIAN[package][0]}: the text will differ", file=sys.stderr)
        # their prose, in order of the list, since the first of equal paragraphs is kept
        contents = tqdm(workers.map(read_package, files), "unpack", len(files), disable=None)
        try:
            for package, pages in zip(packages, contents, strict=True):
                for page in pages:
                    fresh = drop_repeated(page, seen)
                    if sum(map(len, fresh)) >= 200:
                        text = replace_surrogates("\n\n".join(fresh))
                        found.append((hashlib.md5(text.encode()).hexdigest(), text, package))
        except (ValueError, BrokenProcessPool) as e:
            fail(f"{source}: {e}")
    return [text for _, text, _ in sorted(found)], [file.name for file in files]


def drop_repeated(paragraphs: list[str], seen: set[bytes]) -> list[str]:
    """Returns the paragraphs whose digest is not in `seen`, whatever their case, and adds theirs to it."""
    fresh = []
    for paragraph in paragraphs:
        digest = hashlib.md5(paragraph.lower().encode("utf-8", "replace")).digest()
        if digest not in seen:
            seen.add(digest)
            fresh.append(paragraph)
    return fresh


def download_packages(source: str, directory: Path, packages: list[str]) -> None:
    """Downloads the listed versions by apt-get into `directory`. Ends the program with the names that apt lacks."""
    if shutil.which("apt-get") is None:
        fail(f"{source}: no apt-get here; fetch the .deb files on a Debian 12 and name their directory: {source}:DIR")
    wanted = [f"{name}={DEBIAN[name][0]}" for name in packages]
    command = ["apt-get", "download", "-q"]
    run = partial(subprocess.run, cwd=directory, capture_output=True, text=True, env=os.environ | {"LC_ALL": "C"})
    directory.chmod(0o755)  # apt downloads as a user of its own
    done = run([*command, *wanted])
    if done.returncode:
        # apt names only the first that it lacks
        missing = [item for item in wanted if run([*command, "--print-uris", item]).returncode]
        if missing:
            fail(
                f"{source}: apt does not offer {', '.join(missing)}: run apt-get update; where newer versions have "
                "replaced these, put them, or the old ones from Debian's snapshot archive, into a directory with the "
                f"others and name it: {source.partition(':')[0]}:DIR"
            )
        reason = next((line for line in done.stderr.splitlines() if line.startswith("E:")), "no reason given")
        fail(f"{source}: apt-get download failed ({reason})")


def find_packages(source: str, directory: Path, packages: list[str]) -> list[Path]:
    """Returns the .deb file of each package in a directory: the listed one, or the only one."""
    files = []
    missing = []
    for name in packages:
        found = sorted(directory.glob(f"{name}_*.deb"))
        listed = [file for file in found if hash_file(file) == DEBIAN[name][1]]
        if not found:
            missing.append(f"{name}_{DEBIAN[name][0]}")
        elif not listed and len(found) > 1:
            fail(f"{source}: {directory} holds {found[0].name} and {found[1].name}; keep one of them")
        files += listed[:1] or found
    if missing:
        fail(f"{source}: {directory} lacks {', '.join(missing)}; fetch them with apt-get download NAME")
    return files


def hash_file(path: Path) -> str:
    """Returns the SHA-256 of a file in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_package(path: Path) -> list[list[str]]:
    """Returns the pages of a .deb file, each a list of paragraphs. Raises ValueError if it is damaged."""
    try:
        with open_package(path) as archive:
            files = [member for member in archive.getmembers() if member.isfile() or member.islnk()]
            pages = []
            for member in sorted(files, key=lambda member: member.name.split("/")):
                if not LEFT_OUT.search(os.path.basename(member.name).lower()):
                    raw = archive.extractfile(member).read()
                    pages += split_pages(extract_text(f"/{path.name.partition('_')[0]}/{member.name}", raw))
            return pages
    except (OSError, EOFError, ValueError, zlib.error, lzma.LZMAError, tarfile.TarError) as e:
        raise ValueError(f"{path.name} cannot be read ({e}); fetch it again") from None


def open_package(path: Path) -> tarfile.TarFile:
    """Returns the archive of the files in a .deb, which is an ar archive of it and two others.

    Read here and not by dpkg, so that a directory of packages will do on any system.
    """
    raw = path.read_bytes()
    start = 8
    if not raw.startswith(b"!<arch>\n"):
        raise ValueError("not a Debian package")
    while start < len(raw):
        # a header of 60 bytes: the name in the first 16, the size in decimal from 48 to 58
        name = raw[start : start + 16].rstrip(b" /")
        size = int(raw[start + 48 : start + 58])
        start += 60
        if name.startswith(b"data.tar"):
            data = raw[start : start + size]
            # whole, since files are read in order of their names: seeking in .xz begins at the beginning
            return tarfile.open(fileobj=io.BytesIO(lzma.decompress(data) if name.endswith(b".xz") else data))
        start += size + size % 2
    raise ValueError("no data in it")


def extract_text(path: str, raw: bytes) -> str:
    """Returns the text of a documentation file, nothing for other files. `path` begins with the package's name."""
    name = os.path.basename(path).lower()
    if name.endswith((".gz", ".dz")):
        raw = gzip.decompress(raw)
        name = name[:-3]
    if name.endswith((".html", ".htm", ".xhtml")):
        return extract_html(raw)
    if not (PLAIN_TEXT.fullmatch(name) or "/fortunes/" in path or re.search(r"/man/man\d/", path)):
        return ""
    try:
        text = raw.decode()
    except UnicodeDecodeError:
        text = raw.decode("latin-1")
    # the marks of fonts, nothing, italic correction and hyphen in manual pages
    return re.sub(r"\\(f[BIRP]|&|/)", "", text).replace("\\-", "-")


def extract_html(raw: bytes) -> str:
    """Returns the text of a page, blocks set apart by blank lines; nothing if it cannot be parsed."""
    import lxml.html

    try:
        root = lxml.html.document_fromstring(raw)
    except (ValueError, lxml.etree.LxmlError):
        return ""
    parts = []
    walk = lxml.etree.iterwalk(root, ("start", "end", "comment", "pi"))
    for event, node in walk:
        if event == "start" and node.tag in DROPPED:
            walk.skip_subtree()
        elif event in ("start", "end") and node.tag not in DROPPED:
            parts.append("\n\n" if node.tag in BLOCKS else "")
            parts.append(node.text or "" if event == "start" else "")
        # what follows an element, or a comment, belongs to what is around it
        if event != "start":
            parts.append(node.tail or "")
    return "".join(parts)


def split_pages(text: str) -> Iterator[list[str]]:
    """Yields the prose of a text as lists of paragraphs, each of a little more than 64 KiB at most."""
    page: list[str] = []
    size = 0
    for paragraph in re.split(r"\n\s*\n", text):
        paragraph = " ".join(paragraph.split())
        if is_prose(paragraph):
            page.append(paragraph)
            size += len(paragraph)
        if size > 1 << 16:
            yield page
            page = []
            size = 0
    if page:
        yield page


def is_prose(paragraph: str) -> bool:
    """Returns whether a paragraph is of English sentences: long enough, mostly letters and words, and common ones."""
    words = paragraph.split()
    if len(paragraph) < 80 or len(words) < 12:
        return False
    letters = sum(char.isalpha() or char == " " for char in paragraph)
    plain = sum(word.strip(".,;:()\"'").isalpha() for word in words)
    if letters / len(paragraph) < 0.8 or plain / len(words) < 0.72:
        return False
    padded = f" {paragraph.lower()} "
    return sum(padded.count(word) for word in COMMON_WORDS) >= 2


# ---------------------------------------------------------------------------------------------------------------------
# Tokens


def hash_fraction(text: bytes) -> float:
    """Returns a number in [0, 1) that depends on the text alone: below --val-fraction, the document belongs to val."""
    return int.from_bytes(hashlib.md5(text).digest(), "big") / 2**128


def take_chars(documents: Iterable[str], size: float) -> Iterator[str]:
    """Yields the documents of the first `size` characters."""
    for text in documents:
        yield text
        size -= len(text)
        if size < 0:
            return


class ShardWriter:
    """Appends documents to {split}_%06d.bin; the header of each, with its count, is written last."""

    def __init__(self, directory: Path, split: str, dtype: np.dtype, limit: int):
        self.directory = directory
        self.split = split
        self.dtype = dtype
        self.limit = limit  # tokens a shard
        self.file = None
        self.tokens = self.documents = self.bytes = 0

    def write(self, tokens: np.ndarray, size: int) -> None:
        """Appends a document, end-of-text included, of `size` bytes of text."""
        self.documents += 1
        self.bytes += size
        while len(tokens):
            shard, offset = divmod(self.tokens, self.limit)
            if offset == 0:
                self.close()
                self.file = open(self.directory / f"{self.split}_{shard:06d}.bin", "wb")
                self.file.write(bytes(HEADER_BYTES))
            part = tokens[: self.limit - offset]
            tokens = tokens[self.limit - offset :]
            self.file.write(part.data)
            self.tokens += len(part)

    def close(self) -> None:
        """Completes the shard that is open, if any, by its header."""
        if self.file is not None:
            count = (self.file.tell() - HEADER_BYTES) // self.dtype.itemsize
            magic = next(key for key, dtype in SHARD_FORMATS.items() if dtype == self.dtype)
            self.file.seek(0)
            self.file.write(np.array([*magic, count], "<i4").data)
            self.file.close()


def group_documents(documents: Iterable[str], size: int = 1 << 20) -> Iterator[list[str]]:
    """Yields the documents that are not blank, in lists of about `size` characters."""
    batch: list[str] = []
    total = 0
    for text in documents:
        if text and not text.isspace():
            batch.append(text)
            total += len(text)
        if total >= size:
            yield batch
            batch = []
            total = 0
    if batch:
        yield batch


def map_in_order(pool: ThreadPoolExecutor, function: Callable, items: Iterable, ahead: int) -> Iterator:
    """Yields what pool.map does, but takes no more than `ahead` items before their turn.

    pool.map takes them all: the whole corpus.
    """
    flying: deque = deque()
    for item in items:
        flying.append(pool.submit(function, item))
        if len(flying) > ahead:
            yield flying.popleft().result()
    while flying:
        yield flying.popleft().result()


def write_shards(sources: list[str | Path], encoding: tiktoken.Encoding, directory: Path, args) -> dict:
    """Tokenizes into the shards of both splits; returns the counts for meta.json.

    Threads, not processes: tiktoken releases the GIL. Two threads were measured at 26 MB/s where one does 16, and
    nothing is pickled. Few batches are under way, so memory does not grow with the corpus.
    """
    from tqdm import tqdm

    # two shards under way, one a split
    wide = args.dtype == "uint32" or (args.dtype == "auto" and encoding.n_vocab > 65536)
    dtype = np.dtype("<u4" if wide else "<u2")
    train = ShardWriter(directory, "train", dtype, args.shard_tokens)
    val = ShardWriter(directory, "val", dtype, args.shard_tokens)

    def encode_batch(batch: list[str]) -> list[tuple[float, int, np.ndarray]]:
        """Returns (hash_fraction, bytes, tokens with end-of-text) of each document."""
        rows = []
        for text in batch:
            raw = text.encode()
            tokens = np.append(encode_array(encoding, text), encoding.eot_token).astype(dtype)
            rows.append((hash_fraction(raw), len(raw), tokens))
        return rows

    # the bar goes by the size of the files, where it is known; the text in them is less
    plain = all(isinstance(s, Path) and s.suffix.lower() in READERS and s.suffix != ".parquet" for s in sources)
    total = sum(s.stat().st_size for s in sources) if plain else None
    bar = tqdm(total=total, unit="B", unit_scale=True, desc="tokenize", disable=None)
    # tokenized ahead in threads, written in order; the extremes are for the errors below
    skipped: Counter = Counter()
    lowest = 1.0
    highest = 0.0
    with bar, ThreadPoolExecutor(args.threads) as pool:
        batches = group_documents(read_documents(sources, args.field, args.skip_bad, skipped))
        done = map_in_order(pool, encode_batch, batches, 2 * args.threads)
        for fraction, size, tokens in chain.from_iterable(done):
            writer = val if fraction < args.val_fraction else train
            writer.write(tokens, size)
            lowest = min(lowest, fraction)
            highest = max(highest, fraction)
            bar.update(size)
            if args.max_tokens and train.tokens >= args.max_tokens:
                break
    train.close()
    val.close()

    # a split without documents is of no use to anyone
    source = " ".join(args.source)
    documents = train.documents + val.documents
    if documents == 0:
        fail(f"{source}: no text found")
    if documents == 1:
        fail(f"{source}: only one document, which cannot be split into train and val; add more text")
    if val.documents == 0:
        fail(f"none of the {documents} documents is in val: --val-fraction {lowest + 1e-3:.3f} takes the first")
    if train.documents == 0:
        fail(f"all {documents} documents are in val: --val-fraction {highest - 1e-3:.3f} or less leaves some to train")
    if skipped:
        kinds = " and ".join(f"{count} {kind}" for kind, count in sorted(skipped.items()))
        print(f"note: skipped {kinds} rows, which hold no text", file=sys.stderr)
    counts = {f"{w.split}_{key}": getattr(w, key) for w in (train, val) for key in ("tokens", "documents", "bytes")}
    return counts | {"dtype": dtype.name, "skipped_rows": skipped.total()}


# ---------------------------------------------------------------------------------------------------------------------
# Command line


@contextmanager
def replace_directory(out: Path, overwrite: bool) -> Iterator[Path]:
    """Gives an empty, locked directory, which becomes OUT at the end, or is removed if the block fails.

    It is OUT.partial, which one rename makes OUT. Where OUT cannot be renamed, since it is a mount point (a volume of a
    container) or its parent is not ours, it is OUT/.partial, whose files are moved at the end.
    """
    target = out.resolve()  # a link stays
    found = check_output(out, target, overwrite)
    fixed = target.exists() and (os.path.ismount(target) or not os.access(target.parent, os.W_OK))
    making = target / UNFINISHED if fixed else target.with_name(target.name + ".partial")
    making.mkdir(parents=True, exist_ok=True)
    # what an interrupted run left has its lock in it, anything else is the user's
    mark = making / LOCK
    if making.is_symlink() or (not mark.exists() and any(making.iterdir())):
        fail(f"--out {out}: {making} is in the way and was not made by prepare.py; rename it, or name another --out")
    # one process at a time; the next one can say who has it
    lock = os.open(mark, os.O_RDWR | os.O_CREAT)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.read(lock, 999).decode(errors="replace")
        fail(f"--out {out}: another prepare.py is writing it ({holder}); wait for that one or name another directory")
    # from here on the directory is ours to remove
    try:
        os.truncate(lock, 0)
        os.write(lock, f"process {os.getpid()} on {socket.gethostname()}".encode())
        for path in making.iterdir():
            if path != mark:
                path.unlink()
        yield making
        for path in (*making.iterdir(), making):
            sync(path)
        publish(making, target, found)
    except BaseException:
        shutil.rmtree(making, ignore_errors=True)
        raise
    finally:
        os.close(lock)


def check_output(out: Path, target: Path, overwrite: bool) -> list[Path]:
    """Returns the files of prepared data that --out holds already. Ends the program where it must not be touched."""
    if target.exists() and not target.is_dir():
        fail(f"--out {out}: is a file")
    if Path.cwd().is_relative_to(target):
        fail(f"--out {out}: holds the current directory; name another directory")
    inside = list(target.iterdir()) if target.exists() else []
    inside = [path for path in inside if path.name not in ("lost+found", UNFINISHED)]  # a new file system has the first
    stopped = (target / UNFINISHED / LOCK).exists() and not (target / "meta.json").exists()
    if inside and not stopped and not (target / "meta.json").exists():
        fail(f"--out {out}: exists and was not made by prepare.py; name another directory")
    foreign = [path.name for path in inside if not re.fullmatch(OUTPUTS, path.name)]
    if foreign:
        fail(f"--out {out}: holds {foreign[0]}, which prepare.py did not make; move it, or name another directory")
    if inside and not stopped and not overwrite:
        fail(f"--out {out}: is prepared already; use it, name another directory, or replace it with --overwrite")
    return inside


def publish(making: Path, target: Path, found: list[Path]) -> None:
    """Makes the directory `making` the directory `target`, in which the files `found` are replaced."""
    try:
        if making.parent != target:
            swap_directories(making, target)
            return
    except OSError as e:
        # a mount that ismount() does not see, or a directory of a container's image: no rename moves it
        if e.errno not in (errno.EBUSY, errno.EXDEV):
            raise
    # a directory without meta.json that has UNFINISHED in it is not read: first that file goes, and last it comes
    (target / UNFINISHED).mkdir(exist_ok=True)
    (target / UNFINISHED / LOCK).touch()
    files = [path for path in making.iterdir() if path.name != LOCK]
    moved = []
    try:
        for path in sorted(found, key=lambda path: path.name != "meta.json"):
            path.unlink()
        for path in sorted(files, key=lambda path: path.name == "meta.json"):
            moved.append(target / path.name)
            shutil.move(path, moved[-1])
            sync(moved[-1])
    except BaseException:  # half of the old and half of the new are of no use
        for path in (*found, *moved):
            path.unlink(missing_ok=True)
        raise
    finally:
        shutil.rmtree(target / UNFINISHED, ignore_errors=True)
    shutil.rmtree(making, ignore_errors=True)
    sync(target)


def swap_directories(making: Path, target: Path) -> None:
    """Renames `making` to `target`, whose former files are removed. Raises OSError and changes nothing if it cannot."""
    old = None
    if target.exists() and any(target.iterdir()):  # rename wants an empty target
        old = Path(tempfile.mkdtemp(prefix=target.name + ".old.", dir=target.parent))
    try:
        if old:
            os.rename(target, old)
        os.rename(making, target)
    except OSError:
        if old and not target.exists():
            os.rename(old, target)
        elif old:
            old.rmdir()
        raise
    (target / LOCK).unlink()
    sync(target)
    sync(target.parent)
    if old:
        shutil.rmtree(old, ignore_errors=True)


def sync(path: Path) -> None:
    """Waits until a file or a directory is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def parse_tokenizer(name: str) -> tuple[int, tiktoken.Encoding | None]:
    """Returns (size of the vocabulary, encoding); the encoding is None for train:N, which is to be trained."""
    if not name.startswith("train:"):
        encoding = load_tokenizer(name)
        return encoding.n_vocab, encoding
    try:
        size = whole(name.removeprefix("train:"))
    except ArgumentTypeError:
        size = 0
    if not 257 <= size <= 1 << 20:
        fail(f"--tokenizer {name}: train:N needs N from 257 (256 bytes and end-of-text) to {1 << 20}, as train:8192")
    return size, None


def train_on_sources(sources: list[str | Path], size: int, path: Path, args) -> tiktoken.Encoding:
    """Trains a tokenizer on the train documents in the first 64 MB, writes tokenizer.json to `path`, and returns it."""
    sample = take_chars(read_documents(sources, args.field, args.skip_bad), 64e6)
    train_tokenizer((t for t in sample if hash_fraction(t.encode()) >= args.val_fraction), size, path)
    encoding = load_tokenizer(path)
    if encoding.n_vocab < size:
        print(f"note: the corpus has no more pairs to merge: vocabulary {encoding.n_vocab}, not {size}")
    return encoding


def prepare(args: argparse.Namespace) -> dict:
    """Does everything between the command line and the finished directory; returns meta.json's dict."""
    # all that can be wrong with the command line, before anything is written
    sources = resolve_sources(args.source)
    name = find_tokenizer(args.tokenizer)
    size, encoding = parse_tokenizer(name)
    if args.dtype == "uint16" and size > 65536:
        fail(f"--dtype uint16 holds ids below 65536, the vocabulary of {name} has {size}: use --dtype uint32 or auto")
    if args.shard_tokens >= 2**31:
        fail(f"--shard-tokens {args.shard_tokens}: the count in a shard's header is an int32, below {2**31}")
    with replace_directory(args.out, args.overwrite) as out:
        # the tokenizer: trained, or converted where it is not tiktoken's
        trained = encoding is None
        if trained:
            name = str(out / f"bpe{size}.json")
            encoding = train_on_sources(sources, size, Path(name), args)
        file = out / (f"{encoding.name}.tiktoken" if name.endswith(".json") else Path(name).name)
        if name.endswith(".json"):
            sample = take_chars(read_documents(sources, args.field, args.skip_bad), 2e6)
            check_conversion(Path(name), encoding, sample)
            write_ranks(file, encoding)
        elif name.endswith(".tiktoken"):
            shutil.copyfile(name, file)
        if trained:
            os.unlink(name)

        # the shards, and last what says that they are complete
        meta = {"vocab_size": encoding.n_vocab, "tokenizer": file.name, "eot": encoding.eot_token}
        meta |= write_shards(sources, encoding, out, args)
        meta |= {"source": " ".join(args.source), "val_fraction": args.val_fraction, "split": "md5 of the text"}
        if "python" in sources:
            meta["python"] = sys.version.split()[0]
        for source in sources:
            if isinstance(source, str) and source.startswith("debian"):
                meta["packages"] = read_debian(source)[1]
        (out / "meta.json").write_text(json.dumps(meta, indent=1), encoding="utf-8")
    return meta


def parse_fraction(text: str) -> float:
    """Returns a number between 0 and 1. Raises ArgumentTypeError."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < 1:
        raise ArgumentTypeError(f"{text} is not between 0 and 1 (0.01: one document in a hundred)")
    return value


def parse_count(text: str) -> int:
    """Returns a whole number from 1 up. Raises ArgumentTypeError."""
    value = whole(text)
    if value < 1:
        raise ArgumentTypeError(f"{text} is not a number from 1 up")
    return value


def main() -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("source", nargs="*", default=["python"], help="what to read (default: python)")
    add("--out", type=Path, required=True, help="directory to make, such as data/python")
    add("--tokenizer", default="train:8192", help="train:N, a name, FILE.tiktoken or DIR (default: %(default)s)")
    add("--val-fraction", type=parse_fraction, default=0.01, help="documents held out (default: %(default)s)")
    add("--field", default="text", help="column of .jsonl, .parquet and hub rows (default: %(default)s)")
    add("--skip-bad", action="store_true", help="leave out rows that hold no text, and say how many")
    add("--max-tokens", type=parse_count, help="stop after this many train tokens")
    add("--shard-tokens", type=parse_count, default=100_000_000, help="tokens a shard (default: %(default)s)")
    add("--dtype", choices=["auto", "uint16", "uint32"], default="auto", help="of ids (default: by vocabulary)")
    add("--threads", type=parse_count, default=os.cpu_count(), help="that tokenize (default: all cores)")
    add("--overwrite", action="store_true", help="replace an output directory that is already prepared")
    # the work; what goes wrong on the way is one line
    args = parser.parse_intermixed_args()
    began = time.perf_counter()
    try:
        meta = prepare(args)
    except OSError as e:
        fail(f"{e.filename or args.out}: {e.strerror or e}; nothing was written")
    except KeyboardInterrupt:
        print("interrupted: nothing was written", file=sys.stderr)
        sys.exit(130)

    # what came out
    seconds = time.perf_counter() - began
    size = meta["train_bytes"] + meta["val_bytes"]
    train = meta["train_tokens"]
    val = meta["val_tokens"]
    print(
        f"{spell(args.out)}: {size / 1e6:.1f} MB of text in {seconds:.1f} s, {train:,} train and {val:,} val "
        f"tokens, vocabulary {meta['vocab_size']}, {size / (train + val):.2f} bytes a token"
    )


if __name__ == "__main__":
    main()
