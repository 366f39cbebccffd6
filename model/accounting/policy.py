"""How a step is computed, as far as its FLOPs and bytes depend on it."""

from dataclasses import dataclass
from typing import Literal

from ...errors import UserError
from ..checkpointing import Checkpointing

ITEMSIZE = {"float32": 4, "bfloat16": 2, "float16": 2}
Dtype = Literal["float32", "bfloat16", "float16"]


@dataclass(frozen=True)
class Policy:
    """How a step is computed, as far as its bytes depend on it."""

    attention: Literal["naive", "flash"] = "flash"
    """naive: scores and probabilities (B, H, T, T) written out; flash: never held (Dao 2023)."""
    ops: Literal["eager", "fused"] = "fused"
    """eager: PyTorch's elementwise ops, in float32; fused: this project's kernels."""
    projections: Literal["separate", "joined"] = "joined"
    """Whether queries, keys and values come from three products or from one, and the gate and what it gates from two or one."""
    loss: Literal["whole", "chunked"] = "chunked"
    """whole: all logits at once; chunked: those of a few rows at a time, and the gradients with them where ops are fused."""
    checkpointing: Checkpointing = "none"
    """Blocks that keep only their inputs, and run again in the backward pass (Chen et al. 2016): none, every block, or a number
    of them from the first on."""
    compute: Dtype = "bfloat16"
    """Dtype of the matrix products; where the weights have another one, each step casts them."""
    weights: Dtype = "float32"
    """Dtype of the weights and of their gradients."""
    casting: Literal["explicit", "autocast"] = "explicit"
    """Where weights are cast. explicit: by the model, whose residual stream is in the dtype of the products; autocast: by
    PyTorch, and the stream is in the dtype of the weights."""
    vocabulary: Literal["exact", "padded"] = "exact"
    """padded: embedding and head hold `padded_vocab_size` rows, as this project's model does; what that costs counts in memory
    and in hardware FLOPs, but not as parameters and not as the model's FLOPs."""
    master_weights: bool = False
    """Whether the optimizer holds a float32 copy of the weights, for weights in half precision."""
    moments: Dtype = "float32"
    """Dtype of AdamW's two moments."""
    window: int | None = None
    """Keys that a query sees in every layer, its own and those before it; None: as many as the model's layers let it see."""
    logit_chunk_bytes: int = 512 * 2**20
    """Bytes of logits that a chunked loss holds at once."""

    def __post_init__(self) -> None:
        for field in ("compute", "weights", "moments"):
            if getattr(self, field) not in ITEMSIZE:
                raise UserError(f"{field} is {getattr(self, field)!r}: choose one of {', '.join(ITEMSIZE)}")
        choices = {"attention": "naive flash", "ops": "eager fused", "projections": "separate joined", "loss": "whole chunked",
                   "casting": "explicit autocast", "vocabulary": "exact padded"}  # fmt: skip
        for field, allowed in choices.items():
            if getattr(self, field) not in allowed.split():
                raise UserError(f"{field} is {getattr(self, field)!r}: choose {allowed.replace(' ', ' or ')}")
        number = self.checkpointing
        if number not in ("none", "block") and not (type(number) is int and number >= 0):
            raise UserError(f"checkpointing is {number!r}: choose none, block or a number of blocks")
        if self.window is not None and self.window < 1:
            raise UserError(f"window is {self.window}: it must be at least 1")


HANDOUT = Policy("naive", "eager", "separate", "whole", compute="float32", casting="autocast")
"""The CS336 model as its handout has one write it, in float32."""


def stream_itemsize(policy: Policy) -> int:
    """Return the bytes of an element of the residual stream."""
    return ITEMSIZE[policy.compute if policy.casting == "explicit" else policy.weights]
