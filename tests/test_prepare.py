"""prepare.py: the shard format, tokenizers, the split, every error message, and what an interruption leaves."""

import argparse
import base64
import codecs
import errno
import gzip
import hashlib
import io
import json
import os
import re
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest

import prepare
from cli import whole
from prepare import EOT, Shards, load_meta, load_tokenizer

ROOT = Path(__file__).resolve().parent.parent
WORDS = "the recursion of a token ends where its router says so and the cache keeps what was read before it".split()


def make_text(seed: int, words: int = 60) -> str:
    rng = np.random.default_rng(seed)
    return " ".join(rng.choice(WORDS, words)) + f" — naïve №{seed}\n"


@pytest.fixture
def corpus(tmp_path: Path, monkeypatch) -> Path:
    """40 documents in corpus.jsonl of the current directory."""
    monkeypatch.chdir(tmp_path)
    Path("corpus.jsonl").write_text("".join(json.dumps({"text": make_text(i)}) + "\n" for i in range(40)))
    return tmp_path


def run(*args: str) -> dict:
    """prepare.py's command line in this process; the meta.json that it made."""
    sys.argv = ["prepare.py", *map(str, args)]
    prepare.main()
    return load_meta(args[args.index("--out") + 1])


def error(capsys, *args: str) -> str:
    """The one line with which the command line fails."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit_:
        run(*args)
    err = capsys.readouterr().err
    assert exit_.value.code == 2 and re.fullmatch(r"error: [^\n]+\n", err), err
    assert not list(Path().glob("**/*.partial"))
    return err


def documents(directory: str | Path, split: str) -> list[str]:
    """The texts of a split, found by its end-of-text tokens."""
    meta, shards, encoding = load_meta(directory), Shards(directory, split), load_tokenizer(directory)
    ids = shards.tokens(0, len(shards))
    assert len(ids) == meta[f"{split}_tokens"] and ids[-1] == meta["eot"] and ids.max() < meta["vocab_size"]
    pieces = np.split(ids, np.flatnonzero(ids == meta["eot"]) + 1)[:-1]
    return [encoding.decode(p[:-1].tolist()) for p in pieces]


def byte_ranks(path: str | Path, extra: int = 0) -> Path:
    """A rank file of the 256 bytes and `extra` tokens that no text holds."""
    tokens = [bytes([b]) for b in range(256)] + [b"\xff\xfe" + str(i).encode() for i in range(extra)]
    Path(path).write_bytes(b"".join(base64.b64encode(t) + b" %d\n" % i for i, t in enumerate(tokens)))
    return Path(path)


# ---------------------------------------------------------------------------------------------------------------------
# Shards


def write_llmc(path: Path, tokens: list[int], magic: int, version: int, code: str) -> None:
    """A shard as llm.c's data_common.py writes it, by hand."""
    header = [magic, version, len(tokens)] + [0] * 253
    path.write_bytes(b"".join(v.to_bytes(4, "little") for v in header) + np.array(tokens, code).tobytes())


@pytest.mark.parametrize("magic, version, code", [(20240520, 1, "<u2"), (20240801, 7, "<u4")])
def test_reads_llmc_layout_across_shard_borders(tmp_path, magic, version, code):
    values = [i * 7 % 50000 + (100000 if code == "<u4" else 0) for i in range(100)]
    for i, (a, b) in enumerate([(0, 30), (30, 30), (30, 37), (37, 100)]):  # the second is empty
        write_llmc(tmp_path / f"fineweb_train_{i + 1:06d}.bin", values[a:b], magic, version, code)
    shards = Shards(tmp_path, "train")
    assert len(shards) == 100 and len(shards.files) == 4 and shards.dtype == np.dtype(code)
    for start in range(0, 100, 9):
        for length in (0, 1, 8, 100 - start):
            got = shards.tokens(start, min(length, 100 - start))
            assert got.dtype == np.int64 and got.tolist() == values[start : start + length]
    for start, length in [(-1, 2), (99, 2), (101, 0)]:
        with pytest.raises(IndexError):
            shards.tokens(start, length)


def test_llmc_directory_without_meta_is_gpt2(tmp_path, capsys):
    write_llmc(tmp_path / "fineweb_train_000001.bin", [50256, 1, 2], 20240520, 1, "<u2")
    write_llmc(tmp_path / "fineweb_val_000000.bin", [50256, 3], 20240520, 1, "<u2")
    meta = load_meta(tmp_path)
    assert (meta["vocab_size"], meta["tokenizer"], meta["eot"], meta["val_tokens"]) == (50257, "gpt2", 50256, 2)
    for name in ("fineweb_train_000001.bin", "fineweb_val_000000.bin"):
        write_llmc(tmp_path / name, [1, 2], 20240801, 7, "<u4")
    with pytest.raises(SystemExit):
        load_meta(tmp_path)
    assert "uint32 shards need a meta.json" in capsys.readouterr().err


def test_written_bytes_are_the_llmc_layout(corpus):
    byte_ranks("bytes.tiktoken")
    meta = run("corpus.jsonl", "--out", "d", "--tokenizer", "bytes.tiktoken", "--val-fraction", "0.3")
    raw = Path("d/train_000000.bin").read_bytes()
    header = np.frombuffer(raw[:1024], "<i4")
    assert header[:3].tolist() == [20240520, 1, meta["train_tokens"]] and not header[3:].any()
    body = np.frombuffer(raw[1024:], "<u2")
    texts = [make_text(i) for i in range(40)]
    train = [t for t in texts if int(hashlib.md5(t.encode()).hexdigest(), 16) / 16**32 >= 0.3]
    assert body.tolist() == [i for t in train for i in [*t.encode(), 256]]
    assert meta["vocab_size"] == 257 and meta["eot"] == 256 and meta["train_documents"] == len(train)
    assert meta["train_bytes"] == sum(len(t.encode()) for t in train)


def test_uint32_for_large_vocabularies(corpus, capsys):
    byte_ranks("large.tiktoken", extra=65536 - 256)  # 65536 ranks and end-of-text: id 65536 needs 17 bits
    meta = run("corpus.jsonl", "--out", "d", "--tokenizer", "large.tiktoken", "--val-fraction", "0.3")
    assert meta["dtype"] == "uint32" and meta["vocab_size"] == 65537
    assert np.fromfile("d/train_000000.bin", "<i4", 2).tolist() == [20240801, 7]
    assert sorted(documents("d", "train") + documents("d", "val")) == sorted(make_text(i) for i in range(40))
    byte_ranks("fits.tiktoken", extra=65535 - 256)
    meta = run("corpus.jsonl", "--out", "e", "--tokenizer", "fits.tiktoken", "--val-fraction", "0.3")
    assert meta["dtype"] == "uint16" and meta["eot"] == 65535 and documents("d", "val") == documents("e", "val")
    message = error(capsys, "corpus.jsonl", "--out", "f", "--tokenizer", "large.tiktoken", "--dtype", "uint16")
    assert "the vocabulary of large.tiktoken has 65537: use --dtype uint32" in message


def test_many_shards_hold_what_one_holds(corpus):
    byte_ranks("bytes.tiktoken")
    flags = ["--tokenizer", "bytes.tiktoken", "--val-fraction", "0.3"]
    run("corpus.jsonl", "--out", "one", *flags)
    run("corpus.jsonl", "--out", "many", "--shard-tokens", "1000", *flags, "--threads", "3")
    one, many = Shards("one", "train"), Shards("many", "train")
    assert len(many.files) == -(-len(one) // 1000) and [len(m) for m in many.maps[:-1]] == [1000] * (len(many.maps) - 1)
    assert (one.tokens(0, len(one)) == many.tokens(0, len(many))).all()


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda raw: raw[:-2], "damaged: its header says"),
        (lambda raw: raw + b"\0\0", "damaged: its header says"),
        (lambda raw: raw[:500], "not a token shard"),
        (lambda raw: b"", "not a token shard"),
        (lambda raw: b"\0" * 1024, "not a token shard"),  # an interrupted writer's header
        (lambda raw: raw[:4] + b"\x07" + raw[5:], "not a token shard"),
    ],
)
def test_damaged_shards_are_refused(tmp_path, capsys, damage, message):
    path = tmp_path / "train_000000.bin"
    write_llmc(path, [1, 2, 3], 20240520, 1, "<u2")
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(SystemExit):
        Shards(tmp_path, "train")
    err = capsys.readouterr().err
    assert message in err and str(path) in err


