"""What touches the disk: checkpoints of train.py, and the layouts of others, in and out.

    model, meta, checkpoint = load_run("out/demo")          # a run directory, or a ckpt_*.pt file
    model = from_pretrained("SmolLM-360M", n_recursion=2)   # a Hugging Face Llama; the authors'; what `export` wrote
    export("out/demo", Path("exported"))                    # for transformers; python checkpoint.py export does it

The reader and the writer of each layout stand side by side here.
"""

import hashlib
import json
import os
import pickle
import re
import shutil
import sys
import zipfile
from collections.abc import Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import prepare
from cli import Parser, fail
from model import MoR, MoRConfig
from prepare import load_tokenizer, tokenizer_file

# ----------------------------------------------------------------------------------------------------------------------
# checkpoints of train.py


DAMAGE = (OSError, ValueError)  # what read_checkpoint raises
DIGEST = hashlib.sha256().digest_size


def read_checkpoint(path: Path) -> dict:
    """Returns a checkpoint whose every byte is as it was written. Raises one of DAMAGE otherwise.

    Its tensors stay in the file until they are used: whoever wants the weights does not pay for the optimizer."""
    data = np.memmap(path, np.uint8, "r")
    if hashlib.sha256(data[:-DIGEST]).digest() != data[-DIGEST:].tobytes():
        raise ValueError("its checksum does not match, so it is damaged, or no checkpoint of train.py")
    return torch.load(path, map_location="cpu", weights_only=True, mmap=True)


def step_of(path: Path) -> int:
    """Returns the step in the name of a checkpoint, -1 for a file that this program did not name."""
    return int(path.stem[5:]) if re.fullmatch(r"ckpt_\d+", path.stem) else -1


def checkpoints(out: Path) -> list[Path]:
    """Returns the checkpoints in a run directory, the oldest first."""
    return sorted((path for path in out.glob("ckpt_*.pt") if step_of(path) >= 0), key=step_of)


def load_run(path: str | Path, device: str = "cpu", dtype: torch.dtype | None = None) -> tuple[MoR, dict, dict]:
    """Returns (model in eval mode, meta.json of its data, the checkpoint) of a run directory or a checkpoint file.

    In a directory the newest checkpoint that can be read counts. What is wrong ends the program in one line."""
    path = Path(path)
    files = checkpoints(path)[::-1] if path.is_dir() else [path]
    if not path.exists() or not files:
        fail(f"{path} holds no checkpoint: give a run directory of train.py, or a ckpt_*.pt file")

    # one that cannot be read leaves those before it
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

    # a whole file with something else in it than it says
    shapes = {name: w.shape for name, w in weights.items()}
    own = {name: w.shape for name, w in model.state_dict().items()}
    if shapes != own:
        wrong = sorted(k for k in shapes.keys() | own.keys() if shapes.get(k) != own.get(k))
        fail(f"{file}: the weights do not fit the configuration in it ({', '.join(wrong[:3])} ...): it was altered")
    if bad := [name for name, w in weights.items() if not is_finite(w)]:
        fail(f"{file}: weights are not finite ({', '.join(bad[:3])} ...): take an earlier checkpoint")
    if config["data"]["vocab_size"] > model.config.vocab_size:
        fail(f"{file}: its data has {config['data']['vocab_size']} token ids, the model {model.config.vocab_size}")
    model.load_state_dict(weights)
    return model.to(device=device, dtype=dtype).eval(), config["data"], checkpoint


def is_finite(w: Tensor) -> bool:
    """Returns whether a tensor has no NaN and no infinity, without a copy of it."""
    return w.numel() == 0 or all(bound.isfinite() for bound in w.aminmax())


def holds_run(path: Path) -> bool:
    """Returns whether load_run, and not from_pretrained, is to read a path, or to say what is wrong with it."""
    if path.is_dir():
        weights = any(path.glob("*.safetensors")) or any(path.glob("pytorch_model*")) or any(path.glob("*.index.json"))
        return any(path.glob("ckpt_*.pt")) or not weights
    hub_name = not path.exists() and not path.is_absolute() and len(path.parts) == 2 and path.suffix != ".pt"
    return not hub_name and path.suffix not in (".safetensors", ".bin", ".json")


