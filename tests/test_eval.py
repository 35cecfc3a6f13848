"""eval.py: what it measures against direct computation, weights in and out against transformers, mistakes."""

import base64
import importlib.util
import json
import math
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import make_model, tiny

import eval as evaluation
import prepare
from checkpoint import export, write_state
from model import MoR

WORDS = "the model routes each token to a depth and reads its own cache again before it answers".split()
KINDS = {
    "vanilla": {},
    "recursive": dict(n_recursion=3),
    "expert": dict(n_recursion=3, router="expert"),
    "token": dict(n_recursion=3, router="token"),
    "share": dict(n_recursion=3, router="expert", kv="share"),
}


def texts(n: int, seed: int = 0) -> list[str]:
    rng = np.random.default_rng(seed)
    return [" ".join(rng.choice(WORDS, 30)) + f" {i}" for i in range(n)]


def run_program(monkeypatch, program, *argv):
    monkeypatch.setattr(sys, "argv", ["program", *map(str, argv)])
    return program()


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A data directory whose tokenizer has 256 bytes, three merges and end-of-text."""
    root = tmp_path_factory.mktemp("eval")
    tokens = [bytes([b]) for b in range(256)] + [b"th", b"the", b" t"]
    (root / "tiny.tiktoken").write_bytes(b"".join(base64.b64encode(t) + b" %d\n" % i for i, t in enumerate(tokens)))
    (root / "t.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts(60)))
    with pytest.MonkeyPatch.context() as m:
        flags = ("--tokenizer", root / "tiny.tiktoken", "--val-fraction", 0.3)
        run_program(m, prepare.main, root / "t.jsonl", "--out", root / "data", *flags)
    return root / "data"


def make_run(data, path, seed=1, **kind):
    """A run directory of train.py's layout with random weights."""
    config = tiny(**dict(vocab_size=260) | kind)
    model, meta = make_model(config, seed), prepare.load_meta(data)
    path.mkdir(parents=True)
    checkpoint = dict(model=model.state_dict(), step=3)
    checkpoint["config"] = dict(model=config.asdict(), train=dict(data=str(data)), data=meta)
    with open(path / "ckpt_000003.pt", "wb") as f:
        write_state(f, checkpoint)
    return model.eval()


