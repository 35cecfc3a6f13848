"""What touches the disk: checkpoints of train.py, and the layouts of others, in and out.

    model, meta, checkpoint = load_run("out/demo")          # a run directory, or a ckpt_*.pt file
    model = from_pretrained("SmolLM-360M", n_recursion=2)   # a Hugging Face Llama; the authors'; what `export` wrote
    export("out/demo", Path("exported"))                    # safetensors, config.json, tokenizer.json

The reader and the writer of each layout stand side by side here.
"""

import hashlib
import json
import os
import re
import shutil
import sys
from collections.abc import Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import prepare
from cli import fail
from model import MoR, MoRConfig
from prepare import load_tokenizer

# ----------------------------------------------------------------------------------------------------------------------
# checkpoints of train.py


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


def write_state(f, state: dict) -> None:
    """What torch.save makes, and behind it the digest of that, which torch.load does not mind. The checksums inside the
    file would not do: torch.load ignores them, and damage to its directory goes past them."""
    torch.save(state, f)
    f.flush()
    f.write(hashlib.sha256(np.memmap(f.name, np.uint8, "r")).digest())


@contextmanager
def written_at_once(path: Path):
    """A binary file to write, which takes the place of `path` once all of it is on the disk."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    directory = os.open(path.parent, os.O_RDONLY)
    os.fsync(directory)  # the rename itself must survive a power cut
    os.close(directory)


# ----------------------------------------------------------------------------------------------------------------------
# weights in


REFERENCE_LAYER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "wq",
    "self_attn.k_proj": "wk",
    "self_attn.v_proj": "wv",
    "self_attn.o_proj": "wo",
    "post_attention_layernorm": "mlp_norm",
    "mlp.gate_proj": "w_gate",
    "mlp.up_proj": "w_up",
    "mlp.down_proj": "w_down",
}


PRETRAINED = "vocab_size n_head n_kv_head d_model d_ff rope_theta norm_eps tie_embeddings".split()


def read_pretrained(path: Path) -> tuple[dict, dict[str, Tensor], bool]:
    """config.json and safetensors of a directory -> (fields of MoRConfig, tensors, whether `eval.py export` wrote them
    rather than transformers). Raises ValueError."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    weights, file = {}, path / "config.json"
    try:
        c = json.loads(file.read_text())
        file = path / "model.safetensors.index.json"  # several files
        names = set(json.loads(file.read_text())["weight_map"].values()) if file.exists() else {"model.safetensors"}
        for name in sorted(names):
            file = path / name
            weights |= load_file(file)
        if c.get("model_type") == "nanomor":
            return c["model"], weights, True
        file = path / "config.json"
        width = c["hidden_size"] // c["num_attention_heads"]
        rope = c.get("rope_parameters") or c.get("rope_scaling") or {}
        settings = dict(
            vocab_size=c["vocab_size"], block_size=c["max_position_embeddings"], n_layer=c["num_hidden_layers"],
            n_head=c["num_attention_heads"], n_kv_head=c.get("num_key_value_heads") or c["num_attention_heads"],
            d_model=c["hidden_size"], d_ff=c["intermediate_size"], norm_eps=c["rms_norm_eps"],
            rope_theta=rope.get("rope_theta") or c.get("rope_theta") or 1e4,
            tie_embeddings=c.get("tie_word_embeddings", False),
        )  # fmt: skip
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as e:
        raise ValueError(f"{file} is not a part of a Hugging Face Llama ({type(e).__name__}: {e})") from e
    needs = [  # what of a Llama's config.json this model has no switch for
        ("model_type", c.get("model_type"), "llama"),
        ("hidden_act", c.get("hidden_act", "silu"), "silu"),
        ("attention_bias", c.get("attention_bias") or False, False),
        ("mlp_bias", c.get("mlp_bias") or False, False),
        ("head_dim", c.get("head_dim") or width, width),
        ("rope_type", rope.get("rope_type") or rope.get("type") or "default", "default"),
    ]
    wrong = [f"{name}={value!r} must be {must!r}" for name, value, must in needs if value != must]
    if wrong:
        raise ValueError(f"{file}: {', '.join(wrong)}")
    return settings, weights, False