def open_model(path: str | Path, device: str = "cpu", dtype: torch.dtype | None = None) -> tuple[MoR, Any, dict]:
    """Returns (model in eval mode, its tokenizer, config) of anything that holds a model: a run directory, a ckpt_*.pt
    file, what `export` wrote, a Hugging Face Llama, the authors' directory. What is wrong ends the program in one line.

    The tokenizer, a tiktoken encoding, is None for a directory of weights that has none. config is that of the run
    (dictionaries "model", "train" and "data"); without a run "train" is empty, and "data" has the tokenizer's name,
    vocab_size, eot and eos, the token that ends an answer (not a document, for a chat model), or is empty too."""
    path = Path(path)
    if holds_run(path):
        model, _, checkpoint = load_run(path, device, dtype)
        return model, run_tokenizer(path, checkpoint), checkpoint["config"]

    # a directory of weights has no run: what can be said of data comes from its tokenizer and its config.json
    try:
        model = from_pretrained(path)
    except ValueError as e:
        fail(str(e)[:400])
    enc = load_tokenizer(path) if tokenizer_file(path) else None
    data = {}
    if enc is not None:
        eos = prepare.read_json(path / "config.json").get("eos_token_id")
        data = dict(tokenizer=enc.name, vocab_size=enc.n_vocab, eot=enc.eot_token)
        data["eos"] = eos if isinstance(eos, int) else enc.eot_token
    if data and enc.n_vocab > model.config.vocab_size:
        fail(f"{path}: its tokenizer has {enc.n_vocab} tokens, the model {model.config.vocab_size}: one is not its own")
    config = dict(model=model.config.asdict(), train={}, data=data)
    return model.to(device=device, dtype=dtype).eval(), enc, config


def run_tokenizer(path: str | Path, checkpoint: dict):
    """Returns the tokenizer of a run: by name, or its rank file beside the checkpoint or in the data directory."""
    meta = checkpoint["config"]["data"]
    name = meta["tokenizer"]
    home = find_home(path)
    if name.endswith(".tiktoken"):
        places = [home / name, Path(checkpoint["config"]["train"]["data"], name)]
        name = next((p for p in places if p.exists()), None)
        if name is None:
            fail(f"tokenizer {meta['tokenizer']} is neither in {home} nor in {places[1].parent}: copy it to {home}")
    enc = load_tokenizer(name)
    if enc.n_vocab != meta["vocab_size"] or enc.eot_token != meta["eot"]:
        fail(f"tokenizer {name} has {enc.n_vocab} tokens, the checkpoint was trained with {meta['vocab_size']}")
    return enc


def find_home(run: str | Path) -> Path:
    """Returns the directory that a run, or a checkpoint in it, is in."""
    return Path(run) if Path(run).is_dir() else Path(run).parent


def read_metrics(out: Path) -> list[dict]:
    """Returns the rows of a run's metrics.jsonl, without a line that a kill has torn."""
    path = out / "metrics.jsonl"
    rows = []
    for line in path.read_text().splitlines() if path.exists() else []:
        with suppress(json.JSONDecodeError):
            rows.append(json.loads(line))
    return rows


def write_state(f, state: dict) -> None:
    """Writes what torch.save makes, and behind it the digest of that, which torch.load does not mind.

    The checksums inside the file would not do: torch.load ignores them, and damage to its directory goes past them."""
    torch.save(state, f)
    f.flush()
    f.write(hashlib.sha256(np.memmap(f.name, np.uint8, "r")).digest())


@contextmanager
def written_at_once(path: Path):
    """Yields a binary file to write, which takes the place of `path` once all of it is on the disk."""
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


# What a config.json that leaves a key out means: the defaults of transformers' LlamaConfig.
LLAMA = dict(
    vocab_size=32000,
    hidden_size=4096,
    intermediate_size=11008,
    num_hidden_layers=32,
    num_attention_heads=32,
    max_position_embeddings=2048,
    rms_norm_eps=1e-6,
    hidden_act="silu",
)
FIXED = "vocab_size n_head n_kv_head d_model d_ff rope_theta norm_eps tie_embeddings".split()  # by the weights