def evaluate(run, *flags, capsys):
    evaluation.main([str(run), *map(str, flags)])
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def one_line(capsys, *argv) -> str:
    """What a mistake prints: one line and exit status 2, nothing else."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as e:
        evaluation.main([str(a) for a in argv])
    captured = capsys.readouterr()
    assert e.value.code == 2 and captured.err.startswith("error: ") and captured.err.count("\n") == 1, captured.err
    return captured.err


# ---- NLL and routing


@pytest.mark.parametrize("kind", KINDS)
def test_causal_nll_is_that_of_decoding_token_by_token(kind, data):
    model = make_model(tiny(vocab_size=260, **KINDS[kind])).eval()
    rows = prepare.Shards(data, "val").blocks(24, 72)
    m = evaluation.measure(model, rows, "causal")
    cache = model.make_cache(len(rows), 24, slack=1e6)
    for t in range(24):
        logits = model.decode(torch.from_numpy(rows[:, t]), cache)
        nll = F.cross_entropy(logits, torch.from_numpy(rows[:, t + 1]), reduction="none")
        assert np.abs(nll.numpy() - m.nll[:, t]).max() < 1e-4


@pytest.mark.parametrize("kind", KINDS)
def test_report_against_loops(kind, data, tmp_path, capsys):
    model = make_run(data, tmp_path / "run", **KINDS[kind])
    c, N = model.config, model.config.n_recursion
    report = evaluate(tmp_path / "run", "--tokens", 240, capsys=capsys)
    rows = prepare.Shards(data, "val").blocks(c.block_size, 240)
    assert report["tokens"] == rows[:, 1:].size == 240
    enc = prepare.load_tokenizer(data)
    size = sum(len(enc.decode_single_token_bytes(t)) for t in rows[:, 1:].ravel().tolist() if t != enc.eot_token)
    for routing in ("causal", "topk") if c.router == "expert" else ("causal",):
        nll, depth = 0.0, []
        for row in torch.from_numpy(rows):
            out = model(row[None, :-1], row[None, 1:], routing)
            nll += float(out.losses["lm"]) * c.block_size
            depth += out.depth[0].tolist()
        got = report[routing]
        assert got["nll"] == pytest.approx(nll / 240, abs=1e-5)
        assert got["bits_per_byte"] == pytest.approx(nll / math.log(2) / size, abs=1e-5)
        assert got["perplexity"] == pytest.approx(math.exp(nll / 240), rel=1e-4)
        assert got["fractions"] == pytest.approx([sum(d > r for d in depth) / 240 for r in range(N)], abs=1e-6)
        assert sum(x["share"] * x["nll"] for x in got["by_depth"]) == pytest.approx(got["nll"], abs=1e-4)
        assert np.mean([x["nll"] for x in got["by_position"]]) == pytest.approx(got["nll"], abs=1e-4)
    assert ("topk" in report) == ("gap" in report) == (c.router == "expert")
    if c.router == "expert":
        assert report["topk"]["flops_per_token"] == pytest.approx(model.flops_per_token(c.block_size))
        assert report["gap"] == pytest.approx(report["causal"]["nll"] - report["topk"]["nll"], abs=2e-6) != 0
        right = total = 0
        last = [0] * c.block_size
        for row in torch.from_numpy(rows):
            out = model(row[None, :-1], routing="topk")
            for t in range(c.block_size):
                last[t] += int(out.depth[0, t]) == N
                for r in (1, 2):
                    if out.depth[0, t] >= r:
                        total += 1
                        right += bool(out.router[0, t, r] >= 0) == bool(out.depth[0, t] > r)
        assert report["router"]["sampling_accuracy"] == pytest.approx(right / total, abs=1e-6)
        assert report["router"]["dead_token_ratio"] == pytest.approx(last.count(0) / c.block_size, abs=1e-6)
    depths = {x["max_depth"]: x for x in report["scaling"] if x["threshold"] == 0.5}
    assert set(depths) == set(range(1, N + 1)) and depths[N]["nll"] == report["causal"]["nll"]
    if N > 1:  # less depth costs fewer FLOPs and gives another loss
        assert depths[1]["flops_per_token"] < depths[N]["flops_per_token"] and depths[1]["nll"] != depths[N]["nll"]
    if c.router == "expert":
        swept = sorted((x for x in report["scaling"] if x["max_depth"] is None), key=lambda x: x["threshold"])
        flops = [x["flops_per_token"] for x in swept]
        assert len(swept) == 4 and flops[0] > flops[-1]
    pictures = {"loss_by_depth.png"}
    pictures |= {"depth_histogram.png", "depth_heatmap.png", "pareto.png"} if N > 1 else set()
    pictures |= {"router_scores.png"} if c.router != "none" else set()
    assert {p.name for p in (tmp_path / "run/eval").glob("*.png")} == pictures
    assert json.loads((tmp_path / "run/eval/eval.json").read_text()) == report
    page = (tmp_path / "run/eval/depth.html").read_text()
    best = report["causal"]["by_depth"]
    assert page.count("<span class") == c.block_size and f"{best[0]['share']:.1%}" in page
    assert f"<b>{best[-1]['nll']:.2f}</b>" in page  # the loss over all tokens, not over the text alone


def test_knobs_apply_to_the_whole_report(data, tmp_path, capsys):
    model = make_run(data, tmp_path / "run", **KINDS["expert"])
    report = evaluate(tmp_path / "run", "--tokens", 96, "--max-depth", 2, "--threshold", 0.3, capsys=capsys)
    rows = prepare.Shards(data, "val").blocks(48, 96)
    m = evaluation.measure(model, rows, "causal", threshold=0.3, max_depth=2)
    assert report["causal"]["nll"] == pytest.approx(m.nll.mean(), abs=1e-5) and m.depth.max() == 2


def test_a_model_without_causal_routing_reports_topk_only(data, tmp_path, capsys):
    make_run(data, tmp_path / "run", n_recursion=3, router="expert", causality="none")
    report = evaluate(tmp_path / "run", "--tokens", 96, capsys=capsys)
    assert "topk" in report and "causal" not in report and "gap" not in report and report["scaling"] == []


def test_a_router_without_a_choice(data, tmp_path, capsys):
    make_run(data, tmp_path / "run", n_recursion=3, router="expert", capacity=(1.0, 1.0, 1.0))
    report = evaluate(tmp_path / "run", "--tokens", 96, capsys=capsys)
    assert report["causal"]["mean_depth"] == 3 and "sampling_accuracy" not in report["router"]
    assert not (tmp_path / "run/eval/router_scores.png").exists()


def test_shards_of_llmc_without_meta(tmp_path, capsys, monkeypatch):
    """val_bytes is unknown: bits/byte comes from the tokens; the vocabulary is padded beyond the tokenizer's."""
    tokens = [bytes([b]) for b in range(256)] + [b"\xff%d" % i for i in range(50000)]
    (tmp_path / "gpt2.tiktoken").write_bytes(b"".join(base64.b64encode(t) + b" %d\n" % i for i, t in enumerate(tokens)))
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    ids = np.array([*" ".join(texts(9)).encode(), 50256], "<u2")
    for split in ("train", "val"):
        header = np.zeros(256, "<i4")
        header[:3] = 20240520, 1, len(ids)
        (tmp_path / f"edu_{split}_000001.bin").write_bytes(header.tobytes() + ids.tobytes())
    make_run(tmp_path, tmp_path / "run", vocab_size=50304, n_recursion=3, router="expert")
    report = evaluate(tmp_path / "run", "--tokens", 96, capsys=capsys)
    assert report["bytes"] == 95  # a token is a byte here, but for end-of-text
    assert report["causal"]["bits_per_byte"] == pytest.approx(report["causal"]["nll"] / math.log(2) * 96 / 95, rel=1e-5)


