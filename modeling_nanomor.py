"""A MoR as transformers knows models. checkpoint.py copies this file, and what it imports, into what it exports:

    model = AutoModelForCausalLM.from_pretrained("exported/demo", trust_remote_code=True)
    model(ids, attention_mask=mask, labels=ids).loss
    model.generate(ids, attention_mask=mask, max_new_tokens=50)

The model is model.MoR, unchanged. Here are names, padding, and the static cache behind `generate`.
"""

import torch
from torch import Tensor
from transformers import GenerationConfig, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils.generic import can_return_tuple

from cache import KVCache
from config import PRESETS, MoRConfig
from generate import bucket
from model import MoR, rope_table
from ops import compact, take

# what transformers and the tools around it call fields of MoRConfig
STANDARD_NAMES = dict(
    hidden_size="d_model",
    intermediate_size="d_ff",
    num_hidden_layers="n_layer",
    num_attention_heads="n_head",
    num_key_value_heads="n_kv_head",
    head_dim="head_dim",
    max_position_embeddings="block_size",
)


class NanoMoRConfig(PreTrainedConfig):
    """The fields of MoRConfig, a dictionary `model`, in a config.json. Raises ValueError as MoRConfig does."""

    model_type = "nanomor"

    def __init__(self, model: dict | None = None, **options):
        config = MoRConfig(**(model or PRESETS["nano"]))
        self.model = config.asdict()
        for name, ours in STANDARD_NAMES.items():
            setattr(self, name, getattr(config, ours))
            options.pop(name, None)
        options.pop("vocab_size", None)
        options["tie_word_embeddings"] = config.tie_embeddings
        super().__init__(**options)

    @property
    def vocab_size(self) -> int:
        return self.model["vocab_size"]

    @vocab_size.setter
    def vocab_size(self, size: int) -> None:  # by resize_token_embeddings
        self.model["vocab_size"] = size


class MoRCache:
    """A static cache, and what `GenerationMixin` asks of one. It can neither be reordered nor cut."""

    is_compileable = False  # by transformers, which compiles the whole forward

    def __init__(self, static: KVCache):
        self.static = static
        self.length = 0  # columns seen, padding included

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.length