def test_missing_and_mixed_data_is_refused(tmp_path, capsys):
    def message(action) -> str:
        with pytest.raises(SystemExit) as exit_:
            action()
        assert exit_.value.code == 2
        return capsys.readouterr().err

    assert "no such data directory" in message(lambda: load_meta(tmp_path / "nowhere"))
    assert "no train_*.bin" in message(lambda: load_meta(tmp_path))
    write_llmc(tmp_path / "train_000000.bin", [1], 20240520, 1, "<u2")
    write_llmc(tmp_path / "train_000001.bin", [1], 20240801, 7, "<u4")
    assert "are mixed" in message(lambda: Shards(tmp_path, "train"))
    (tmp_path / "meta.json").write_text('{"vocab_size": 5')
    assert "meta.json: cannot be read" in message(lambda: load_meta(tmp_path))
    (tmp_path / "meta.json").write_text('{"vocab_size": 5, "eot": 4, "train_tokens": 1, "val_tokens": 1}')
    assert "meta.json: has no tokenizer" in message(lambda: load_meta(tmp_path))


# ---------------------------------------------------------------------------------------------------------------------
# Documents and the split


def test_split_depends_on_the_text_alone(corpus):
    byte_ranks("bytes.tiktoken")
    flags = ["--tokenizer", "bytes.tiktoken", "--val-fraction", "0.3"]
    run("corpus.jsonl", "--out", "all", *flags)
    lines = Path("corpus.jsonl").read_text().splitlines(keepends=True)
    Path("part.jsonl").write_text("".join(lines[::-2]))
    run("part.jsonl", "--out", "part", *flags)
    for split in ("train", "val"):
        assert set(documents("part", split)) == set(documents("all", split)) & {make_text(i) for i in range(1, 40, 2)}
    run("corpus.jsonl", "--out", "again", *flags, "--threads", "1")
    assert all((Path("again") / p.name).read_bytes() == p.read_bytes() for p in Path("all").iterdir())