# ---- pages, several models, the paper's protocol


def test_a_text_of_ones_own(data, tmp_path, capsys):
    make_run(data, tmp_path / "run", **KINDS["expert"])
    text = tmp_path / "a text.txt"
    text.write_text("\ufeffthe <depth> of " + "the" * 10**6)  # of which the context takes the beginning
    evaluate(tmp_path / "run", "--tokens", 48, "--text", text, "--html", tmp_path / "p.html", capsys=capsys)
    page = (tmp_path / "p.html").read_text()
    assert page.count("<span class") == 48 and "&lt;</span>" in page and "\ufeff" not in page
    assert not (tmp_path / "run/eval/depth.html").exists()
    assert "cannot be written" in one_line(capsys, tmp_path / "run", "--html", tmp_path / "no/p.html")


def test_several_models_side_by_side(data, tmp_path, capsys):
    names = {"vanilla": {}, "a $dollar$ _name": KINDS["expert"], "none": KINDS["expert"] | dict(causality="none")}
    models = {name: make_run(data, tmp_path / name, **kind) for name, kind in names.items()}
    runs = [tmp_path / name for name in names]
    argv = [str(runs[0]), "--tokens", "96", *map(str, runs[1:]), "--out", str(tmp_path / "out")]
    evaluation.main(argv)
    said = capsys.readouterr().out.splitlines()
    table, found = said[:4], json.loads(said[-1])["runs"]
    assert json.loads((tmp_path / "out/compare.json").read_text()) == found
    assert (tmp_path / "out/compare.png").read_bytes().startswith(b"\x89PNG")
    assert len({len(line) for line in table}) == 1 and "tokens/s" not in table[0]
    rows = prepare.Shards(data, "val").blocks(48, 96)
    for row, line, (name, model) in zip(found, table[1:], models.items(), strict=True):
        assert row["run"] == str(tmp_path / name) and row["parameters"] == model.num_params()
        for routing in ("causal", "topk"):
            if (routing, name) in (("topk", "vanilla"), ("causal", "none")):
                assert row[routing] is None
                continue
            m = evaluation.measure(model, rows, routing)
            assert row[routing] == pytest.approx(m.nll.mean(), abs=1e-5) and f"{row[routing]:.4f}" in line
    alone = evaluate(runs[1], "--tokens", 96, capsys=capsys)["causal"]
    for name, value in (("bits_per_byte", 1), ("mean_depth", 1), ("flops_per_token", 1e6)):
        got = found[1]["mflops" if "flops" in name else name]
        assert got == pytest.approx(alone[name] / value, rel=1e-4)