def weight_files(path: Path) -> list[Path]:
    """Returns the files of weights in a directory: one or several, with an index or without. Raises ValueError."""
    for stem, suffix in (("model", "safetensors"), ("pytorch_model", "bin")):
        whole, index = path / f"{stem}.{suffix}", path / f"{stem}.{suffix}.index.json"
        shards = sorted(path.glob(f"{stem}-*-of-*.{suffix}"))
        if index.exists():
            try:
                names = set(json.loads(index.read_text())["weight_map"].values())
            except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
                raise ValueError(f"{index} is no index of weights ({type(e).__name__}: {e})") from e
            absent = sorted(name for name in names if not (path / name).exists())
            if absent:
                raise ValueError(f"{path} lacks {', '.join(absent[:3])}, which {index.name} names: fetch it again")
            return [path / name for name in sorted(names)]
        if whole.exists():
            return [whole]
        if shards:
            count = int(re.search(r"-of-(\d+)", shards[0].name)[1])
            if len(shards) != count:
                raise ValueError(f"{path} has {len(shards)} of {count} files {stem}-*.{suffix}: fetch the others")
            return shards
    raise ValueError(f"{path} holds no weights: a model.safetensors or pytorch_model.bin is expected in it")


def read_weights(path: Path) -> dict[str, Tensor]:
    """Returns the tensors of a directory, under the names that transformers gives them. Raises ValueError for whatever
    is damaged, quantized, or an adapter. The tensors stay in their files, by mmap, until they are used."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    weights = {}
    damage = (OSError, ValueError, TypeError, RuntimeError, EOFError, pickle.UnpicklingError, SafetensorError)
    for file in weight_files(path):
        try:
            if file.suffix == ".safetensors":
                weights |= load_file(file)
            else:
                mapped = zipfile.is_zipfile(file)  # torch before 1.6 wrote what cannot be
                weights |= torch.load(file, map_location="cpu", weights_only=True, mmap=mapped)
        except damage as e:
            reason = " ".join(str(e).split()).split(". ")[0][:150]
            raise ValueError(f"{file} cannot be read ({type(e).__name__}: {reason}): fetch it again") from e

    # names that DDP, torch.compile or a model without its head leave behind
    for prefix in ("module.", "_orig_mod."):
        if all(name.startswith(prefix) for name in weights):
            weights = {name.removeprefix(prefix): w for name, w in weights.items()}
    if "embed_tokens.weight" in weights:
        weights = {name if name.startswith("lm_head") else f"model.{name}": w for name, w in weights.items()}

    # a rotary table is a constant that old checkpoints carry
    weights = {name: w for name, w in weights.items() if not name.endswith("rotary_emb.inv_freq")}
    others = [name for name, w in weights.items() if not isinstance(w, Tensor)]
    if others:
        raise ValueError(f"{path} holds {', '.join(others[:3])} beside or instead of tensors: save model.state_dict()")
    if any("lora_" in name for name in weights):
        raise ValueError(f"{path} is a LoRA adapter, not a model: merge it into its base model and save that")
    integers = [f"{name} ({w.dtype})" for name, w in weights.items() if not w.is_floating_point()]
    if integers:
        raise ValueError(f"{path} is quantized: {', '.join(integers[:3])} ...: give the weights in bf16 or fp32")
    return weights


def read_config(path: Path) -> tuple[dict, bool]:
    """Returns (fields of MoRConfig, whether `export` wrote them rather than transformers) of a directory's config.json.
    Raises ValueError."""
    file = path / "config.json"
    if path.is_file():
        raise ValueError(f"{path} is a file: name the directory that has it and its config.json")
    if not path.exists() and len(path.parts) == 2 and not path.is_absolute():
        fetch = f"hf download {path} --local-dir {path.name}"
        raise ValueError(f"{path} does not exist here; if it is a name on the hub: {fetch}, and name that directory")
    try:
        c = LLAMA | json.loads(file.read_text())
        if c.get("model_type") == "nanomor":
            return c["model"], True
        width = c["hidden_size"] // c["num_attention_heads"]
        rope = c.get("rope_parameters") or c.get("rope_scaling") or {}
        settings = dict(
            vocab_size=c["vocab_size"],
            block_size=c["max_position_embeddings"],
            n_layer=c["num_hidden_layers"],
            n_head=c["num_attention_heads"],
            n_kv_head=c.get("num_key_value_heads") or c["num_attention_heads"],
            d_model=c["hidden_size"],
            d_ff=c["intermediate_size"],
            norm_eps=c["rms_norm_eps"],
            rope_theta=rope.get("rope_theta") or c.get("rope_theta") or 1e4,
            tie_embeddings=c.get("tie_word_embeddings"),
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ZeroDivisionError) as e:
        raise ValueError(f"{file} is not a part of a Hugging Face Llama ({type(e).__name__}: {e})") from e
    needs = [  # what of a Llama's config.json this model has no switch for
        ("model_type", c.get("model_type"), "llama"),
        ("hidden_act", c["hidden_act"], "silu"),
        ("attention_bias", c.get("attention_bias") or False, False),
        ("mlp_bias", c.get("mlp_bias") or False, False),
        ("head_dim", c.get("head_dim") or width, width),
        ("rope_type", rope.get("rope_type") or rope.get("type") or "default", "default"),
    ]
    wrong = [f"{name}={value!r} must be {must!r}" for name, value, must in needs if value != must]
    if wrong:
        raise ValueError(f"{file}: {', '.join(wrong)}")
    return settings, False


def recognize_routing(weights: Mapping[str, Tensor]) -> dict:
    """Returns the fields of MoRConfig that the authors' names of a routed model's tensors tell; {} for other names."""
    patterns = {
        "expert": r"model\.layers\.(\d+)\.block\.(\d+)\.",  # a copy of the block in each recursion
        "token": r"model\.layers\.(\d+)\.block_list\.\d+\.(\d+)\.",
    }
    for router, pattern in patterns.items():
        found = [match.groups() for match in map(re.compile(pattern).match, weights) if match]
        if not found:
            continue

        # copies of the block may be left out, routers may not
        routers = [name for name in weights if ".mor_router." in name]
        if router == "expert":
            n = len({name.split(".mor_router.")[0] for name in routers})
        else:
            n = max((len(weights[name]) for name in routers if ".router.0." not in name), default=0)
        if n < 2:
            raise ValueError(f"{n} routers for a block of layers: an expert-choice or token-choice model has 2 or more")
        first = min(int(position) for position, _ in found)  # 1 where a layer of its own comes before
        layers = len({layer for _, layer in found})
        fields = dict(router=router, n_recursion=n, n_layer=n * layers + 2 * first)
        fields["sharing"] = "middle_cycle" if first else "cycle"
        fields["router_arch"] = "mlp" if any(".router.0." in name for name in routers) else "linear"
        if any(".mlp_router." in name for name in weights):
            fields["causality"] = "aux_router"
        if any(name.endswith(".router_bias") for name in weights):
            fields["balance"] = "bias"
        return fields
    return {}


def recognize_sharing(weights: Mapping[str, Tensor], n_layer: int) -> dict:
    """Returns the fields of MoRConfig of a recursive model that is stored unrolled, as a Llama whose layers repeat; {}
    if none does. What repeats most counts: all layers before all but the outermost, many recursions before few."""
    prints = []
    for i in range(n_layer):
        layer = [weights.get(f"model.layers.{i}.{name}.weight") for name in REFERENCE_LAYER]
        prints.append([None if w is None else w.flatten()[:16].tolist() for w in layer])
    for prefix, inner in (("", prints), ("middle_", prints[1:-1])):
        for n in range(len(inner), 1, -1):
            if len(inner) % n:
                continue
            orders = {
                "cycle": inner[: len(inner) // n] * n,
                "sequence": [inner[u - u % n] for u in range(len(inner))],
            }
            for name, order in orders.items():
                if order == inner:
                    return dict(n_recursion=n, sharing=prefix + name, n_layer=n_layer)
    return {}


def reference_names(model: MoR) -> dict[str, str]:
    """Names in the authors' checkpoints (plain Llama for vanilla) -> ours; tied copies have many names."""
    c, n, L = model.config, model.config.n_recursion, model.config.n_block
    names = {"model.embed_tokens.weight": "wte.weight", "model.norm.weight": "norm.weight"}
    names["lm_head.weight"] = "wte.weight" if c.tie_embeddings else "lm_head.weight"
    off = 1 if c.n_unshared else 0
    kind = "expert" if c.gated else c.router  # controls have the routers of expert choice
    layers = {}  # their prefix -> ours
    for u in range(n * L):
        r, j = divmod(u, L)
        theirs = {"none": f"{off + u}", "expert": f"{off + r}.block.{j}", "token": f"{off}.block_list.{r}.{j}"}
        layers[theirs[kind]] = f"block.{u // n if 'sequence' in c.sharing else j}"
    if c.n_unshared:
        behind = {"none": n * L, "expert": n, "token": 1}[kind]
        layers |= {"0": "first", f"{1 + behind}": "last"}
    for theirs, ours in layers.items():
        for a, b in REFERENCE_LAYER.items():
            names[f"model.layers.{theirs}.{a}.weight"] = f"{ours}.{b}.weight"
    for net in [""] if c.router_arch == "linear" else [".0", ".2"]:
        if c.router == "token":
            names[f"model.layers.{off}.mor_router.router{net}.weight"] = f"router.net{net}.weight"
        for r in range(n if c.gated else 0):
            names[f"model.layers.{off + r}.mor_router.router{net}.weight"] = f"routers.{r}.net{net}.weight"
            if c.causality == "aux_router":
                names[f"model.layers.{off + r}.mlp_router.router{net}.weight"] = f"aux_routers.{r}.net{net}.weight"
    if c.router == "token" and c.balance == "bias":
        names[f"model.layers.{off}.router_bias"] = "balance_bias"
    return names