def test_all_kinds_of_files_hold_the_same_documents(corpus):
    import pyarrow as pa
    import pyarrow.parquet
    import zstandard

    texts = [make_text(i) for i in range(40)]
    rows = Path("corpus.jsonl").read_bytes()
    half = rows.index(b"\n", len(rows) // 2) + 1
    plain = f"\n{EOT}\n".join(t.strip() for t in texts).encode()
    # two gzip members, two zstd frames: what `cat a.gz b.gz` and parallel compressors make
    Path("b.jsonl.gz").write_bytes(gzip.compress(rows[:half]) + gzip.compress(rows[half:]))
    Path("c.jsonl.zst").write_bytes(b"".join(zstandard.compress(part) for part in (rows[:half], rows[half:])))
    Path("d.txt").write_bytes(b"\xef\xbb\xbf" + plain.replace(b"\n", b"\r\n"))
    Path("e.txt.zst").write_bytes(zstandard.compress(plain))
    pa.parquet.write_table(pa.table({"number": list(range(40)), "body": texts}), "f.parquet", row_group_size=7)
    Path("g.parquet.gz").write_bytes(gzip.compress(Path("f.parquet").read_bytes()))
    for name in ("b.jsonl.gz", "c.jsonl.zst", "d.txt", "e.txt.zst"):
        assert [t.strip() for t in prepare.read_documents([Path(name)], "text")] == [t.strip() for t in texts], name
    for name in ("f.parquet", "g.parquet.gz"):
        assert list(prepare.read_documents([Path(name)], "body")) == texts, name
    assert prepare.resolve_sources(["*.jsonl*", "hf:a/b:c"]) == [
        Path(n) for n in ("b.jsonl.gz", "c.jsonl.zst", "corpus.jsonl")
    ] + ["hf:a/b:c"]
    Path("set").mkdir()
    os.rename("corpus.jsonl", "set/train.jsonl")
    assert list(prepare.read_documents(["hf:./set"], "text")) == texts  # a local directory stands in for the hub


def test_long_text_is_cut_at_blank_lines(tmp_path):
    path = tmp_path / "book.txt"
    paragraphs = ["".join(make_text(i) for i in range(5)) + "\n"] * 100
    path.write_text("".join(paragraphs) + "x" * 3_000_000)
    pieces = list(prepare.read_txt(path, ""))
    assert "".join(pieces) == path.read_text()
    assert all(p.endswith("\n\n") and 1 << 14 <= len(p) < 20_000 for p in pieces[:-3])
    assert max(map(len, pieces)) < 2 << 20 and len(pieces) > 10  # one endless line does not fill the memory


def test_odd_rows(corpus):
    """Blank documents are left out, half surrogates replaced, special tokens' names are plain text."""
    byte_ranks("bytes.tiktoken")
    rows = [{"text": ""}, {"text": " \n"}, {"text": f"say {EOT} twice"}, {"text": "a\ud800b"}, {"text": "c", "n": "x"}]
    Path("odd.jsonl").write_text("\n\n".join(map(json.dumps, rows)))
    run("odd.jsonl", "--out", "d", "--tokenizer", "bytes.tiktoken", "--val-fraction", "0.1")
    assert sorted(documents("d", "train") + documents("d", "val")) == ["a?b", "c", f"say {EOT} twice"]


def test_max_tokens(corpus):
    byte_ranks("bytes.tiktoken")
    flags = ["--tokenizer", "bytes.tiktoken", "--val-fraction", "0.3"]
    run("corpus.jsonl", "--out", "all", *flags)
    meta = run("corpus.jsonl", "--out", "some", "--max-tokens", "2e3", *flags)
    assert 2000 <= meta["train_tokens"] < 2500
    assert documents("some", "train") == documents("all", "train")[: meta["train_documents"]]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of modules that are imported for their docstrings
def test_python_source():
    texts = list(prepare.read_python())
    joined = "\n".join(texts)
    assert sum(map(len, texts)) > 5e6
    assert "class ArgumentParser" in joined and "Return the arc cosine" in joined and "augmented assignment" in joined
    assert "import test.support" not in "".join(texts[:50]) and "class TestCase_" not in joined
    assert len(set(texts)) > 0.98 * len(texts)


# ---------------------------------------------------------------------------------------------------------------------
# Tokenizers


def test_trained_tokenizer_is_the_same_in_tiktoken(corpus, capsys):
    from tokenizers import Tokenizer, models, pre_tokenizers

    meta = run("corpus.jsonl", "--out", "d", "--tokenizer", "train:300", "--val-fraction", "0.3")
    assert (meta["vocab_size"], meta["eot"], meta["tokenizer"]) == (300, 299, "bpe300.tiktoken")
    encoding = load_tokenizer("d")
    assert load_tokenizer("d/bpe300.tiktoken").encode("recursion") == encoding.encode("recursion")
    assert sorted(documents("d", "train") + documents("d", "val")) == sorted(make_text(i) for i in range(40))
    # an independent reading of the rank file: the merges, found by splitting each token with the ranks below its own
    lines = [line.split() for line in Path("d/bpe300.tiktoken").read_bytes().splitlines()]
    ranks = {base64.b64decode(token): int(rank) for token, rank in lines}
    assert sorted(ranks.values()) == list(range(299))
    # ByteLevel's letters: printable bytes stand for themselves, the others for U+0100 and on
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    char = dict(zip(printable + [b for b in range(256) if b not in printable], letters, strict=True))
    merges = []
    for token, rank in sorted(ranks.items(), key=lambda item: item[1])[256:]:
        parts = [bytes([b]) for b in token]
        while len(parts) > 2:
            best = min(range(len(parts) - 1), key=lambda i: ranks.get(parts[i] + parts[i + 1], 10**9))
            assert ranks[parts[best] + parts[best + 1]] < rank
            parts[best : best + 2] = [parts[best] + parts[best + 1]]
        merges.append(tuple("".join(char[b] for b in part) for part in parts))
    vocab = {"".join(char[b] for b in token): rank for token, rank in ranks.items()}
    bpe = Tokenizer(models.BPE(vocab, merges))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    for text in [make_text(i) for i in range(100, 130)] + ["x  \n\n\t y'll 1234 café 中文 🙂🙂", " " * 50, "aaaaaaaaa"]:
        assert encoding.encode_ordinary(text) == bpe.encode(text).ids
        assert encoding.decode(encoding.encode_ordinary(text)) == text
    assert "note: the corpus has no more pairs to merge" not in capsys.readouterr().out


SPECIAL = ["<|endoftext|>", "<|im_start|>"]
LLAMA3 = r"(?i:'s|'t)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def hugging_face(directory: str, kind: str, whole: bool = True):
    """A byte-level BPE as transformers save it: GPT-2's, SmolLM's (digits alone, special tokens first), Llama 3's."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

    steps = [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=kind != "llama3")]
    if kind == "smollm":
        steps = [pre_tokenizers.Digits(individual_digits=True), *steps]
    if kind == "llama3":
        steps = [pre_tokenizers.Split(Regex(LLAMA3), "isolated"), *steps]
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(steps) if len(steps) > 1 else steps[0]
    first, alphabet = SPECIAL if kind == "smollm" else [], pre_tokenizers.ByteLevel.alphabet() if whole else []
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=first, initial_alphabet=alphabet, show_progress=False)
    bpe.train_from_iterator([make_text(i) + "1234567890 x'll\n" for i in range(40)], trainer)
    bpe.add_special_tokens(SPECIAL)
    Path(directory).mkdir()
    bpe.save(f"{directory}/tokenizer.json")
    return bpe


@pytest.mark.parametrize("kind, whole", [("gpt2", True), ("smollm", True), ("smollm", False), ("llama3", True)])
def test_tokenizer_of_a_hugging_face_directory(corpus, kind, whole):
    bpe = hugging_face("hf", kind, whole)
    meta = run("corpus.jsonl", "--out", "d", "--tokenizer", "hf", "--val-fraction", "0.3")
    assert meta["tokenizer"] == "hf.tiktoken" and meta["eot"] == bpe.token_to_id(EOT)
    assert meta["vocab_size"] == bpe.get_vocab_size() and (kind != "smollm" or meta["eot"] == 0)
    assert sorted(documents("d", "train") + documents("d", "val")) == sorted(make_text(i) for i in range(40))
    rng, encoding = np.random.default_rng(0), load_tokenizer("d")
    letters = list("the 's12½ \n\té\x07京🙂(.")  # without whole=True it cannot spell all, and leaves them out
    for text in ["".join(rng.choice(letters, 30)) for _ in range(500)]:
        assert encoding.encode_ordinary(text) == bpe.encode(text).ids
    # into a directory for transformers and back
    Path("e").mkdir()
    prepare.save_tokenizer(encoding, Path("e"))
    assert prepare.same_tokenizer(load_tokenizer("e"), encoding) and load_tokenizer("e").eot_token == meta["eot"]
    prepare.check_tokenizer("hf", encoding)


def test_rank_file_of_a_vocabulary_without_all_bytes(tmp_path):
    ranks = {bytes([b]): i for i, b in enumerate(range(32, 127))}
    lossy = prepare.make_encoding("ascii", ranks, prepare.GPT2_PATTERN, {EOT: 95})
    prepare.write_ranks(tmp_path / "ascii.tiktoken", lossy)
    again = load_tokenizer(tmp_path / "ascii.tiktoken")
    assert prepare.same_tokenizer(again, lossy) and again.decode(again.encode_ordinary("na\u00efve\n")) == "nave"


def test_tokenizers_that_tiktoken_cannot_express(corpus, capsys):
    hugging_face("hf", "gpt2")
    good = json.loads(Path("hf/tokenizer.json").read_text())
    model, added = good["model"], good["added_tokens"]
    swapped = model["merges"][1::-1] + model["merges"][2:]
    for change, message in [
        (dict(normalizer=dict(type="NFC")), "nothing like its normalizer"),
        (dict(pre_tokenizer=dict(type="Metaspace")), "nothing like its pre_tokenizer (Metaspace)"),
        (dict(pre_tokenizer=None), "not a byte-level BPE"),
        (dict(pre_tokenizer=dict(type="ByteLevel", add_prefix_space=True)), "add_prefix_space"),
        (dict(model=dict(type="Unigram", vocab=[["a", 1.0]])), "not a byte-level BPE"),
        (dict(model=model | dict(merges=swapped)), "merges in another order than ids"),
        (dict(model=model | dict(merges=model["merges"][:-9])), "tiktoken gives other ids for"),
        (dict(added_tokens=added[1:]), "has no <|endoftext|>"),
    ]:
        Path("hf/tokenizer.json").write_text(json.dumps(good | change))
        assert message in error(capsys, "corpus.jsonl", "--out", "d", "--tokenizer", "hf")
    Path("hf/tokenizer.json").write_text("{")
    assert "not a byte-level BPE" in error(capsys, "corpus.jsonl", "--out", "d", "--tokenizer", "hf")


def test_named_tokenizers_offline(corpus, monkeypatch, capsys):
    """gpt2 comes from TIKTOKEN_CACHE_DIR, or the error says how to get it, at once."""
    import requests
    import tiktoken

    def no_network(*args, **kwargs):
        assert kwargs["timeout"][0] <= 5
        raise requests.ConnectionError

    monkeypatch.setattr(requests, "get", no_network)
    monkeypatch.setattr(tiktoken.registry, "ENCODINGS", {})
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(corpus / "cache"))
    for name in ("gpt2", "cl100k_base"):
        message = error(capsys, "corpus.jsonl", "--out", "d", "--tokenizer", name)
        assert f"tokenizer {name} cannot be downloaded" in message and "mlx-whisper" in message
        assert "TIKTOKEN_CACHE_DIR" in message and "train:8192" in message
    Path("cache").mkdir(exist_ok=True)
    byte_ranks("cache/gpt2.tiktoken")
    meta = run("corpus.jsonl", "--out", "d", "--tokenizer", "gpt2", "--val-fraction", "0.3")
    assert meta["tokenizer"] == "gpt2" and load_tokenizer("d").n_vocab == 257  # by name: no copy in the directory
    assert not list(Path("d").glob("*.tiktoken"))
    # OpenAI's own rank files are known by their hash, whatever their name, and bring their pattern and special tokens
    digest = hashlib.sha256(byte_ranks("renamed.tiktoken", extra=9).read_bytes()).hexdigest()
    monkeypatch.setitem(prepare.OPENAI_RANKS, digest, "cl100k_base")
    encoding = load_tokenizer("renamed.tiktoken")
    assert encoding.name == "cl100k_base" and encoding.eot_token == 100257 and encoding.encode_ordinary("a b") != []
    assert sorted(os.listdir("cache")) == ["gpt2.tiktoken"]


# ---------------------------------------------------------------------------------------------------------------------
# Mistakes


def test_every_mistake_is_one_line(corpus, capsys, monkeypatch):
    byte_ranks("bytes.tiktoken")
    Path("empty.txt").write_text("")
    Path("blank.jsonl").write_text('{"text": " "}\n')
    Path("one.jsonl").write_text('{"text": "only"}\n')
    Path("bytes.txt").write_bytes(b"good\nb\xffd\n")
    Path("end.txt").write_bytes(b"good\n" + "é".encode()[:1])
    Path("bytes.jsonl").write_bytes(b'{"text": "good"}\n{"text": "b\xffd"}\n')
    Path("broken.jsonl").write_text('{"text": "good"}\n{"text": \n')
    Path("field.jsonl").write_text('{"text": "good"}\n{"txt": "b"}\n')
    Path("number.jsonl").write_text('{"text": 5}\n')
    Path("list.jsonl").write_text('["text"]\n')
    Path("cut.txt.gz").write_bytes(gzip.compress(os.urandom(9999).hex().encode())[:-30])
    Path("not.txt.zst").write_bytes(b"not compressed")
    Path("not.parquet").write_bytes(b"not a table" * 99)
    Path("table.csv").write_text("text\n")
    Path("lines.tiktoken").write_text("YQ== 0\n?? x\n")
    Path("few.tiktoken").write_text("YQ== 0\n")
    Path("kept").mkdir()
    Path("kept/notes").write_text("mine")
    bpe = ("--tokenizer", "bytes.tiktoken")
    cases = {
        "nowhere.txt: no such file": ["nowhere.txt"],
        "nothing*.txt: no such file": ["nothing*.txt"],
        "is a directory": [str(corpus)],
        "table.csv: unknown kind of file": ["table.csv"],
        "hf: needs the name": ["hf:"],
        "empty.txt: no text found": ["empty.txt", *bpe],
        "blank.jsonl: no text found": ["blank.jsonl", *bpe],
        "one.jsonl: only one document": ["one.jsonl", *bpe],
        "bytes.txt: line 2 is not UTF-8": ["bytes.txt", *bpe],
        "end.txt: line 2 is not UTF-8 text (its last character is cut)": ["end.txt", *bpe],
        "bytes.jsonl: line 2 is not UTF-8": ["bytes.jsonl"],  # through the tokenizer's training
        "broken.jsonl: line 2 is not JSON": ["broken.jsonl", *bpe],
        "field.jsonl: line 2 has no text": ["field.jsonl", *bpe],
        "number.jsonl: line 1 has no text": ["number.jsonl", *bpe],
        "list.jsonl: line 1 has no text": ["list.jsonl", *bpe],
        '{"body": "..."} expected; --field': ["corpus.jsonl", "--field", "body", *bpe],
        "cut.txt.gz: cannot be read (": ["cut.txt.gz", *bpe],
        "not.txt.zst: cannot be read (": ["not.txt.zst", *bpe],
        "not.parquet: cannot be read (": ["not.parquet", *bpe],
        "unknown tokenizer 'gpt5': use train:N": ["corpus.jsonl", "--tokenizer", "gpt5"],
        "train:N needs N from 257": ["corpus.jsonl", "--tokenizer", "train:100"],
        "--tokenizer train:many": ["corpus.jsonl", "--tokenizer", "train:many"],
        "nowhere.tiktoken: No such file": ["corpus.jsonl", "--tokenizer", "nowhere.tiktoken"],
        "lines.tiktoken: line 2 is not": ["corpus.jsonl", "--tokenizer", "lines.tiktoken"],
        "few.tiktoken: needs all 256 single bytes": ["corpus.jsonl", "--tokenizer", "few.tiktoken"],
        "vocabulary of train:70000 has 70000": ["corpus.jsonl", "--tokenizer", "train:70000", "--dtype", "uint16"],
        "--val-fraction: 0 is not between 0 and 1": ["corpus.jsonl", "--val-fraction", "0"],
        "--val-fraction: 1.5 is not": ["corpus.jsonl", "--val-fraction", "1.5"],
        "--val-fraction: nan is not": ["corpus.jsonl", "--val-fraction", "nan"],
        "--val-fraction: x is not between": ["corpus.jsonl", "--val-fraction", "x"],
        "none of the 40 documents is in val: --val-fraction 0.": ["corpus.jsonl", "--val-fraction", "1e-9", *bpe],
        "all 40 documents are in val: --val-fraction 0.": ["corpus.jsonl", "--val-fraction", "0.99999", *bpe],
        "--threads: 0 is not a number": ["corpus.jsonl", "--threads", "0"],
        "--max-tokens: inf must be a whole number": ["corpus.jsonl", "--max-tokens", "inf"],
        "int32": ["corpus.jsonl", "--shard-tokens", "1e10", *bpe],
        "unrecognized arguments: --vocab": ["corpus.jsonl", "--vocab", "5"],
        "--out empty.txt: is a file": ["corpus.jsonl", "--out", "empty.txt", *bpe],
        "--out kept: exists and was not made": ["corpus.jsonl", "--out", "kept", "--overwrite", *bpe],
        "empty.txt": ["corpus.jsonl", "--out", "empty.txt/d", *bpe],
        "--out .: holds the current directory": ["corpus.jsonl", "--out", ".", *bpe],
    }
    for message, args in cases.items():
        assert message in error(capsys, *args, *([] if "--out" in args else ["--out", "d"])), args
        assert not Path("d").exists() and Path("kept/notes").read_text() == "mine"
    # the remedy of the message works
    hint = re.search(
        r"--val-fraction (\S+)", error(capsys, "corpus.jsonl", "--out", "d", "--val-fraction", "1e-9", *bpe)
    )
    assert run("corpus.jsonl", "--out", "d", "--val-fraction", hint[1], *bpe)["val_documents"] >= 1


def test_hub_errors_name_the_remedy(corpus, capsys, monkeypatch):
    """One request, no retries; whatever the hub's client raises is one line."""
    import huggingface_hub
    from huggingface_hub import errors

    asked = []
    for failure, message in [
        (OSError("[Errno -2] Name or service not known"), "the hub cannot be reached (OSError: [Errno -2]"),
        (errors.OfflineModeIsEnabled("offline"), "HF_HUB_OFFLINE unset"),
        # made without the response of whichever HTTP library the hub's client uses
        (errors.RepositoryNotFoundError.__new__(errors.RepositoryNotFoundError), "the hub has no such dataset"),
        (errors.GatedRepoError.__new__(errors.GatedRepoError), "is gated: accept its terms"),
    ]:

        def dataset_info(self, name, timeout, failure=failure):
            asked.append((name, timeout <= 10))
            raise failure

        monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", dataset_info)
        for source, name in [("fineweb-edu", "HuggingFaceTB/smollm-corpus"), ("hf:some/set:part", "some/set")]:
            assert message in error(capsys, source, "--out", "d", "--tokenizer", "train:300")
            assert asked.pop() == (name, True) and not asked


def test_existing_output(corpus, capsys):
    byte_ranks("bytes.tiktoken")
    flags = ["--tokenizer", "bytes.tiktoken", "--val-fraction", "0.3"]
    Path("d").mkdir()  # empty: taken
    run("corpus.jsonl", "--out", "d", *flags)
    before = Path("d/train_000000.bin").read_bytes()
    assert "--out d: is prepared already" in error(capsys, "corpus.jsonl", "--out", "d", *flags)
    Path("field.jsonl").write_text('{"txt": "b"}\n')
    assert "has no text" in error(capsys, "field.jsonl", "--out", "d", "--overwrite", *flags)
    assert Path("d/train_000000.bin").read_bytes() == before  # a failure replaces nothing
    assert run("corpus.jsonl", "--out", "d", "--overwrite", *flags[:2], "--val-fraction", "0.5")["val_fraction"] == 0.5
    assert sorted(p.name for p in Path().iterdir() if p.is_dir()) == ["d"]
    Path("d.old").mkdir()  # of the user
    Path("d.old/notes").write_text("mine")
    run("corpus.jsonl", "--out", "d", "--overwrite", *flags)
    assert sorted(p.name for p in Path().iterdir() if p.is_dir()) == ["d", "d.old"] and Path("d.old/notes").exists()


@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGINT])
def test_interruption_leaves_nothing(corpus, capsys, signum):
    """Killed while it writes: the output does not exist, and the next run replaces what lies beside it."""
    byte_ranks("bytes.tiktoken")
    os.mkfifo("slow.jsonl")
    flags = ["--out", "d", "--tokenizer", "bytes.tiktoken", "--val-fraction", "0.3", "--threads", "1"]
    command = [sys.executable, str(ROOT / "prepare.py"), "slow.jsonl", *flags]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    with open("slow.jsonl", "w") as pipe:
        pipe.write(Path("corpus.jsonl").read_text() * 600)  # 8 MB: more than is read ahead
        pipe.flush()
        shard, patience = Path("d.partial/train_000000.bin"), time.time() + 60
        while not (shard.exists() and shard.stat().st_size > 100_000):
            assert process.poll() is None and time.time() < patience
            time.sleep(0.02)
        with pytest.raises(SystemExit):
            run("corpus.jsonl", *flags)
        assert "another prepare.py is writing it" in capsys.readouterr().err
        process.send_signal(signum)
        err = process.communicate(timeout=60)[1]
    assert not Path("d").exists()
    if signum == signal.SIGINT:
        assert process.returncode == 130 and err == "interrupted: nothing was written\n"
        assert not Path("d.partial").exists()
    else:
        assert process.returncode == -signal.SIGKILL and Path("d.partial").exists()
        with pytest.raises(SystemExit):  # even if someone points at it
            Shards("d.partial", "train")
    run("corpus.jsonl", *flags)
    assert not Path("d.partial").exists()
    assert sorted(documents("d", "train") + documents("d", "val")) == sorted(make_text(i) for i in range(40))