def test_what_goes_with_one_model_only(data, tmp_path, capsys):
    make_run(data, tmp_path / "run", **KINDS["expert"])
    for flag in (["--paper"], ["--tasks", "piqa"], ["--text", "a"], ["--html", "a.html"]):
        assert f"{flag[0]} goes with one model" in one_line(capsys, tmp_path / "run", tmp_path / "run", *flag)
    assert "name several" in one_line(capsys, tmp_path / "run", "--speed")
    assert "checkpoint" in one_line(capsys, tmp_path / "run", tmp_path / "nothing")


def test_speed_is_tokens_over_seconds(data, monkeypatch):
    model = make_model(tiny(vocab_size=260)).eval()
    seconds = iter([99.0, 2.0, 4.0, 8.0])  # the first call compiles

    def generate(model, prompts, n, decoder):
        assert (len(prompts), len(prompts[0]), n) == (1, 24, 64)
        return SimpleNamespace(tokens=[[1] * 16], seconds=next(seconds))

    monkeypatch.setattr(evaluation, "generate", generate)
    assert evaluation.measure_speed(model, [1] * 40, {}) == 4.0


@pytest.mark.parametrize("kind", ["vanilla", "expert", "token"])
def test_the_papers_protocol(kind, data, tmp_path, capsys):
    """The first sequences in order; in each, tokens 1.. are predicted, and routing sees the whole of it."""
    model = make_run(data, tmp_path / "run", **KINDS[kind])
    shards = prepare.Shards(data, "val")
    found = evaluation.measure_paper(model, shards, {}, sequences=3, length=20)
    assert ("topk" in found) == (kind == "expert") and found["sequences"] == 3 and found["length"] == 20
    for routing in set(found) & {"topk", "causal"}:
        total = 0.0
        for i in range(3):
            ids = torch.from_numpy(shards.tokens(20 * i, 20))[None]
            with torch.no_grad():
                logits = model(ids, routing=routing).logits
            total += F.cross_entropy(logits[0, :-1], ids[0, 1:], reduction="sum").item()
        assert found[routing] == pytest.approx(total / (3 * 19), abs=1e-5)
    report = evaluate(tmp_path / "run", "--paper", "--tokens", 48, capsys=capsys)
    assert report["paper"]["length"] == 48 and report["paper"]["sequences"] == min(500, len(shards) // 48)


# ---- few-shot tasks


def request(*args):
    return SimpleNamespace(args=args)


PAIRS = [
    ("the model ", "routes"),
    ("", "the depth"),
    ("the", " token and cache"),
    ("each token " * 9, "reads"),
    ("a", ""),
]


@pytest.mark.parametrize("kind", ["vanilla", "expert", "token"])
def test_loglikelihoods_equal_direct_computation_whatever_the_batch(kind, data):
    model, enc = make_model(tiny(vocab_size=260, **KINDS[kind])).eval(), prepare.load_tokenizer(data)
    expected = []
    for context, continuation in PAIRS:
        prompt = enc.encode_ordinary(context.rstrip()) or [enc.eot_token]
        ids = prompt + enc.encode_ordinary(context + continuation)[len(prompt) if context else 0 :]
        n, ids = len(ids) - len(prompt), ids[-49:]
        logp, greedy = 0.0, True
        for t in range(len(ids) - n, len(ids)):  # each token alone, after everything before it, without padding
            here = model(torch.tensor([ids[:t]]), routing="causal").logits[0, -1].log_softmax(-1)
            logp, greedy = logp + here[ids[t]].item(), greedy and int(here.argmax()) == ids[t]
        expected.append((logp, greedy))
    for batch_size, order in ((1, range(5)), (2, [4, 2, 0, 3, 1]), (32, [3, 1, 4, 0, 2])):
        scorer = evaluation.Scorer(model, enc, batch_size)
        found = scorer.loglikelihood([request(*PAIRS[i]) for i in order])
        for i, (logp, greedy) in zip(order, found, strict=True):
            assert logp == pytest.approx(expected[i][0], abs=3e-4) and greedy == expected[i][1]


def test_greedy_continuation_is_recognised_and_generated(data):
    model, enc = make_model(tiny(vocab_size=260, **KINDS["expert"])).eval(), prepare.load_tokenizer(data)
    prompt, ids = "the cache", enc.encode_ordinary("the cache")
    for _ in range(6):
        ids.append(int(model(torch.tensor([ids]), routing="causal").logits[0, -1].argmax()))
    scorer = evaluation.Scorer(model, enc)
    n = len(enc.encode_ordinary(prompt))
    assert scorer.score([(ids[:n], ids[n:])])[0][1]
    assert not scorer.score([(ids[:n], [*ids[n:-1], (ids[-1] + 1) % 256])])[0][1]
    text = enc.decode(ids[n:])
    options = dict(max_gen_toks=6, do_sample=False)
    found = scorer.generate_until([request(prompt, options), request("a depth", options | dict(max_gen_toks=3))])
    assert found[0] == text and len(enc.encode_ordinary(found[1])) <= 12
    stop = text[2]
    assert scorer.generate_until([request(prompt, options | dict(until=[stop]))])[0] == text.split(stop)[0]
    # more tokens than the context holds: the prompt stays, generation ends where the context does
    assert scorer.generate_until([request(prompt, options | dict(max_gen_toks=999))])[0].startswith(text[:3])


def test_a_continuation_that_disappears_into_the_context_is_scored(data):
    scorer = evaluation.Scorer(make_model(tiny(vocab_size=260)).eval(), prepare.load_tokenizer(data))
    context, continuation = scorer.encode_pair("t", "h")  # "th" is one token, as "t" is
    assert len(context) == 1 and continuation == [ord("h")]


def test_rolling_predicts_every_token_once_with_the_longest_context(data):
    model, enc = make_model(tiny(vocab_size=260, **KINDS["expert"])).eval(), prepare.load_tokenizer(data)
    for text in ("the", " ".join(texts(2))):  # shorter than the context of 48, and several times longer
        ids, total, T = [enc.eot_token, *enc.encode_ordinary(text)], 0.0, 48
        for t in range(1, len(ids)):
            end = min((t - 1) // T * T + 1 + T, len(ids))  # of the window that predicts token t
            here = model(torch.tensor([ids[max(0, end - T - 1) : t]]), routing="causal").logits[0, -1]
            total += here.log_softmax(-1)[ids[t]].item()
        found = evaluation.Scorer(model, enc, 3).loglikelihood_rolling([request(text), request(text)])
        assert found == pytest.approx([total, total], rel=1e-5)


def test_local_data_sets(tmp_path):
    rows = [dict(goal=f"g{i}", sol1="a", sol2="b", label=i % 2) for i in range(4)]
    folder = tmp_path / "all" / "piqa" / "plain_text"
    folder.mkdir(parents=True)
    (folder / "validation.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    found = evaluation.local_dataset(tmp_path, "baber/piqa")
    assert found["validation"]["goal"][:] == ["g0", "g1", "g2", "g3"] and len(found["train"]) == 0
    found["validation"].save_to_disk(tmp_path / "disk" / "ai2_arc" / "ARC-Easy" / "validation")
    assert len(evaluation.local_dataset(tmp_path, "allenai/ai2_arc", "ARC-Easy")["test"]) == 4
    with pytest.raises(SystemExit):
        evaluation.local_dataset(tmp_path, "allenai/ai2_arc", "ARC-Challenge")


TASK = """
task: answers
dataset_path: json
dataset_kwargs: {data_files: FILE}
test_split: train
output_type: multiple_choice
doc_to_text: "{{goal}}"
doc_to_target: label
doc_to_choice: "{{[sol1, sol2]}}"
metric_list: [{metric: acc}, {metric: acc_norm}]
"""


def test_tasks_with_the_harness_itself(data, tmp_path, capsys):
    pytest.importorskip("lm_eval", reason="the extra `eval` is not installed; the tests above cover what it calls")
    model, enc = make_run(data, tmp_path / "run", **KINDS["expert"]), prepare.load_tokenizer(data)
    rows = [dict(goal=t[:20], sol1="a depth", sol2="its cache and model", label=i % 2) for i, t in enumerate(texts(12))]
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks/rows.json").write_text("".join(json.dumps(r) + "\n" for r in rows))
    (tmp_path / "tasks/answers.yaml").write_text(TASK.replace("FILE", str(tmp_path / "tasks/rows.json")))
    report = evaluate(tmp_path / "run", "--tasks", "answers", "--task-data", tmp_path / "tasks", capsys=capsys)
    scorer = evaluation.Scorer(model, enc)
    right = 0
    for row in rows:
        a, b = scorer.loglikelihood([request(row["goal"], " " + row["sol1"]), request(row["goal"], " " + row["sol2"])])
        right += (b[0] > a[0]) == row["label"]
    assert report["tasks"]["answers"]["acc"] == pytest.approx(right / 12, abs=1e-4)
    assert "unknown task" in one_line(capsys, tmp_path / "run", "--tasks", "answer_s")

    # a task that fails, and one whose data are not there, leave the others' results
    (tmp_path / "tasks/broken.yaml").write_text(
        (tmp_path / "tasks/answers.yaml").read_text().replace("answers", "broken").replace("{{goal}}", "{{goal + 1}}")
    )
    (tmp_path / "tasks/absent.yaml").write_text(
        (tmp_path / "tasks/answers.yaml").read_text().replace("answers", "absent").replace(": json", ": nonesuch")
    )
    with pytest.raises(SystemExit) as stop:
        argv = ["--tasks", "broken,answers,absent", "--task-data", str(tmp_path / "tasks")]
        evaluation.main([str(tmp_path / "run"), *argv])
    said = capsys.readouterr()
    found = json.loads(said.out.splitlines()[-1])["tasks"]
    assert stop.value.code == 2 and found["answers"] == report["tasks"]["answers"]
    assert set(found["broken"]) == set(found["absent"]) == {"error"}
    errors = [line for line in said.err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 2 and "task broken" in errors[0] and "nonesuch" in errors[1]


@pytest.mark.parametrize("gap", ["beyond", "within"])
def test_tokens_that_the_tokenizer_lacks_are_generated_text_too(gap, data, monkeypatch):
    """Vocabularies are padded, and tokenizers have gaps: what they lack is a replacement character."""
    enc = prepare.load_tokenizer(data)
    model = make_model(tiny(vocab_size=300)).eval()
    missing = 280 if gap == "beyond" else 100
    if gap == "within":
        lacks = enc.decode_single_token_bytes

        def decode(self, token):
            if token == missing:
                raise KeyError(token)
            return lacks(token)

        monkeypatch.setattr("tiktoken.Encoding.decode_single_token_bytes", decode)
    found = SimpleNamespace(tokens=[[ord("a"), missing, ord("b")]])
    monkeypatch.setattr(evaluation, "generate", lambda *args, **knobs: found)
    scorer = evaluation.Scorer(model, enc)
    assert scorer.generate_until([request("the", dict(max_gen_toks=3))]) == ["a\ufffdb"]
    assert scorer.generate_until([request("the", dict(max_gen_toks=3, until="\ufffd"))]) == ["a"]


def test_names_and_averages_of_tasks(capsys):
    known = ["lambada_openai", "hellaswag", "piqa", "winogrande", "arc_easy", "arc_challenge", "mmlu_continuation"]
    assert evaluation.name_tasks("paper", known) == known
    assert evaluation.name_tasks("mmlu,piqa, arc ,piqa,", known) == [known[6], known[2], *known[4:6]]
    for wrong in ("", ",", "piqua"):
        with pytest.raises(SystemExit):
            evaluation.name_tasks(wrong, known)
    assert "near it: piqa" in capsys.readouterr().err
    scores = {name: dict(score=0.1 * (i + 1)) for i, name in enumerate(known)}
    # ARC counts once: (0.1 + 0.2 + 0.3 + 0.4 + 0.55 + 0.7) / 6
    assert evaluation.average_tasks(scores) == {"arc": 0.55, "six_task_average": 0.375}
    del scores["piqa"]
    assert evaluation.average_tasks(scores) == {"arc": 0.55}
    scores["arc_easy"] = {"error": "lost"}
    assert evaluation.average_tasks(scores) == {}


# ---- weights in and out


def llama(path, tie=True, layers=8, **options):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=61, hidden_size=32, intermediate_size=40, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=48, tie_word_embeddings=tie, rope_theta=5e3,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(1 + 0.1 * torch.randn_like(p) if p.dim() == 1 else torch.randn_like(p) * p.size(1) ** -0.5)
    model.save_pretrained(path, **options)
    return model


@torch.no_grad()
@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("options", [{}, dict(max_shard_size="40KB")])
def test_a_llama_of_transformers_comes_in_with_equal_logits(tie, options, tmp_path):
    theirs, x = llama(tmp_path / "hf", tie, **options), torch.randint(61, (2, 30))
    assert len(list((tmp_path / "hf").glob("*.safetensors"))) == 1 or options
    ours = MoR.from_pretrained(tmp_path / "hf").eval()
    assert ours.config.tie_embeddings == tie and ours.config.rope_theta == 5e3
    assert (theirs(x).logits - ours(x).logits).abs().max() < 1e-4


@torch.no_grad()
@pytest.mark.parametrize("sharing", ["middle_cycle", "cycle", "sequence", "middle_sequence"])
@pytest.mark.parametrize("init", ["stepwise", "average", "lower", "upper"])
def test_initialisations_against_a_loop(init, sharing, tmp_path):
    layers = 8 if "middle" in sharing else 6  # 1 + 2x3 + 1, or 2x3
    theirs = llama(tmp_path / "hf", layers=layers)
    router = "none" if "sequence" in sharing else "expert"
    model = MoR.from_pretrained(tmp_path / "hf", init, n_recursion=3, sharing=sharing, router=router)
    sd = theirs.state_dict()
    first = 1 if "middle" in sharing else 0
    for j in range(2):
        if init == "average":
            same = (
                [first + 3 * j + i for i in range(3)]
                if "sequence" in sharing
                else [first + j + 2 * r for r in range(3)]
            )
        else:
            same = [first + {"stepwise": (0, 5), "lower": (0, 1), "upper": (4, 5)}[init][j]]
        for name, ours in (("self_attn.k_proj", "wk"), ("mlp.down_proj", "w_down"), ("input_layernorm", "attn_norm")):
            expected = sum(sd[f"model.layers.{i}.{name}.weight"] for i in same) / len(same)
            got = model.state_dict()[f"block.{j}.{ours}.weight"]
            assert torch.allclose(got, expected, atol=1e-6), (init, sharing, j, name)
    assert torch.equal(model.wte.weight, sd["model.embed_tokens.weight"])
    assert torch.equal(model.norm.weight, sd["model.norm.weight"])
    if first:
        assert torch.equal(model.first.wq.weight, sd["model.layers.0.self_attn.q_proj.weight"])
        assert torch.equal(model.last.wo.weight, sd["model.layers.7.self_attn.o_proj.weight"])


def test_a_depth_that_does_not_divide_grows(tmp_path):
    llama(tmp_path / "hf")  # 8 layers, 1 + 2x4 + 1 with four recursions
    model = MoR.from_pretrained(tmp_path / "hf", "average", n_recursion=4, router="token")
    assert (model.config.n_layer, model.config.n_block) == (10, 2)


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_export_and_back(kind, data, tmp_path, capsys):
    ours = make_run(data, tmp_path / "run", **KINDS[kind])
    export(str(tmp_path / "run"), tmp_path / "out")
    x = torch.randint(260, (2, 30))
    again = MoR.from_pretrained(tmp_path / "out").eval()
    assert torch.equal(again(x).logits, ours(x).logits)
    if ours.config.router == "none":
        transformers = pytest.importorskip("transformers")
        theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
        assert (theirs(x).logits - ours(x).logits).abs().max() < 1e-4
        tokenizer, text = transformers.AutoTokenizer.from_pretrained(tmp_path / "out"), texts(1)[0]
        assert tokenizer.encode(text) == prepare.load_tokenizer(data).encode_ordinary(text)
        assert tokenizer.eos_token_id == 259 and tokenizer.decode(tokenizer.encode(text)) == text
    report = evaluate(tmp_path / "out", "--data", data, "--tokens", 48, capsys=capsys)
    same = evaluate(tmp_path / "run", "--tokens", 48, capsys=capsys)
    assert report["causal"]["nll"] == pytest.approx(same["causal"]["nll"], abs=1e-5)


def test_what_does_not_fit_a_llama_is_one_valueerror(tmp_path):
    llama(tmp_path / "hf")
    path = tmp_path / "hf/config.json"
    good = json.loads(path.read_text())
    for change, word in (
        (dict(model_type="gpt2"), "model_type"), (dict(attention_bias=True), "attention_bias"),
        (dict(rope_parameters=dict(rope_type="llama3", rope_theta=1e4)), "rope_type"),
    ):  # fmt: skip
        path.write_text(json.dumps(good | change))
        with pytest.raises(ValueError, match=word):
            MoR.from_pretrained(tmp_path / "hf")
    path.write_text(json.dumps(good))
    for overrides, word in (
        (dict(vocab_size=62), "vocab_size"), (dict(init="middle", n_recursion=3), "init"), (dict(depth=3), "unknown"),
        (dict(n_recursion=3, n_layer=29), "lower n_layer"), (dict(n_layer=7), "surplus"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=word):
            MoR.from_pretrained(tmp_path / "hf", **overrides)


# ---- mistakes


def test_mistakes_are_one_line(data, tmp_path, capsys):
    make_run(data, tmp_path / "run", **KINDS["expert"])
    assert "checkpoint" in one_line(capsys, tmp_path / "nothing")
    assert "checkpoint" in one_line(capsys, data)  # a directory, but not a run
    assert "threshold" in one_line(capsys, tmp_path / "run", "--threshold", 1.5)
    assert "max_depth" in one_line(capsys, tmp_path / "run", "--max-depth", 9)
    assert "--tokens" in one_line(capsys, tmp_path / "run", "--tokens", 0)
    assert "no such" in one_line(capsys, tmp_path / "run", "--text", tmp_path / "no.txt").lower()
    assert "unrecognized" in one_line(capsys, tmp_path / "run", "--typo")
    if importlib.util.find_spec("lm_eval") is None:
        assert "lm-evaluation-harness" in one_line(capsys, tmp_path / "run", "--tasks", "piqa")
    assert not (tmp_path / "run/eval").exists()


def test_bad_data_is_one_line(data, tmp_path, capsys, monkeypatch):
    make_run(data, tmp_path / "run")
    other = tmp_path / "noval"
    other.mkdir()
    for file in data.iterdir():
        if not file.name.startswith("val"):
            (other / file.name).write_bytes(file.read_bytes())
    assert "no val_*.bin" in one_line(capsys, tmp_path / "run", "--data", other)
    (tmp_path / "t.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts(60)))
    flags = ("--tokenizer", "train:260", "--val-fraction", "0.3")
    run_program(monkeypatch, prepare.main, tmp_path / "t.jsonl", "--out", tmp_path / "other", *flags)
    capsys.readouterr()
    assert "another tokenizer" in one_line(capsys, tmp_path / "run", "--data", tmp_path / "other")
    export(str(tmp_path / "run"), tmp_path / "weights")
    capsys.readouterr()
    assert "--data" in one_line(capsys, tmp_path / "weights")
    assert "tokenizer" in one_line(capsys, tmp_path / "weights", "--data", tmp_path / "other")


def test_damaged_weights_are_one_line(data, tmp_path, capsys):
    make_run(data, tmp_path / "run")
    export(str(tmp_path / "run"), tmp_path / "out")
    capsys.readouterr()
    file = tmp_path / "out/model.safetensors"
    whole = file.read_bytes()
    for damage in (whole[:-100], b"", b"\xff" * 64):
        file.write_bytes(damage)
        assert "model.safetensors" in one_line(capsys, tmp_path / "out", "--data", data)
    file.write_bytes(whole)
    (tmp_path / "out/config.json").write_text("{")
    assert "config.json" in one_line(capsys, tmp_path / "out", "--data", data)
