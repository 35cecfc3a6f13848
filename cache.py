"""The static K/V cache of a model: what is kept, where it is written, and what a decoded token reads of it.

Shapes: B rows of a pass, T time, K tokens of a compaction, G key/value heads, E width of a head, C slots.
"""

import copy
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from config import MoRConfig


class KVCache:
    """Static K/V buffers for `batch` rows of up to max_len tokens.

    First and last layer keep every token. A layer of the block keeps, one after the other in a row, C_r slots for each
    recursion r: the tokens that ran it (paper Section 2.2.2). With kv="share" there is one group of max_len slots.
    Whatever a step changes is a tensor that is changed in place, so that a compiled step can be replayed. The knobs of
    routing live here too, so that prefill and decode cannot disagree about them.
    """

    def __init__(self, model: Any, batch: int, max_len: int, slack: float, threshold: float, max_depth: int):
        c, device, dtype = model.config, model.wte.weight.device, model.wte.weight.dtype
        self.batch = batch
        self.max_len = max_len
        self.slack = slack
        self.threshold = threshold
        self.max_depth = max_depth
        self.slots = cache_slots(c, max_len, slack)
        ends = list(accumulate(self.slots))
        self.start = [0, *ends[:-1]]  # where recursion r's slots begin in a row

        lengths = [ends[-1]] * c.n_block
        if c.n_unshared:
            lengths = [max_len, *lengths, max_len]
        self.k, self.v = [], []
        for n in lengths:
            shape = batch, n, c.n_kv_head, c.head_dim
            self.k.append(torch.zeros(shape, device=device, dtype=dtype))
            self.v.append(torch.zeros(shape, device=device, dtype=dtype))

        self.row: Any = slice(None)  # the rows that a pass works on: all, or [B, 1] after `rows`
        self.every_row = torch.arange(batch, device=device)[:, None]
        counts = dict(dtype=torch.long, device=device)
        self.position = torch.zeros(batch, **counts)  # tokens seen
        self.fill = torch.zeros(len(self.slots), batch, **counts)  # slots used; not with kv="share"
        self.overflow = torch.zeros(batch, **counts)  # tokens that stopped for want of a slot
        self.depth = torch.zeros(batch, max_len, **counts)  # recursions of the prompt's tokens
        self.short = torch.zeros((), dtype=torch.bool, device=device)  # a tight prefill had too few slots
        self.slots_at = torch.tensor(self.slots, device=device)  # to be looked up by a recursion per row
        self.start_at = torch.tensor(self.start, device=device)

    def rows(self, row: Tensor) -> "KVCache":
        """Returns the same memory for passes over some of the rows, int64 [B]."""
        some = copy.copy(self)
        some.row = some.every_row = row[:, None]
        return some

    def used(self, r: Any) -> Tensor:
        """Returns the slots [B, 1] that each row has filled of recursion r, int or [B, 1]."""
        return self.fill[r, self.row].view(-1, 1)

    def count(self, counter: Tensor, at: Any, tokens: Tensor) -> None:
        """Adds the number of `tokens` (bool [B, T]) of each row to its counter, which is counter[at]."""
        before = counter[at]
        counter[at] = before + tokens.sum(1).view_as(before)

    def write_prompt(self, layer: int, start: int, k: Tensor, v: Tensor) -> None:
        """Writes a fresh row: token i of the compacted prompt takes slot i. What is beyond `fill` is never read."""
        self.k[layer][:, start : start + k.size(1)] = k
        self.v[layer][:, start : start + v.size(1)] = v

    def write_token(self, layer: int, r: Any, slot: Tensor, live: Tensor, k: Tensor, v: Tensor) -> None:
        """Writes k and v [B, 1, G, E] to a slot [B, 1] of recursion r, in rows that are live [B, 1]."""
        # the remainder keeps a row that is full, and so writes nothing, inside its window
        if r is None:
            slot = slot % self.max_len
        else:
            slot = self.start_at[r] + slot % self.slots_at[r]
        at = self.every_row, slot
        live = live[..., None, None]
        for buffer, new in ((self.k[layer], k), (self.v[layer], v)):
            buffer[at] = torch.where(live, new, buffer[at])

    def window(self, layer: int, r: Any) -> tuple[Tensor, Tensor, Tensor | None]:
        """Returns (k, v, index): what tokens at recursion r, int or [B, 1], read; None: of a layer with every token.

        k and v are each row's window [B, C, G, E], and the index None; or after `rows` all windows that there are
        [*, C, G, E], which overlap, and the index int64 [B] says which are the rows'. Nothing is copied: they are views
        of the buffers, and attention to them costs no more by index where the compiler fuses the two."""
        start, slots = 0, self.max_len
        if isinstance(r, int):
            start, slots = self.start[r], self.slots[r]
        elif r is not None:
            start, slots = self.start_at[r], self.longest_window
        k, v = self.k[layer], self.v[layer]
        if isinstance(self.row, slice):
            end = start + slots
            return k[:, start:end], v[:, start:end], None

        # Nothing checks the index, so it must lie inside: engine.py asserts that it does, for every row and recursion.
        rows, n, G, E = k.shape
        index = self.row * n + start
        shape = rows * n - slots + 1, slots, G, E
        stride = G * E, G * E, E, 1
        return k.as_strided(shape, stride), v.as_strided(shape, stride), index[:, 0]

    @property
    def longest_window(self) -> int:
        """Slots of a window where each row is at a recursion of its own, which is never recursion 0. That of a late
        recursion reaches into the row behind it, beyond `length`."""
        return max(self.slots[1:])

    @property
    def nbytes(self) -> int:
        """Bytes of the key and value buffers."""
        return sum(t.nbytes for t in (*self.k, *self.v))


def cache_slots(config: MoRConfig, max_len: int, slack: float) -> list[int]:
    """Returns C_r, the K/V slots per row of each recursion that has any of its own."""
    if config.kv == "share":  # recursion 0's, with room for every token
        return [max_len]
    return [config.slots(r, max_len, slack) for r in range(config.n_recursion)]