def load_reference_state_dict(model: MoR, sd: Mapping[str, Tensor]) -> None:
    """Loads the authors' checkpoint layout, or a plain Llama's into a vanilla model. Raises the ValueError of
    match_tensors; the model is then unchanged."""
    found = match_tensors(model, sd)
    model.load_state_dict({ours: sd[theirs] for ours, theirs in found.items()})


def match_tensors(model: MoR, sd: Mapping[str, Tensor]) -> dict[str, str]:
    """Returns, for each weight of the model, which may be on the meta device, the name of a tensor in `sd` that holds
    it. Tied tensors may be there once or repeated.

    Raises one ValueError that lists all missing, surplus, wrongly shaped, disagreeing and not finite tensors."""
    names = reference_names(model)
    own = model.state_dict()
    if any(name.startswith("mor.") for name in sd):  # what transformers reads: our own names
        names = {f"mor.{name}": name for name in own}
    found = {}
    bad = []
    for theirs, tensor in sd.items():
        ours = names.get(theirs)
        if theirs.endswith("rotary_emb.inv_freq"):
            continue  # a constant that old Llama checkpoints carry
        elif not is_finite(tensor):
            bad.append(f"{theirs} is not finite")  # which is not equal to itself
        elif ours is None:
            bad.append(f"surplus tensor {theirs}")
        elif tensor.shape != own[ours].shape:
            bad.append(f"{theirs} has shape {tuple(tensor.shape)}, the model needs {tuple(own[ours].shape)}")
        elif not torch.equal(sd[found.setdefault(ours, theirs)], tensor):
            bad.append(f"{theirs} disagrees with {found[ours]}, to which it is tied")

    # a tensor that is wrong is not missing
    for ours in own.keys() - found.keys():
        theirs = [name for name, target in names.items() if target == ours]
        if not any(name in sd for name in theirs):
            bad.append(f"missing tensor {theirs[0]}")
    if bad:
        raise ValueError("; ".join(sorted(bad)))
    return found