def test_command_line_as_documented(corpus):
    """A fresh process: exit codes, and no traceback."""
    done = subprocess.run([sys.executable, str(ROOT / "prepare.py"), "--help"], capture_output=True, text=True)
    assert done.returncode == 0 and "python prepare.py python --out data/python" in done.stdout
    done = subprocess.run([sys.executable, str(ROOT / "prepare.py"), "x.txt"], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("error: the following arguments are required: --out")


# ---------------------------------------------------------------------------------------------------------------------
# People's files, names and machines

BYTES = ("--tokenizer", "bytes.tiktoken", "--val-fraction", "0.3")


def test_training_does_not_stop_at_a_long_word(corpus):
    """The trainer takes hours over a million characters without a border between words, whatever they are."""
    runs = ["x" * 1_000_000, " " * 1_000_000, "7" * 1_000_000, "_=" * 500_000, "\n\t" * 500_000]
    texts = [f"a {run} b" for run in runs] + [make_text(i) for i in range(40)]
    Path("long.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    began = time.perf_counter()
    run("long.jsonl", "--out", "d", "--tokenizer", "train:300", "--val-fraction", "0.3")
    assert time.perf_counter() - began < 60
    assert sorted(documents("d", "train") + documents("d", "val")) == sorted(texts)
    assert prepare.drop_long_words(chinese := "京都。" * 9_000) == chinese  # has borders, but no spaces


def write_parquet(path: str | Path, texts: list) -> None:
    import pyarrow as pa
    import pyarrow.parquet

    with open(path, "wb") as file:  # pyarrow takes some names for addresses
        pa.parquet.write_table(pa.table({"text": pa.array(texts, pa.string())}), file)


def write_jsonl(path: str | Path, rows: list) -> None:
    Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows))


