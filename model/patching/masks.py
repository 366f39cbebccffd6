"""Masks that transformers passes from its mask functions to our attention: document bounds and lengths.

transformers passes a 4-dimensional mask through unchanged. Ours is int32, (B or 1, 1, rows, S): one to four numbers per key
instead of T. The number of rows defines their meaning: 1: lengths; 2: begins and ends of documents; 3: begins, ends, and 0 for
padding; 4: begins, ends, padding and lengths.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.masking_utils import causal_mask_function, prepare_padding_mask, sdpa_mask
from transformers.utils.import_utils import is_tracing

from ...kernels import Documents, documents


def make_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Any = causal_mask_function,
    attention_mask: Tensor | None = None,
    use_vmap: bool = False,
    device: Any = "cpu",
    **kwargs: Any,
) -> Tensor | None:
    """Return the mask of a causal forward pass, with or without a window; None without padding.

    `attention_mask` (B, seen tokens) is False for padding. Padding before and after the tokens of a sequence becomes separate
    documents. A mask that is not one interval per query is written out, (B, 1, T, S): padding between tokens, and mask
    functions of the caller.
    """
    written_out = {
        "batch_size": batch_size, "q_length": q_length, "kv_length": kv_length, "q_offset": q_offset, "kv_offset": kv_offset,
        "mask_function": mask_function, "attention_mask": attention_mask, "use_vmap": use_vmap, "device": device,
        "allow_is_causal_skip": False,
    }  # fmt: skip
    if use_vmap or "allow_is_bidirectional_skip" in kwargs:
        return sdpa_mask(**written_out)
    # Queries are the last keys, unless a static cache has unused slots after them.
    end = q_offset + q_length - kv_offset
    rows = []
    if attention_mask is not None:
        padded = prepare_padding_mask(attention_mask, kv_length, kv_offset)
        assert padded is not None
        tokens = padded[:, kv_offset : kv_offset + kv_length]
        begins_of_tokens = tokens[:, 0].int() + (tokens[:, 1:] & ~tokens[:, :-1]).sum(dim=1)
        is_one_run = (begins_of_tokens <= 1).all()
        if is_tracing(tokens):
            message = "attention_mask has padding between tokens: torch.compile supports padding only before and after them"
            torch._assert_async(is_one_run, message)  # pyright: ignore[reportPrivateImportUsage]
            rows = [*documents(tokens), tokens.int()]
        else:
            seen = tokens if isinstance(end, Tensor) else tokens[:, :end]
            nothing_padded, one_run = torch.stack([seen.all(), is_one_run]).tolist()
            if not one_run:
                return sdpa_mask(**written_out)
            if not nothing_padded:
                rows = [*documents(tokens), tokens.int()]
    if isinstance(end, Tensor) or end != kv_length:
        lengths = torch.as_tensor(end, dtype=torch.int32, device=device)
        rows.append(lengths.expand(batch_size, kv_length if rows else 1))
    return torch.stack(rows, dim=1)[:, None] if rows else None


def packed_mask(
    position_ids: Tensor | None, cu_seqlens: Tensor | None, past_key_values: Any, batch: int, num_tokens: int
) -> Tensor | None:
    """Return the mask of packed sequences, or None if nothing is packed.

    A sequence begins where a position (B or 1, T) is not its predecessor plus 1, or at the offsets in `cu_seqlens`.
    """
    if cu_seqlens is not None:
        found = documents(cu_seqlens=cu_seqlens, batch=batch, num_keys=num_tokens)
        return torch.stack(found, dim=1)[:, None]
    if position_ids is None or position_ids.dim() != 2 or num_tokens == 1:
        return None
    tracing = is_tracing(position_ids)
    # The positions of tokens in the cache are unknown.
    if past_key_values is not None and (tracing or past_key_values.get_seq_length() > 0):
        return None
    restarts = position_ids.diff(dim=1) != 1
    if not tracing and not restarts.any():
        return None
    ids = torch.nn.functional.pad(restarts.cumsum(dim=1), (1, 0))
    return torch.stack(documents(ids), dim=1)[:, None]


class MaskParts(NamedTuple):
    """The parts of a mask."""

    documents: Documents | None = None
    lengths: Tensor | None = None
    """(B) int32: number of keys of each sequence."""
    is_padding: Tensor | None = None
    """(B, T) bool: whether a query is padding."""


def parts_of_mask(mask: Tensor | None, batch: int, num_queries: int) -> MaskParts:
    """Split a mask of `make_mask` or `packed_mask` into its parts."""
    if mask is None:
        return MaskParts()
    rows = list(mask[:, 0].expand(batch, -1, -1).unbind(dim=1))
    lengths = rows[-1][:, 0] if len(rows) in (1, 4) else None
    if len(rows) == 1:
        return MaskParts(lengths=lengths)
    is_padding = None
    # A single query is a generated token, never padding.
    if len(rows) > 2 and num_queries > 1:
        is_padding = rows[2] == 0
        if lengths is None:
            is_padding = is_padding[:, -num_queries:]
        else:
            offsets = torch.arange(-num_queries, 0, device=mask.device)
            is_padding = is_padding.gather(1, lengths.long()[:, None] + offsets)
    return MaskParts(Documents(rows[0], rows[1]), lengths, is_padding)