def reference_names(model: MoR) -> dict[str, str]:
    """Names in the authors' checkpoints (plain Llama for vanilla) -> ours; tied copies have many names."""
    c, n, L = model.config, model.config.n_recursion, model.config.n_block
    names = {"model.embed_tokens.weight": "wte.weight", "model.norm.weight": "norm.weight"}
    names["lm_head.weight"] = "wte.weight" if c.tie_embeddings else "lm_head.weight"
    off = 1 if c.n_unshared else 0
    layers = {}  # their prefix -> ours
    for u in range(n * L):
        r, j = divmod(u, L)
        theirs = {"none": f"{off + u}", "expert": f"{off + r}.block.{j}", "token": f"{off}.block_list.{r}.{j}"}
        layers[theirs[c.router]] = f"block.{u // n if 'sequence' in c.sharing else j}"
    if c.n_unshared:
        behind = {"none": n * L, "expert": n, "token": 1}[c.router]
        layers |= {"0": "first", f"{1 + behind}": "last"}
    for theirs, ours in layers.items():
        for a, b in REFERENCE_LAYER.items():
            names[f"model.layers.{theirs}.{a}.weight"] = f"{ours}.{b}.weight"
    for net in [""] if c.router_arch == "linear" else [".0", ".2"]:
        if c.router == "token":
            names[f"model.layers.{off}.mor_router.router{net}.weight"] = f"router.net{net}.weight"
        for r in range(n if c.router == "expert" else 0):
            names[f"model.layers.{off + r}.mor_router.router{net}.weight"] = f"routers.{r}.net{net}.weight"
            if c.causality == "aux_router":
                names[f"model.layers.{off + r}.mlp_router.router{net}.weight"] = f"aux_routers.{r}.net{net}.weight"
    if c.router == "token" and c.balance == "bias":
        names[f"model.layers.{off}.router_bias"] = "balance_bias"
    return names


def load_reference_state_dict(model: MoR, sd: Mapping[str, Tensor]) -> None:
    """Loads the authors' checkpoint layout, or a plain Llama's into a vanilla model; tied tensors may be there once
    or repeated. Raises one ValueError that lists all missing, surplus, wrongly shaped and disagreeing tensors; the
    model is then unchanged."""
    names, own, bad, found = reference_names(model), model.state_dict(), [], {}
    for theirs, tensor in sd.items():
        ours = names.get(theirs)
        if theirs.endswith("rotary_emb.inv_freq"):
            continue  # a constant that old Llama checkpoints carry
        elif ours is None:
            bad.append(f"surplus tensor {theirs}")
        elif tensor.shape != own[ours].shape:
            bad.append(f"{theirs} has shape {tuple(tensor.shape)}, the model needs {tuple(own[ours].shape)}")
        elif not torch.equal(sd[found.setdefault(ours, theirs)], tensor):
            bad.append(f"{theirs} disagrees with {found[ours]}, to which it is tied")
    for ours in own.keys() - found.keys():
        theirs = [name for name, target in names.items() if target == ours]
        if not any(name in sd for name in theirs):
            bad.append(f"missing tensor {theirs[0]}")
    if bad:
        raise ValueError("; ".join(sorted(bad)))
    model.load_state_dict({ours: sd[theirs] for ours, theirs in found.items()})


