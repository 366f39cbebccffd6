"""How a step is computed, as far as its FLOPs and bytes depend on it."""

from dataclasses import dataclass
from typing import Literal

from ...errors import UserError
from ..checkpointing import Checkpointing

ITEMSIZE = {"float32": 4, "bfloat16": 2, "float16": 2}
Dtype = Literal["float32", "bfloat16", "float16"]
EIGHT_BITS = ("fp8", "fp8_rowwise", "fp8_delayed")
Compute = Literal["float32", "bfloat16", "float16", "fp8", "fp8_rowwise", "fp8_delayed"]


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
    compute: Compute = "bfloat16"
    """Dtype of the matrix products; where the weights have another one, each step casts them. fp8: those of the blocks in 8
    bits, with a scale for each tensor, each row (fp8_rowwise) or by the steps before (fp8_delayed), all else in bfloat16."""
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
    moments: Literal["float32", "bfloat16", "float16", "8bit"] = "float32"
    """Dtype of AdamW's two moments. 8bit: a byte each, and a float32 scale for 256 of them (Dettmers et al. 2022)."""
    window: int | None = None
    """Keys that a query sees in every layer, its own and those before it; None: as many as the model's layers let it see."""
    logit_chunk_bytes: int = 512 * 2**20
    """Bytes of logits that a chunked loss holds at once."""

    def __post_init__(self) -> None:
        for field, more in (("compute", EIGHT_BITS), ("weights", ()), ("moments", ("8bit",))):
            known = (*ITEMSIZE, *more)
            if getattr(self, field) not in known:
                raise UserError(f"{field} is {getattr(self, field)!r}: choose one of {', '.join(known)}")
        choices = {"attention": "naive flash", "ops": "eager fused", "projections": "separate joined", "loss": "whole chunked",
                   "casting": "explicit autocast", "vocabulary": "exact padded"}  # fmt: skip
        for field, allowed in choices.items():
            if getattr(self, field) not in allowed.split():
                raise UserError(f"{field} is {getattr(self, field)!r}: choose {allowed.replace(' ', ' or ')}")
        number = self.checkpointing
        if number not in ("none", "block") and not (type(number) is int and number >= 0):
            raise UserError(f"checkpointing is {number!r}: choose none, block or a number of blocks")
        for field in ("window", "logit_chunk_bytes"):
            value = getattr(self, field)
            if value is not None and value < 1:
                raise UserError(f"{field} is {value}: it must be at least 1")

    @property
    def dtype(self) -> Dtype:
        """Dtype of activations, and of the products that are not in 8 bits."""
        return "bfloat16" if self.compute in ("fp8", "fp8_rowwise", "fp8_delayed") else self.compute

    @property
    def eight_bits(self) -> bool:
        """Whether the products of the blocks are in 8 bits."""
        return self.compute in EIGHT_BITS


HANDOUT = Policy("naive", "eager", "separate", "whole", compute="float32", casting="autocast")
"""The CS336 model as its handout has one write it, in float32."""


def stream_itemsize(policy: Policy) -> int:
    """Return the bytes of an element of the residual stream."""
    return ITEMSIZE[policy.dtype if policy.casting == "explicit" else policy.weights]


def moment_bytes(policy: Policy, count: int) -> int:
    """Return the bytes of one of AdamW's moments of so many weights."""
    return count + 4 * (count // 256) if policy.moments == "8bit" else ITEMSIZE[policy.moments] * count