def read_all(*files: str) -> list[str]:
    return list(prepare.read_documents(prepare.resolve_sources(list(files)), "text"))


def start(*args: str, **environment: str) -> subprocess.CompletedProcess:
    """prepare.py in a process of its own."""
    command = [sys.executable, ROOT / "prepare.py", *args]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | environment)


def test_a_path_that_exists_is_no_pattern(corpus):
    """Of a pair of names, the first would match the second, if it were a pattern."""
    for i, (name, trap) in enumerate([("train[1]", "train1"), ("p?", "pq"), ("a*", "abc"), ("part[0]", None)]):
        for directory in ("", "[2024] data/"):
            Path(directory or ".").mkdir(exist_ok=True)
            for text, stem in [(make_text(i), name), ("the wrong file", trap)]:
                if stem:
                    write_parquet(f"{directory}{stem}.parquet", [text])
                    write_jsonl(f"{directory}{stem}.jsonl", [{"text": text}])
                    Path(f"{directory}{stem}.txt.gz").write_bytes(gzip.compress(text.encode()))
            for suffix in ("parquet", "jsonl", "txt.gz"):
                assert read_all(f"{directory}{name}.{suffix}") == [make_text(i)]
    byte_ranks("bytes.tiktoken")
    assert run("corpus.jsonl", "--out", "out[1]", *BYTES)["train_documents"] > 0
    assert load_tokenizer("out[1]").n_vocab == 257 and len(documents("out[1]", "val")) > 0


def test_a_directory_in_brackets_is_refused_by_name(corpus, capsys):
    byte_ranks("bytes.tiktoken")
    for name in ("set[1]", "sets*"):
        Path(name).mkdir()
        write_parquet(f"{name}/train.parquet", [make_text(0)])
        assert f"hf:./{name}: `datasets` takes such" in error(capsys, f"hf:./{name}", "--out", "d", *BYTES)


def test_the_last_word_of_a_shards_name_is_its_split(tmp_path, capsys):
    names = dict(train=["pretrain_train_000001.bin", "pretrain_train_000002.bin"], val=["pretrain_val_000000.bin"])
    for i, name in enumerate([*names["train"], *names["val"], "._pretrain_train_000001.bin", "retrain_000001.bin"]):
        write_llmc(tmp_path / name, [i], 20240520, 1, "<u2")
    for split, expected in names.items():
        assert [path.name for path in Shards(tmp_path, split).files] == expected
    for name in ("TinyStories_train.bin", "train.bin", "train-00001-of-00002.bin", "val_train_7.bin", "a.train.bin"):
        directory = tmp_path / name.removesuffix(".bin")
        directory.mkdir()
        write_llmc(directory / name, [5], 20240520, 1, "<u2")
        write_llmc(directory / name.replace("train", "val"), [6, 6], 20240520, 1, "<u2")
        assert Shards(directory, "train").tokens(0, 1).tolist() == [5]
        assert Shards(directory, "val").tokens(0, 2).tolist() == [6, 6]
    for name in ("fineweb_train_000001.bin", "train_000000.bin"):
        write_llmc(tmp_path / "train" / name, [1], 20240520, 1, "<u2")
    with pytest.raises(SystemExit):
        Shards(tmp_path / "train", "train")
    assert "holds shards of several data sets (train and fineweb_train)" in capsys.readouterr().err


def test_the_tokenizer_of_a_directory_is_the_one_it_names(corpus, capsys):
    """Files of earlier tokenizers lie beside it, some before it in the alphabet."""
    for i, name in enumerate(["a", "b", "c"]):
        byte_ranks(f"{name}.tiktoken", extra=i)
    run("corpus.jsonl", "--out", "data", "--tokenizer", "b.tiktoken", "--val-fraction", "0.3")
    run_ = Path("run")
    run_.mkdir()

    def name_in_config(name: str) -> None:
        (run_ / "config.json").write_text(json.dumps(dict(data=dict(tokenizer=name), train=dict(data="data"))))

    name_in_config("b.tiktoken")
    for directory in ("data", "run"):
        for name in "ac":
            (Path(directory) / f"{name}.tiktoken").write_bytes(Path(f"{name}.tiktoken").read_bytes())
        # the run's own rank file is in the directory of its data
        assert load_tokenizer(directory).n_vocab == 258
        assert prepare.tokenizer_file(directory) == Path("data/b.tiktoken")
        meta = run("corpus.jsonl", "--out", f"{directory}2", "--tokenizer", directory, "--val-fraction", "0.3")
        assert (meta["tokenizer"], meta["vocab_size"]) == ("b.tiktoken", 258)
    prepare.check_tokenizer(run_, load_tokenizer("data2"))
    name_in_config("gpt2")
    assert prepare.find_tokenizer(run_) == "gpt2" and prepare.tokenizer_file(run_) is None
    name_in_config("gone.tiktoken")
    assert "its gone.tiktoken is neither there nor in data" in error(capsys, "--out", "d", "--tokenizer", "run")
    os.unlink("run/config.json")
    assert "run: holds a.tiktoken and c.tiktoken" in error(capsys, "--out", "d", "--tokenizer", "run")
    (run_ / "config.json").write_text("{")
    assert "run/config.json: cannot be read" in error(capsys, "--out", "d", "--tokenizer", "run")
    (run_ / "config.json").write_text('{"model_type": "llama", "data": 5}')
    os.unlink("run/a.tiktoken")
    assert load_tokenizer("run").n_vocab == 259  # the only one


def test_rows_without_text_do_not_end_a_preparation(corpus, capsys):
    """Empty files, empty row groups and null rows; other rows only when asked, and counted."""
    import pyarrow as pa
    import pyarrow.parquet

    byte_ranks("bytes.tiktoken")
    texts = [make_text(i) for i in range(40)]
    Path("set").mkdir()
    write_parquet("empty.parquet", [])
    write_parquet("null.parquet", [None, *texts, None])
    schema = pa.schema([("text", pa.string())])
    with pa.parquet.ParquetWriter("set/groups.parquet", schema) as writer:
        for part in ([], texts[:5], [], texts[5:]):
            writer.write_table(pa.table({"text": part}, schema=schema))
    write_jsonl("null.jsonl", [{"text": text} for text in [*texts[:20], None, *texts[20:]]])
    for sources, nulls in [
        (["empty.parquet", "null.parquet"], 2),
        (["set/groups.parquet"], 0),
        (["hf:./set"], 0),
        (["null.jsonl"], 1),
    ]:
        capsys.readouterr()
        meta = run(*sources, "--out", "d", "--overwrite", *BYTES)
        assert sorted(documents("d", "train") + documents("d", "val")) == sorted(texts), sources
        assert meta["skipped_rows"] == nulls
        assert (f"note: skipped {nulls} null rows" in capsys.readouterr().err) == bool(nulls)
    pa.parquet.write_table(pa.table({"text": pa.array([b"bytes"] * 2)}), "bytes.parquet")
    rows = [json.dumps(row).encode() for row in ({"text": 5}, {"txt": "b"}, ["text"], {"text": texts[0]})]
    Path("bad.jsonl").write_bytes(
        b"\n".join([*rows, b'{"text"', b'{"text": "\xff"}', json.dumps({"text": "x"}).encode()])
    )
    for name, message in [("bad.jsonl", "line 1 has no text"), ("bytes.parquet", "row 1 has no text in 'text'")]:
        text = error(capsys, name, "--out", "e", *BYTES)
        assert f"{name}: {message}" in text and "with --skip-bad" in text
    meta = run("bad.jsonl", "bytes.parquet", "null.jsonl", "--skip-bad", "--out", "e", *BYTES)
    assert meta["skipped_rows"] == 8 and "skipped 7 bad and 1 null rows" in capsys.readouterr().err
    assert sorted(documents("e", "train") + documents("e", "val")) == sorted([*texts, texts[0], "x"])


