"""Write the window in plain torch."""

from __future__ import annotations

import torch

from vllm_sparsekv.format.layout import SparseFormat
from vllm_sparsekv.format.window import to_int8


def write_window(
    key: torch.Tensor,
    value: torch.Tensor,
    window: torch.Tensor,
    query_start_loc: torch.Tensor,
    seq_lens: torch.Tensor,
    slot_mapping: torch.Tensor,
    window_block_table: torch.Tensor,
    fmt: SparseFormat,
) -> None:
    """Copy each request's newest tokens of this step into its ring, in place.

    Must run after the step's attention: a prompt chunk of a whole ring or more would otherwise
    wipe the window its own first queries read.

    Args:
        key: (num_tokens, num_kv_heads, D) model dtype, after RoPE.
        value: (num_tokens, num_kv_heads, D) model dtype.
        window: (num_blocks, num_kv_heads, r, slot elements) of the format's window dtype.
        query_start_loc: (num_reqs + 1,) int32, first token of each request.
        seq_lens: (num_reqs,) int32, tokens of each request including this step's.
        slot_mapping: (num_slots,) int64 of the sparse pages; negative tokens are not written.
        window_block_table: (num_reqs, m) int32, ring blocks; block 0 is vLLM's null block and is
            not written.
        fmt: the cache format.
    """
    num_reqs, blocks_per_ring = window_block_table.shape
    slots_per_block = window.shape[2]
    ring = blocks_per_ring * slots_per_block
    num_tokens = min(int(query_start_loc[num_reqs]), slot_mapping.shape[0])
    token = torch.arange(num_tokens, device=key.device)
    request = torch.searchsorted(query_start_loc[1:].long(), token, right=True)
    position = seq_lens[request] - query_start_loc[request + 1] + token
    slot = position % ring
    block = window_block_table[request, slot // slots_per_block]
    newest = position >= seq_lens[request] - ring
    written = (newest & (slot_mapping[:num_tokens] >= 0) & (block > 0)).nonzero().squeeze(-1)

    block, slot = block[written].long(), slot[written] % slots_per_block
    slots = fmt.slots(window)
    for x, stored, steps in (
        (key, slots.key, slots.key_step),
        (value, slots.value, slots.value_step),
    ):
        if steps is None:
            stored[block, :, slot] = x[written]
        else:
            stored[block, :, slot], steps[block, :, slot] = to_int8(x[written])
    slots.tag[block, :, slot] = (position[written] + 1).int().unsqueeze(-1)
