"""prepare.py: the shard format, tokenizers, the split, every error message, and what an interruption leaves."""

import base64
import gzip
import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import prepare
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
        "--max-tokens: inf is not a whole number": ["corpus.jsonl", "--max-tokens", "inf"],
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