LONG = {
    "spaces": "x" + " " * 1_200_000 + "y",
    "lines": "a\n" + "\n" * 1_200_000 + "1",
    "ideographic spaces": "京" + "\u3000" * 1_100_000 + "京\n",
    "at the end": "x" + "\t " * 600_000,
}


@pytest.mark.parametrize("what", LONG)
def test_a_million_spaces_are_tokenized(corpus, what):
    """tiktoken's regex crashes on them, with an exception that `except Exception` does not catch."""
    run("corpus.jsonl", "--out", "d", "--tokenizer", "train:300", "--val-fraction", "0.3")
    texts = [LONG[what], *map(make_text, range(20))]
    write_jsonl("long.jsonl", [{"text": text} for text in texts])
    run("long.jsonl", "--out", "e", "--tokenizer", "d", "--val-fraction", "0.5")
    expected = sorted(texts)
    assert sorted(documents("e", "train") + documents("e", "val")) == expected


@pytest.mark.parametrize("pattern", [prepare.GPT2_PATTERN, prepare.DIGITS_PATTERN, LLAMA3])
@pytest.mark.parametrize("whole", [True, False])
def test_encode_gives_the_ids_of_tiktoken(pattern, whole):
    """Around the regex as through it: runs of all lengths below the crash, and random text."""
    import tiktoken

    letters = [bytes([b]) for b in range(256) if whole or b != 9]
    words = [b"  ", b"    ", b"\n\n", b" the", b"the", b"'s", b"12", b" " * 8]
    ranks = {token: i for i, token in enumerate(letters + words)}
    encoding = prepare.make_encoding("e", ranks, pattern, {EOT: len(ranks)})
    assert isinstance(encoding, prepare.Lossy) != whole
    rng = np.random.default_rng(0)
    pieces = [*"the 's12½ \n\té京🙂(.", "  ", "\r\n", " the", "x'll", " ", "\u00a0"]
    texts = ["".join(rng.choice(pieces, 40)) for _ in range(300)]
    texts += [f"a{space * n}{end}" for space in (" ", "\n", "\t") for n in (7, 150_000) for end in ("", "b", "\n", "7")]
    for text in texts:
        # a vocabulary without the tab leaves it out of the pieces
        expected = tiktoken.Encoding.encode_ordinary(encoding, text) if whole or "\t" not in text else None
        ids = prepare.encode(encoding, text)
        assert ids == prepare.encode_pieces(encoding, text).tolist() == (expected or ids)
        assert encoding.decode(ids) == (text if whole else text.replace("\t", ""))
    assert prepare.encode(encoding, f"a\ud83d{EOT}") == prepare.encode(encoding, f"a?{EOT}")
    assert prepare.encode(encoding, "") == [] and len(ranks) not in prepare.encode(encoding, EOT)


def refuse_rename(monkeypatch, number: int) -> None:
    """No directory in the current one can be renamed away or over, as for a mount or in a container's image."""
    rename = os.rename

    def fails(source, target, **options):
        if os.path.isdir(source) and Path(target).name == "d" or Path(source).name == "d":
            raise OSError(number, os.strerror(number), str(source))
        rename(source, target, **options)

    monkeypatch.setattr(os, "rename", fails)


@pytest.mark.parametrize("kind", ["mount", "busy", "image"])
@pytest.mark.parametrize("before", ["nothing", "lost+found", "data"])
def test_out_is_a_mount_point(corpus, monkeypatch, capsys, kind, before):
    """A directory that cannot be renamed gets the same files, and a failure leaves it as it was."""
    byte_ranks("bytes.tiktoken")
    run("corpus.jsonl", "--out", "expected", *BYTES)
    out = Path("d")
    out.mkdir()
    if before == "lost+found":
        (out / before).mkdir()
        if kind != "mount":
            (out / before).rmdir()
    if before == "data":
        run(
            "corpus.jsonl",
            "--out",
            "d",
            "--tokenizer",
            "bytes.tiktoken",
            "--val-fraction",
            "0.6",
            "--shard-tokens",
            "99",
        )
    mode = out.stat().st_ino
    refuse_rename(monkeypatch, errno.EXDEV if kind == "image" else errno.EBUSY)
    ismount = os.path.ismount
    monkeypatch.setattr(os.path, "ismount", lambda path: (kind == "mount" and Path(path).name == "d") or ismount(path))
    old = {path.name: path.stat().st_size for path in out.iterdir()}
    write_jsonl("bad.jsonl", [{"text": make_text(0)}, {}])
    message = error(capsys, "bad.jsonl", "--out", "d", "--overwrite", *BYTES)
    assert "line 2 has no text" in message and {path.name: path.stat().st_size for path in out.iterdir()} == old
    run("corpus.jsonl", "--out", "d", "--overwrite", *BYTES)
    for path in Path("expected").iterdir():
        assert (out / path.name).read_bytes() == path.read_bytes()
    kept = {"lost+found"} & set(old)
    assert {path.name for path in out.iterdir()} == {path.name for path in Path("expected").iterdir()} | kept
    assert out.stat().st_ino == mode and not list(Path().glob("*.old.*"))
    # killed while the files are moved: nothing that is read as data, and the next run mends it
    (out / "meta.json").unlink()
    (out / prepare.UNFINISHED).mkdir()
    (out / prepare.UNFINISHED / prepare.LOCK).touch()
    for read in (load_meta, lambda d: Shards(d, "train")):
        with pytest.raises(SystemExit):
            read("d")
        assert "d: prepare.py was stopped while it wrote this" in capsys.readouterr().err
    run("corpus.jsonl", "--out", "d", *BYTES)
    assert documents("d", "train") == documents("expected", "train")


def test_a_parent_that_is_not_ours(corpus, monkeypatch):
    byte_ranks("bytes.tiktoken")
    Path("theirs/d").mkdir(parents=True)
    access = os.access
    make = os.mkdir

    def mkdir(path, *args, **options):
        if Path(path).parent.name == "theirs":
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        make(path, *args, **options)

    monkeypatch.setattr(os, "access", lambda path, mode: Path(path).name != "theirs" and access(path, mode))
    monkeypatch.setattr(os, "mkdir", mkdir)
    run("corpus.jsonl", "--out", "theirs/d", *BYTES)
    assert len(documents("theirs/d", "val")) > 0 and os.listdir("theirs") == ["d"]


def test_directories_and_files_of_the_user_stay(corpus, capsys):
    """Beside the output or in it; what an interrupted run left is none of them."""
    byte_ranks("bytes.tiktoken")
    flags = ["corpus.jsonl", "--out", "d", *BYTES]
    for name in ("notes.txt", "train_000000.bin"):
        Path("d.partial").mkdir()
        Path("d.partial", name).write_text("mine")
        with pytest.raises(SystemExit):
            run(*flags)
        assert "d.partial is in the way and was not made by prepare.py" in capsys.readouterr().err
        assert Path("d.partial", name).read_text() == "mine" and not Path("d").exists()
        Path("d.partial", name).unlink()
        Path("d.partial").rmdir()
    Path("elsewhere").mkdir()
    Path("d.partial").symlink_to("elsewhere")
    with pytest.raises(SystemExit):
        run(*flags)
    assert "d.partial is in the way" in capsys.readouterr().err and Path("elsewhere").is_dir()
    Path("d.partial").unlink()
    run(*flags)
    Path("d/notes.txt").write_text("mine")
    assert "--out d: holds notes.txt, which prepare.py did not make" in error(capsys, *flags, "--overwrite")
    assert Path("d/notes.txt").read_text() == "mine" and documents("d", "val")


def test_one_reader_of_peoples_text(corpus, monkeypatch, capsys):
    mark = codecs.BOM_UTF8
    for data, text in [(b"the\r\nna\xc3\xafve\n", "the\r\nnaïve\n"), (mark + b"the", "the"), (mark, ""), (b"", "")]:
        Path("text").write_bytes(data)
        assert prepare.read_text("text") == prepare.read_text(Path("text")) == text
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))
        assert prepare.read_text("-") == text

    def message(file: str) -> str:
        with pytest.raises(SystemExit) as exit_:
            prepare.read_text(file)
        err = capsys.readouterr().err
        assert exit_.value.code == 2 and err.count("\n") == 1 and err.startswith(f"error: {file}: ")
        return err

    Path("latin").write_bytes("one\nna\u00efve".encode("latin-1"))
    Path("wide").write_bytes("the".encode("utf-16"))
    assert "No such file" in message("nowhere") and "directory" in message(".")
    assert "line 2 is not UTF-8 text" in message("latin") and "iconv -f UTF-16" in message("wide")
    monkeypatch.setattr(sys, "stdin", None)
    assert "there is no standard input" in message("-")