class NanoMoRForCausalLM(PreTrainedModel, GenerationMixin):
    """model.MoR with the arguments and outputs of a causal language model of transformers."""

    config_class = NanoMoRConfig
    base_model_prefix = "mor"
    accepts_loss_kwargs = False  # the loss is the mean over this batch, which Trainer is to scale
    _supports_sdpa = True
    _is_stateful = True  # no tokens can be taken back: transformers then refuses assisted decoding
    _no_split_modules = ["Layer"]

    def __init__(self, config: NanoMoRConfig):
        super().__init__(config)
        self.mor = MoR(MoRConfig(**config.model))
        self.post_init()

    def _init_weights(self, module: torch.nn.Module) -> None:
        """Fills the tables that no file holds, and what weights a file lacks."""
        super()._init_weights(module)
        if isinstance(module, MoR):
            device = module.wte.weight.device
            module.rope = rope_table(module.config, device)
            module.takes_all = torch.tensor(module.config.takes_all, device=device)
            if module.config.router == "token" and module.config.balance == "bias":
                torch.nn.init.zeros_(module.balance_bias)

    def get_input_embeddings(self) -> torch.nn.Embedding:
        return self.mor.wte

    def set_input_embeddings(self, value: torch.nn.Embedding) -> None:
        self.mor.wte = value
        self.mor.config.vocab_size = value.num_embeddings

    def get_output_embeddings(self) -> torch.nn.Linear | None:
        return self.mor.lm_head  # None where the embedding is the head

    def set_output_embeddings(self, value: torch.nn.Linear) -> None:
        self.mor.lm_head = value

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: MoRCache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        threshold: float = 0.5,
        max_depth: int | None = None,
    ) -> CausalLMOutputWithPast:
        """Runs input_ids int64 [B, T] -> logits fp32 [B, T, V], causal in eval mode, and by top-k in training.

        attention_mask   [B, T], padding on either side; [B, past + T] with a cache
        labels           int64 [B, T], shifted here; -100 is ignored. The loss includes the router losses in training
        past_key_values  an empty MoRCache is filled; else the tokens are appended to it, one after the other
        use_cache        True without past_key_values: makes one for the whole context
        logits_to_keep   logits of the last so many tokens (0: all), or at these positions
        threshold, max_depth  the knobs of causal routing

        output_hidden_states gives the one normed stream [B, T, D] that the head reads. Raises ValueError."""
        if attention_mask is not None and attention_mask.dim() != 2:
            raise ValueError(
                f"attention_mask {tuple(attention_mask.shape)} must be [B, T]: causality is the model's own"
            )

        # a cache that holds something goes on
        if past_key_values is not None and past_key_values.length > 0:
            if labels is not None:
                raise ValueError("labels need the whole sequence: leave past_key_values out")
            logits = self.append(input_ids, attention_mask, past_key_values)
            return CausalLMOutputWithPast(logits=logits, past_key_values=past_key_values)

        # an empty one is filled, which gives the last logits only: enough for `generate`
        if past_key_values is None and use_cache:
            static = self.mor.make_cache(len(input_ids), self.mor.config.block_size, None, threshold, max_depth)
            past_key_values = MoRCache(static)
        if past_key_values is not None:
            last = self.fill(input_ids, attention_mask, past_key_values)
            if labels is None and isinstance(logits_to_keep, int) and logits_to_keep == 1:
                return CausalLMOutputWithPast(logits=last[:, None], past_key_values=past_key_values)

        # the whole sequence at once
        out = self.mor(
            input_ids,
            labels=labels,
            valid=attention_mask,
            threshold=threshold,
            max_depth=max_depth,
            return_logits=True,
            return_hidden=bool(output_hidden_states),
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        return CausalLMOutputWithPast(
            loss=out.loss,
            logits=out.logits[:, kept],
            past_key_values=past_key_values,
            hidden_states=(out.hidden,) if output_hidden_states else None,
        )

    # ---- cached inference

    def fill(self, ids: Tensor, mask: Tensor | None, past: MoRCache) -> Tensor:
        """Starts an empty cache with prompts [B, P], padded on either side -> logits fp32 [B, V] of the last."""
        lengths = torch.full(ids.shape[:1], ids.size(1), device=ids.device)
        past.length = ids.size(1)
        if mask is not None:
            lengths = mask.long().sum(1)
            if (lengths == 0).any():
                raise ValueError(
                    f"attention_mask leaves rows without any token: {(lengths == 0).nonzero()[:, 0].tolist()}"
                )
            index, _ = compact(mask.bool(), ids.size(1))
            ids = take(ids, index, 0)  # every row begins with its first token
        return self.mor.prefill(ids, lengths, past.static)

    def append(self, ids: Tensor, mask: Tensor | None, past: MoRCache) -> Tensor:
        """Appends tokens [B, n] to a cache, but padding -> logits fp32 [B, n, V], which mean nothing at padding."""
        past.length += ids.size(1)
        if past.length > past.static.max_len:
            raise ValueError(f"{past.length} tokens do not fit a cache of {past.static.max_len}: begin with a new one")
        if mask is not None:
            new = mask[:, -ids.size(1) :].bool()
            ids = torch.where(new, ids, -1)  # an idle row
        logits = [self.mor.decode(token, past.static) for token in ids.unbind(1)]
        return torch.stack(logits, 1)

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        next_sequence_length: int | None = None,
        past_key_values: MoRCache | None = None,
        attention_mask: Tensor | None = None,
        logits_to_keep: int = 1,
        threshold: float = 0.5,
        max_depth: int | None = None,
        slack: float | None = None,
        **options,
    ) -> dict:
        """Returns the arguments of `forward` for the next tokens. `slack` is for the cache, which is there by then."""
        if next_sequence_length is not None:
            input_ids = input_ids[:, -next_sequence_length:]
        return dict(
            input_ids=input_ids.to(self.device),
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            logits_to_keep=logits_to_keep,
            threshold=threshold,
            max_depth=max_depth,
        )

    def _prepare_generated_length(self, *args, **kwargs) -> GenerationConfig:
        """Ends generation where the context does."""
        found = super()._prepare_generated_length(*args, **kwargs)
        found.max_length = min(found.max_length, self.mor.config.block_size)
        return found

    def _prepare_cache_for_generation(
        self, generation_config, model_kwargs, mode, batch_size, max_cache_length
    ) -> None:
        """Makes the cache that generate.generate would make: a token that finds no slot in it ends at its depth."""
        if model_kwargs.get("past_key_values") is not None or generation_config.use_cache is False:
            return
        limit = self.mor.config.block_size
        rows = batch_size * (generation_config.num_return_sequences or 1)
        max_len = bucket(min(limit, max_cache_length + 1), limit)
        knobs = {name: model_kwargs[name] for name in ("slack", "threshold", "max_depth") if name in model_kwargs}
        model_kwargs["past_key_values"] = MoRCache(self.mor.make_cache(rows, max_len, **knobs))

    def _validate_generation_mode(self, generation_mode, *args) -> None:
        if generation_mode not in ("greedy_search", "sample"):
            raise ValueError(
                f"a MoR generates by greedy search or sampling, not {generation_mode.value}: its cache cannot be"
                " reordered or cut, so use num_beams=1"
            )
        super()._validate_generation_mode(generation_mode, *args)