def from_pretrained(path: str | Path, init: str = "stepwise", **overrides) -> MoR:
    """Weights of a directory with config.json and safetensors: a Hugging Face Llama, or what `eval.py export`
    wrote. `overrides` are MoRConfig fields. A Llama gives the vanilla model; with n_recursion > 1 first and last
    layer stay, routers are new, and the shared block starts from the layers between (Relaxed Recursive
    Transformers, arXiv 2410.20672; paper Table 12):

        stepwise  evenly spaced layers, the outermost included   average  the mean of the layers that become one
        lower     the lowest layers                              upper    the highest

    init="reference": the file holds the authors' layout of the model that `overrides` describe. Raises ValueError
    for whatever does not fit."""
    settings, weights, ours = read_pretrained(Path(path))
    given = {f: overrides[f] for f in PRETRAINED if overrides.get(f, settings[f]) != settings[f]}
    if given:
        theirs = {f: settings[f] for f in given}
        raise ValueError(f"{given} must be what the weights in {path} have: {theirs}")
    config = MoRConfig.resized(settings, overrides)
    if ours or init == "reference" or config.n_recursion == 1:
        model = MoR(config)
        load_reference_state_dict(model, weights)
        return model
    source = MoR(MoRConfig(**settings))
    load_reference_state_dict(source, weights)
    layers = [layer.state_dict() for layer in source.block]
    first, last, middle = layers[0], layers[-1], layers[1:-1] if config.n_unshared else layers
    M, L, N = len(middle), config.n_block, config.n_recursion
    if M < L:
        raise ValueError(f"n_layer={config.n_layer} asks for a block of {L} layers, {path} has {M}: lower n_layer")

    def spread(n: int) -> list[int]:  # n of the M layers, evenly
        return [round(i * (M - 1) / max(1, n - 1)) for i in range(n)]

    tied = [[u for u in range(N * L) if j == (u // N if "sequence" in config.sharing else u % L)] for j in range(L)]
    picks = {
        "stepwise": [[i] for i in spread(L)],
        "average": [[spread(N * L)[u] for u in places] for places in tied],
        "lower": [[j] for j in range(L)],
        "upper": [[M - L + j] for j in range(L)],
    }
    if init not in picks:
        raise ValueError(f"init={init!r} must be one of {', '.join(picks)}, reference")
    model = MoR(config)
    for layer, pick in zip(model.block, picks[init], strict=True):
        layer.load_state_dict({name: torch.stack([middle[i][name] for i in pick]).mean(0) for name in first})
    if config.n_unshared:
        model.first.load_state_dict(first)
        model.last.load_state_dict(last)
    for name in ("wte", "norm", "lm_head"):
        if getattr(model, name) is not None:
            getattr(model, name).load_state_dict(getattr(source, name).state_dict())
    return model


# ----------------------------------------------------------------------------------------------------------------------
# weights out


def export(run: str, target: Path) -> None:
    """A run as config.json, model.safetensors and tokenizer.json. Without router: an unrolled Hugging Face Llama, which
    transformers reads. With one: the layout of the authors' checkpoints. from_pretrained reads both."""
    from safetensors.torch import save_file

    if not target.name or target.exists() and (not target.is_dir() or any(target.iterdir())):
        fail(f"{target} exists already: name a new directory")
    model, meta, checkpoint = load_run(run)
    enc = run_tokenizer(run, checkpoint)
    c, own, sd, llama = model.config, model.state_dict(), {}, model.config.router == "none"
    for theirs, ours in reference_names(model).items():
        tied = theirs == "lm_head.weight" and c.tie_embeddings
        if not tied and (llama or ours not in sd.values()):  # a Llama has no tied layers: they are repeated
            sd[theirs] = ours
    config = dict(
        architectures=["LlamaForCausalLM"], model_type="llama", vocab_size=c.vocab_size, hidden_size=c.d_model,
        intermediate_size=c.d_ff, num_hidden_layers=c.n_layer, num_attention_heads=c.n_head, head_dim=c.head_dim,
        num_key_value_heads=c.n_kv_head, max_position_embeddings=c.block_size, rms_norm_eps=c.norm_eps,
        rope_theta=c.rope_theta, rope_parameters=dict(rope_type="default", rope_theta=c.rope_theta), hidden_act="silu",
        attention_bias=False, mlp_bias=False, tie_word_embeddings=c.tie_embeddings, torch_dtype="float32",
        bos_token_id=meta["eot"], eos_token_id=meta["eot"],
    )  # fmt: skip
    if not llama:
        config = dict(model_type="nanomor", model=c.asdict())
    partial = target.with_name(target.name + ".partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        save_file({k: own[v].clone() for k, v in sd.items()}, partial / "model.safetensors", {"format": "pt"})
        (partial / "config.json").write_text(json.dumps(config, indent=1))
        prepare.save_tokenizer(enc, partial)
        partial.replace(target)
    except OSError as e:
        fail(f"{target}: cannot be written ({e.strerror})")
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    kind = "a Hugging Face Llama" if llama else "safetensors in the layout of the authors' checkpoints"
    print(f"{target}: {kind}, {model.num_params(embedding=True):,} parameters")