def test_byte_order_marks_and_utf_16(corpus, capsys):
    """At the beginning of files, and of what was at the beginning before files were concatenated."""
    mark = codecs.BOM_UTF8
    byte_ranks("bytes.tiktoken").write_bytes(mark + Path("bytes.tiktoken").read_bytes())
    rows = [json.dumps({"text": text}).encode() + b"\n" for text in ("one", "two", "three")]
    Path("a.jsonl").write_bytes(mark.join([b"", *rows]))
    Path("a.txt").write_bytes(mark.join([b"", b"one\n<|endoftext|>\n", b"two\n"]))
    assert read_all("a.jsonl", "a.txt") == ["one", "two", "three", "one\n", "two\n"]
    run("corpus.jsonl", "--out", "d", *BYTES)
    Path("d/meta.json").write_bytes(mark + Path("d/meta.json").read_bytes())
    assert load_meta("d")["vocab_size"] == load_tokenizer("d").n_vocab == 257
    for name, data in [("w.txt", "the"), ("w.jsonl", '{"text": "the"}')]:
        Path(name).write_bytes(data.encode("utf-16"))
        assert f"{name}: is UTF-16 text; convert it" in error(capsys, name, "--out", "e", *BYTES)


def test_whole_numbers():
    for text, value in [("7", 7), ("1e3", 1000), ("1_000", 1000), ("2.0", 2), ("-5", -5), ("9e18", 9 * 10**18)]:
        assert whole(text) == value and type(whole(text)) is int
    assert whole("9007199254740993") == 2**53 + 1  # no float is
    for text in ("1.5", "1e-3", "inf", "nan", "sNaN", "", "x", "1e19", "-1e19", "1e999999999", str(2**63)):
        with pytest.raises(argparse.ArgumentTypeError, match="must be a whole number"):
            whole(text)


def test_flags_are_numbers_as_people_write_them(corpus, capsys):
    byte_ranks("bytes.tiktoken")
    meta = run(
        "--shard-tokens", "1e3", "--threads", "2.0", "--max-tokens", "2_000", "--out", "d", *BYTES, "corpus.jsonl"
    )
    assert 2000 <= meta["train_tokens"] < 2500 and len(Shards("d", "train").files) == 3
    assert run("corpus.jsonl", "--out", "e", "--tokenizer", "train:3e2", "--val-fraction", "0.3")["vocab_size"] == 300
    for flag, value in [("--threads", "1.5"), ("--shard-tokens", "1e-3"), ("--max-tokens", "-1000")]:
        assert f"argument {flag}: {value} " in error(capsys, "corpus.jsonl", "--out", "f", flag, value)
    assert "train:1.5: train:N needs N" in error(capsys, "corpus.jsonl", "--out", "f", "--tokenizer", "train:1.5")


def test_suffixes_and_compression_of_all_writers(corpus, capsys):
    import zstandard

    texts = [make_text(i) for i in range(40)]
    rows = Path("corpus.jsonl").read_bytes()
    for name in ("A.JSONL", "b.ndjson", "c.json", "D.Jsonl"):
        Path(name).write_bytes(rows)
        assert read_all(name) == texts
    Path("E.TXT").write_text(texts[0])
    Path("F.TXT.GZ").write_bytes(gzip.compress(texts[0].encode()))
    assert read_all("E.TXT", "F.TXT.GZ") == texts[:1] * 2
    # gzip: padded with zeros to a block of a tape, or between members
    half = rows.index(b"\n", len(rows) // 2) + 1
    parts = [gzip.compress(rows[:half]), gzip.compress(rows[half:])]
    for i, data in enumerate([b"".join(parts) + bytes(512), bytes(99).join(parts)]):
        Path(f"pad{i}.jsonl.gz").write_bytes(data)
        assert read_all(f"pad{i}.jsonl.gz") == texts
    # zstd: a window of 256 MB as of --long=28, frames that are empty or to be skipped, no size in the header
    wide = zstandard.ZstdCompressionParameters.from_level(3, window_log=28, write_content_size=0)

    def compress(data: bytes) -> bytes:
        stream = zstandard.ZstdCompressor(compression_params=wide).compressobj()  # knows no size
        return stream.compress(data) + stream.flush()

    whole = compress(rows)
    assert zstandard.get_frame_parameters(whole).window_size == 1 << 28
    skip = b"\x50\x2a\x4d\x18\x04\x00\x00\x00abcd"
    empty = zstandard.compress(b"")
    frames = [skip, zstandard.compress(rows[:half]), empty, skip, compress(rows[half:]), skip]
    for i, data in enumerate([whole, b"".join(frames)]):
        Path(f"long{i}.jsonl.zst").write_bytes(data)
        assert read_all(f"long{i}.jsonl.zst") == texts
    byte_ranks("bytes.tiktoken")
    write_parquet("z.parquet", texts)
    Path("z.parquet.zst").write_bytes(compress(Path("z.parquet").read_bytes()))
    assert read_all("z.parquet.zst") == texts
    # what is cut or damaged is never read as if it were whole
    noise = os.urandom(9999).hex().encode()
    broken = bytearray(gzip.compress(noise))
    broken[5000:5010] = bytes(10)
    for name, data in [
        ("cut.txt.zst", compress(noise)[:-30]),
        ("second.txt.zst", compress(noise) + compress(noise)[:-30]),
        ("broken.txt.gz", bytes(broken)),
        ("tail.txt.gz", gzip.compress(noise) + b"tail"),
    ]:
        Path(name).write_bytes(data)
        assert f"{name}: cannot be read (" in error(capsys, name, "--out", "d", *BYTES)


def test_locale_names_and_home(corpus, monkeypatch):
    """A terminal of ASCII, names that are no text, a home that cannot be written: no traceback after the work."""
    byte_ranks("bytes.tiktoken")
    for name in ("HF_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    ascii_only = dict(LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0")
    latin = os.fsdecode(b"na\xefve")
    for name, environment in [("naïve", ascii_only), (latin, {}), ("naïve", dict(PYTHONIOENCODING="ascii"))]:
        write_jsonl(f"{name}.jsonl", [{"text": make_text(i)} for i in range(20)])
        write_parquet(f"{name}.parquet", [make_text(i) for i in range(20)])
        for suffix in ("jsonl", "parquet"):
            done = start(f"{name}.{suffix}", "--out", name, "--overwrite", *BYTES, **environment)
            assert (done.returncode, done.stderr) == (0, "") and "tokens, vocabulary 257" in done.stdout
            assert len(documents(name, "train") + documents(name, "val")) == 20
    done = start("naïve.jsonl", "--out", "a\x9b2Jb\x1b[5m", *BYTES)
    assert done.returncode == 0 and done.stdout.startswith(r"a\x9b2Jb\x1b[5m: ")  # neither clears nor blinks
    Path("set").mkdir()
    write_parquet("set/train.parquet", [make_text(i) for i in range(20)])
    Path("file").write_text("")
    home = dict(HOME=str(corpus / "file"))
    done = start("set/train.parquet", "--out", "e", *BYTES, **home)
    assert (done.returncode, done.stderr) == (0, "")
    done = start("hf:./set", "--out", "f", *BYTES, **home)
    assert done.returncode == 2 and re.fullmatch(r"error: hf:\./set: [^\n]*; set HF_HOME to a [^\n]*\n", done.stderr)


# ---------------------------------------------------------------------------------------------------------------------
# The source debian


PROSE = "This sentence number {} is of the kind that a person would write in the manual of a program, and it is long."


def write_deb(path: Path, files: dict[str, bytes], compression: str = "xz") -> str:
    """A Debian package, by hand: an ar archive of two tar archives; returns its SHA-256. A value of str is a link."""
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode=f"w:{compression}") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(f"./{name}")
            if isinstance(content, str):
                member.type = tarfile.SYMTYPE
                member.linkname = content
            else:
                member.size = len(content)
            tar.addfile(member, io.BytesIO(content) if isinstance(content, bytes) else None)
    raw = b"!<arch>\n"
    for name, part in [
        ("debian-binary", b"2.0\n"),
        ("control.tar.xz", b"odd"),
        (f"data.tar.{compression}", data.getvalue()),
    ]:
        raw += f"{name:16}{0:<12}{0:<6}{0:<6}{100644:<8}{len(part):<10}`\n".encode() + part + b"\n" * (len(part) % 2)
    path.write_bytes(raw)
    return hashlib.sha256(raw).hexdigest()