def from_pretrained(path: str | Path, init: str = "stepwise", **overrides) -> MoR:
    """Returns the model in a directory of weights and a config.json. Its layout is known by the names of the tensors:

        a Llama of transformers    the vanilla model; or the recursive one, if its layers repeat
        the authors' checkpoints   N_r, router and sharing as names and shapes tell (not kv="share": give that)
        what `export` wrote        the model of the run

    `overrides` are MoRConfig fields. For a Llama, n_recursion > 1 makes a model to uptrain: first and last layer stay,
    routers are new, and the shared block starts from the layers between (Relaxed Recursive Transformers, arXiv
    2410.20672; paper Table 12):

        stepwise  evenly spaced layers, the outermost included   average  the mean of the layers that become one
        lower     the lowest layers                              upper    the highest

    init="reference": the file holds the authors' layout of the model that `overrides` describe. Raises ValueError
    for whatever does not fit."""
    path = Path(path)
    settings, ours = read_config(path)
    weights = read_weights(path)
    if settings.get("tie_embeddings") is None:  # not said: tied, if there is no other head
        settings["tie_embeddings"] = "lm_head.weight" not in weights

    # what the weights say besides config.json
    layout = {} if ours else recognize_routing(weights)
    reshaped = {"n_recursion", "n_layer", "sharing"} & overrides.keys()
    if not ours and not layout and not reshaped and init != "reference":
        layout = recognize_sharing(weights, settings["n_layer"])
    settings |= layout
    given = {f: overrides[f] for f in [*FIXED, *layout] if overrides.get(f, settings[f]) != settings[f]}
    if given:
        theirs = {f: settings[f] for f in given}
        raise ValueError(f"{given} must be what the weights in {path} have: {theirs}")
    config = MoRConfig.resized(settings, overrides)
    becomes_recursive = config.n_recursion > 1 and not (ours or layout or init == "reference")
    if becomes_recursive:
        with torch.device("meta"):
            model = MoR(MoRConfig(**settings))
    else:
        model = MoR(config)
    try:
        found = match_tensors(model, weights)
    except ValueError as e:
        raise ValueError(f"{path}: {e}") from e

    # loaded as they are, or made into fewer layers
    own = {name: weights[theirs] for name, theirs in found.items()}
    if becomes_recursive:
        return uptrain(own, settings["n_layer"], config, init)
    model.load_state_dict(own)
    return model