def say(*numbers: int) -> str:
    return "\n\n".join(PROSE.format(number) + " " + PROSE.format(-number) for number in numbers)


PAGE = """<html><head><title>{}</title></head>
<body><nav>{}</nav><!-- {} --><p>{}<p>{}<br>{}<script>{}</script></body>"""


@pytest.fixture
def packages(corpus, monkeypatch) -> Path:
    """Two packages in a directory `debs`, listed with their checksums, and no others."""
    Path("debs").mkdir()
    first = {
        "usr/share/doc/one/b.html": PAGE.format(*map(say, range(1, 8))).encode(),
        "usr/share/doc/one/a.txt.gz": gzip.compress(f"{say(8)}\n \n{say(4).upper()}\n\nshort\n\n{say(9)}".encode()),
        "usr/share/doc/one/a.de.txt": say(10).encode(),
        "usr/share/doc/one/copyright": say(11).encode(),
        "usr/share/doc/one/link.txt": "a.txt.gz",
        "usr/share/doc/one/program.c": say(12).encode(),
        "usr/share/doc/one/table.txt": (("the of 5 | 7 ; " * 30) + "\n\n" + "Wort " * 60).encode(),
    }
    manual = say(13, 14).replace("program", "\\fBpro\\-gram\\fR")
    fortunes = f"{say(15)}\n%\n\n{say(16)}\n%\n".replace("long", "na\u00efve")
    second = {
        "usr/share/man/man3/two.3.gz": gzip.compress(manual.encode()),
        "usr/share/games/fortunes/wisdom": fortunes.encode("latin-1"),
        "usr/share/doc/two/long.md": "\n\n".join(say(i) for i in range(100, 500)).encode(),
    }
    one = write_deb(Path("debs/one_1%3a2.0-1_all.deb"), first)
    two = write_deb(Path("debs/two-doc_3.0_all.deb"), second, "gz")
    monkeypatch.setattr(prepare, "DEBIAN", {"one": ("1:2.0-1", one), "two-doc": ("3.0", two)})
    monkeypatch.setattr(prepare, "DEBIAN_SMALL", 1)
    prepare.read_debian.cache_clear()
    yield Path("debs")
    prepare.read_debian.cache_clear()


def test_debian_packages_of_a_directory(packages, capsys):
    """Prose only, each paragraph once, whatever its case: neither what a page does not show nor what is no English."""
    byte_ranks("bytes.tiktoken")
    texts, files = prepare.read_debian("debian:debs")
    assert files == ["one_1%3a2.0-1_all.deb", "two-doc_3.0_all.deb"]
    small = {f"{say(8)}\n\n{say(4).upper()}\n\n{say(9)}", f"{say(5)}\n\n{say(6)}"}
    assert set(prepare.read_debian("debian-small:debs")[0]) == small
    short = {say(13, 14).replace("program", "pro-gram"), f"{say(15)} %\n\n{say(16)} %".replace("long", "na\u00efve")}
    pages = set(texts) - small - short
    assert len(texts) == 6 and len(pages) == 2 and small | short < set(texts)
    assert "\n\n".join(sorted(pages)) == "\n\n".join(say(i) for i in range(100, 500))
    assert max(map(len, pages)) > 1 << 16 > max(map(len, pages)) - len(say(100)) - 700  # a slice, and its separators
    digests = [hashlib.md5(text.encode()).hexdigest() for text in texts]
    assert digests == sorted(digests)
    meta = run("debian:debs", "--out", "d", "--tokenizer", "train:300", "--val-fraction", "0.3")
    assert meta["packages"] == files and sorted(documents("d", "train") + documents("d", "val")) == sorted(texts)
    assert "note: one" not in capsys.readouterr().err


def offer(monkeypatch, *items: str, ending: str = "exit 0") -> None:
    """An apt-get in the place of the system's, which has NAME=VERSION of `items` and takes them from `debs`."""
    Path("bin").mkdir(exist_ok=True)
    script = f"""#!/bin/sh
        [ "$1 $2" = "download -q" ] || exit 1
        shift 2
        [ "$1" = --print-uris ] && print=1 && shift
        for item; do
            case " {" ".join(items)} " in
                *" $item "*) [ "$print" ] || cp {Path("debs").absolute()}/${{item%%=*}}_* . ;;
                *) echo "E: Version '${{item#*=}}' for '${{item%%=*}}' was not found" >&2; exit 100 ;;
            esac
        done
        [ "$print" ] || {ending}"""
    Path("bin/apt-get").write_text(script)
    Path("bin/apt-get").chmod(0o755)
    monkeypatch.setenv("PATH", f"{Path('bin').absolute()}:/bin:/usr/bin")


def test_debian_packages_by_apt(packages, monkeypatch, capsys):
    byte_ranks("bytes.tiktoken")
    expected = prepare.read_debian("debian:debs")
    offer(monkeypatch, "one=1:2.0-1", "two-doc=3.0")
    assert prepare.read_debian("debian") == expected
    prepare.read_debian.cache_clear()
    flags = ["--out", "d", *BYTES]
    offer(monkeypatch, "one=1:2.0-2")
    message = error(capsys, "debian", *flags)
    assert (
        "debian: apt does not offer one=1:2.0-1, two-doc=3.0: run apt-get update" in message and "debian:DIR" in message
    )
    offer(monkeypatch, "one=1:2.0-1", "two-doc=3.0", ending="{ echo 'E: No space left' >&2; exit 100; }")
    assert "debian: apt-get download failed (E: No space left)" in error(capsys, "debian", *flags)
    offer(monkeypatch, "one=1:2.0-1", "two-doc=3.0")
    with Path("debs/two-doc_3.0_all.deb").open("ab") as file:
        file.write(b"more")
    assert "two-doc_3.0_all.deb as downloaded has not the listed SHA-256" in error(capsys, "debian", *flags)
    assert prepare.read_debian("debian-small")[1] == expected[1][:1]
    monkeypatch.setenv("PATH", str(Path("debs").absolute()))
    assert "debian: no apt-get here" in error(capsys, "debian", *flags)


def test_debian_packages_that_are_not_the_listed_ones(packages, monkeypatch, capsys):
    """A newer version is taken, and said; a missing or damaged one is an error that names it."""
    byte_ranks("bytes.tiktoken")
    flags = ["--out", "d", *BYTES]
    newer = Path("debs/two-doc_3.1_all.deb")
    write_deb(newer, {"usr/share/doc/two/new.txt": say(30, 31).encode()})
    assert prepare.read_debian("debian:debs")[1][1] == "two-doc_3.0_all.deb"  # the listed one, if it is there
    prepare.read_debian.cache_clear()
    os.unlink("debs/two-doc_3.0_all.deb")
    texts, files = prepare.read_debian("debian:debs")
    assert files[1] == newer.name and say(30, 31) in texts and len(texts) == 3
    assert "note: two-doc_3.1_all.deb is not the listed 3.0" in capsys.readouterr().err
    prepare.read_debian.cache_clear()
    Path("debs/two-doc_3.2_all.deb").write_bytes(newer.read_bytes())
    assert "holds two-doc_3.1_all.deb and two-doc_3.2_all.deb; keep one" in error(capsys, "debian:debs", *flags)
    os.unlink("debs/two-doc_3.2_all.deb")
    whole = newer.read_bytes()
    for data in (whole[:-80], b"not a package", whole[:68] + b"x" * 60):
        newer.write_bytes(data)
        with pytest.raises(SystemExit):
            run("debian:debs", *flags)
        lines = capsys.readouterr().err.splitlines()
        assert "error: debian:debs: two-doc_3.1_all.deb cannot be read (" in lines[-1] and not Path("d").exists()
    newer.unlink()
    assert "debian:debs: debs lacks two-doc_3.0; fetch" in error(capsys, "debian:debs", *flags)
    assert "debian:nowhere: no directory nowhere" in error(capsys, "debian:nowhere", *flags)
    monkeypatch.setattr(prepare.importlib.util, "find_spec", lambda name: None)
    assert "debian:debs: needs lxml" in error(capsys, "debian:debs", *flags)