def uptrain(llama: dict[str, Tensor], n_layer: int, config: MoRConfig, init: str) -> MoR:
    """Returns a recursive model that starts from the weights of a vanilla one of n_layer layers, as from_pretrained
    says of `init`. Raises ValueError."""
    model = MoR(config)
    names = list(model.block[0].state_dict())
    layers = [{name: llama[f"block.{i}.{name}"] for name in names} for i in range(n_layer)]
    middle = layers[1:-1] if config.n_unshared else layers
    M, L, N = len(middle), config.n_block, config.n_recursion
    if M < L:
        raise ValueError(f"n_layer={config.n_layer} asks for a block of {L} layers, the Llama has {M}: lower n_layer")

    def spread(n: int) -> list[int]:  # n of the M layers, evenly
        return [round(i * (M - 1) / max(1, n - 1)) for i in range(n)]

    # which unrolled layers are layer j of the block, and which of the Llama's layers it starts from
    tied = [[u for u in range(N * L) if j == (u // N if "sequence" in config.sharing else u % L)] for j in range(L)]
    picks = {
        "stepwise": [[i] for i in spread(L)],
        "average": [[spread(N * L)[u] for u in places] for places in tied],
        "lower": [[j] for j in range(L)],
        "upper": [[M - L + j] for j in range(L)],
    }
    if init not in picks:
        raise ValueError(f"init={init!r} must be one of {', '.join(picks)}, reference")
    for layer, pick in zip(model.block, picks[init], strict=True):
        layer.load_state_dict({name: torch.stack([middle[i][name].float() for i in pick]).mean(0) for name in names})
    if config.n_unshared:
        model.first.load_state_dict(layers[0])
        model.last.load_state_dict(layers[-1])
    for name in ("wte", "norm", "lm_head"):
        if getattr(model, name) is not None:
            getattr(model, name).load_state_dict({"weight": llama[f"{name}.weight"]})
    return model


# ----------------------------------------------------------------------------------------------------------------------
# weights out


HUB_FILES = "modeling_nanomor config cache ops model generate".split()  # what transformers needs of a MoR


def export(run: str, target: Path) -> None:
    """Writes a run as a directory that transformers loads, and from_pretrained: config.json, generation_config.json,
    model.safetensors, tokenizer.json and README.md. Without router (and qk_norm) the model is an unrolled Hugging Face
    Llama. Otherwise its code lies there too, for trust_remote_code=True."""
    from safetensors.torch import save_file

    if not target.name or target.exists() and (not target.is_dir() or any(target.iterdir())):
        fail(f"{target} exists already: name a new directory")
    model, meta, checkpoint = load_run(run)
    enc = run_tokenizer(run, checkpoint)
    llama = model.config.router == "none" and not model.config.qk_norm
    config, weights = export_llama(model) if llama else export_routed(model)
    config |= dict(torch_dtype="float32", bos_token_id=meta["eot"], eos_token_id=meta["eot"])
    generation = {name: meta["eot"] for name in ("bos_token_id", "eos_token_id", "pad_token_id")}

    # all of it or nothing
    partial = target.with_name(target.name + ".partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        save_file(weights, partial / "model.safetensors", {"format": "pt"})
        (partial / "config.json").write_text(json.dumps(config, indent=1))
        (partial / "generation_config.json").write_text(json.dumps(generation, indent=1))
        known = prepare.save_tokenizer(enc, partial)
        (partial / "README.md").write_text(describe_run(run, model, checkpoint, target.name, known))
        for name in [] if llama else HUB_FILES:
            source = Path(__file__).with_name(f"{name}.py").read_text()
            (partial / f"{name}.py").write_text(make_imports_relative(source))
        partial.replace(target)
    except OSError as e:
        fail(f"{target}: cannot be written ({e.strerror})")
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    kind = "a Hugging Face Llama" if llama else "a model for transformers, with its code"
    print(f"{target}: {kind}, {model.num_params(embedding=True):,} parameters")
    if not known:
        print(f"note: transformers has nothing like its tokenizer; {enc.name}.tiktoken is for sample.py and eval.py")


def export_llama(model: MoR) -> tuple[dict, dict[str, Tensor]]:
    """Returns (config.json, weights) of a Llama of transformers; it has no tied layers, so they are repeated."""
    c, own = model.config, model.state_dict()
    names = reference_names(model)
    if c.tie_embeddings:
        del names["lm_head.weight"]
    config = dict(
        architectures=["LlamaForCausalLM"],
        model_type="llama",
        vocab_size=c.vocab_size,
        hidden_size=c.d_model,
        intermediate_size=c.d_ff,
        num_hidden_layers=c.n_layer,
        num_attention_heads=c.n_head,
        head_dim=c.head_dim,
        num_key_value_heads=c.n_kv_head,
        max_position_embeddings=c.block_size,
        rms_norm_eps=c.norm_eps,
        rope_theta=c.rope_theta,
        rope_parameters=dict(rope_type="default", rope_theta=c.rope_theta),
        hidden_act="silu",
        attention_bias=False,
        mlp_bias=False,
        tie_word_embeddings=c.tie_embeddings,
    )
    return config, {theirs: own[ours].clone() for theirs, ours in names.items()}


def export_routed(model: MoR) -> tuple[dict, dict[str, Tensor]]:
    """Returns (config.json, weights) of modeling_nanomor.py."""
    classes = dict(AutoConfig="NanoMoRConfig", AutoModelForCausalLM="NanoMoRForCausalLM")
    auto_map = {auto: f"modeling_nanomor.{name}" for auto, name in classes.items()}
    config = dict(model_type="nanomor", architectures=["NanoMoRForCausalLM"], auto_map=auto_map)
    config["model"] = model.config.asdict()
    return config, {f"mor.{name}": w for name, w in model.state_dict().items()}


def make_imports_relative(source: str) -> str:
    """Returns the source of one of HUB_FILES as a module of a package, which transformers makes of a directory."""
    source = re.sub(rf"^(\s*)from ({'|'.join(HUB_FILES)}) import", r"\1from .\2 import", source, flags=re.M)
    absent = r'\1raise ImportError("this needs checkpoint.py, which is not exported")'
    return re.sub(r"^( +)from checkpoint import .*$", absent, source, flags=re.M)


def describe_run(run: str, model: MoR, checkpoint: dict, name: str, known: bool) -> str:
    """Returns README.md, the model card of an exported run, with the figures of its last evaluation.

    known: whether transformers has the tokenizer."""
    c, data = model.config, checkpoint["config"]["data"]
    step = checkpoint.get("step", 0)
    facts = {
        "parameters": f"{model.num_params(True):,}, {model.num_params():,} of them without embedding and head",
        "layers": f"{c.n_layer} for a token of full depth",
        "recursions": f"up to {c.n_recursion} of a block of {c.n_block} layers",
        "router": c.router,
        "context": f"{c.block_size} tokens",
        "vocabulary": f"{c.vocab_size}, tokenizer {data['tokenizer']}",
        "training": f"{step} steps",
    }
    if "batch_tokens" in checkpoint["config"]["train"]:
        facts["training"] += f" of {checkpoint['config']['train']['batch_tokens']:,} tokens"
    if c.router != "none":
        facts["capacities"] = ", ".join(f"{x:.3g}" for x in c.capacities)

    # only what was measured on these very weights
    measured = {}
    for row in read_metrics(find_home(run)):
        if row.get("step") == step and row.keys() & {"val_loss", "val_topk"}:
            measured = row
    for key, routing in (("val_loss", "causal"), ("val_topk", "top-k")):
        if key in measured:
            loss = f"{measured[key]:.4f} nats per token"
            bpb = measured.get(f"{key}_bpb")
            facts[f"validation, {routing} routing"] = loss if bpb is None else f"{loss}, {bpb:.4f} bits per byte"
    if "selected" in measured:
        facts["mean depth in validation"] = f"{sum(measured['selected']):.2f} recursions"
    table = "\n".join(f"| {fact} | {value} |" for fact, value in facts.items())
    card = CARD.format(name=name, table=table)
    trust = ""
    if c.router != "none" or c.qk_norm:
        trust = ", trust_remote_code=True"
    if known:
        card += USE.format(name=name, trust=trust)
    if c.router != "none":
        card += SLACK.format(slack=c.capacity_slack)
    return card


CARD = """---
library_name: transformers
pipeline_tag: text-generation
tags: [mixture-of-recursions, nanomor]
---

# {name}

Trained by nanoMoR, an implementation of [Mixture-of-Recursions](https://arxiv.org/abs/2507.10524).

| | |
|---|---|
{table}
"""
USE = """
```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{name}"{trust})
model = AutoModelForCausalLM.from_pretrained("{name}"{trust})
prompt = tokenizer("Once", return_tensors="pt")
print(tokenizer.decode(model.generate(**prompt, max_new_tokens=50)[0]))
```
"""
SLACK = """
`generate` keeps {slack:g} times as many slots in its cache as the capacities ask for; a token that finds none goes no
deeper. `generate(..., slack=1e6)` has room for all of them. So has lm-evaluation-harness's `--model hf` with
`--gen_kwargs slack=1e6`, and only then do its tasks that generate text give the numbers of nanoMoR's eval.py.
"""


def main(argv: list[str] | None = None) -> None:
    parser = Parser(description="Writes a run in the layout of transformers.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    command = commands.add_parser("export", help="a run as a directory that transformers loads")
    command.add_argument("run", metavar="RUN", help="run directory or checkpoint")
    command.add_argument("target", type=Path, metavar="DIR", help="directory to make")
    export(**vars(parser.parse_args(argv)))


if __name__ == "__main__":
    main()
