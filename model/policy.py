"""The choices of a training step that its FLOPs and bytes depend on."""

from dataclasses import dataclass
from typing import Literal

from ..errors import UserError
from .checkpointing import Checkpointing

ITEMSIZE = {"float32": 4, "bfloat16": 2, "float16": 2}
Dtype = Literal["float32", "bfloat16", "float16"]
EIGHT_BITS = ("fp8", "fp8_rowwise", "fp8_delayed")
Compute = Literal["float32", "bfloat16", "float16", "fp8", "fp8_rowwise", "fp8_delayed"]


@dataclass(frozen=True)
class Policy:
    """The choices of a training step that its FLOPs and bytes depend on."""

    attention: Literal["naive", "flash"] = "flash"
    """naive: materialize scores and probabilities (B, H, T, T); flash: never materialize them (Dao 2023)."""
    ops: Literal["eager", "fused"] = "fused"
    """eager: PyTorch's elementwise ops, in float32; fused: this project's kernels."""
    projections: Literal["separate", "joined"] = "joined"
    """joined: one product for queries, keys and values, and one for gate and up; separate: one product each."""
    loss: Literal["whole", "chunked"] = "chunked"
    """whole: all logits at once; chunked: a few rows at a time. Fused ops compute the gradients along with each chunk."""
    checkpointing: Checkpointing = "none"
    """Blocks that save only their inputs and run again in the backward pass (Chen et al. 2016): none, every block, or the first
    N blocks."""
    compute: Compute = "bfloat16"
    """Dtype of the matrix products; weights of another dtype are cast in each step. fp8: 8-bit products in the blocks, with a
    scale per tensor, per row (fp8_rowwise) or from earlier steps (fp8_delayed); all other products in bfloat16."""
    weights: Dtype = "float32"
    """Dtype of the weights and their gradients."""
    casting: Literal["explicit", "autocast"] = "explicit"
    """How weights are cast. explicit: the model casts them, and the residual stream has the dtype of the products; autocast:
    PyTorch casts them, and the stream has the dtype of the weights."""
    vocabulary: Literal["exact", "padded"] = "exact"
    """padded: embedding and head hold `padded_vocab_size` rows, as this project's model does. Padding counts in memory and in
    hardware FLOPs, but not in parameters or model FLOPs."""
    master_weights: bool = False
    """Whether the optimizer keeps a float32 copy of half-precision weights."""
    moments: Literal["float32", "bfloat16", "float16", "8bit"] = "float32"
    """Dtype of AdamW's two moments. 8bit: one byte each, with a float32 scale per 256 elements (Dettmers et al. 2022)."""
    window: int | None = None
    """Keys that a query sees in every layer, including its own; None: the windows of the model."""
    logit_chunk_bytes: int = 512 * 2**20
    """Bytes of logits that a chunked loss holds at once."""

    def __post_init__(self) -> None:
        for field, more in (("compute", EIGHT_BITS), ("weights", ()), ("moments", ("8bit",))):
            allowed = (*ITEMSIZE, *more)
            if getattr(self, field) not in allowed:
                raise UserError(f"{field} is {getattr(self, field)!r}: expected one of {', '.join(allowed)}")
        choices = {"attention": "naive flash", "ops": "eager fused", "projections": "separate joined", "loss": "whole chunked",
                   "casting": "explicit autocast", "vocabulary": "exact padded"}  # fmt: skip
        for field, allowed in choices.items():
            if getattr(self, field) not in allowed.split():
                raise UserError(f"{field} is {getattr(self, field)!r}: expected {allowed.replace(' ', ' or ')}")
        number = self.checkpointing
        if number not in ("none", "block") and not (type(number) is int and number >= 0):
            raise UserError(f"checkpointing is {number!r}: expected none, block or a number of blocks")
        for field in ("window", "logit_chunk_bytes"):
            value = getattr(self, field)
            if value is not None and value < 1:
                raise UserError(f"{field} is {value}: expected at least 1")

    @property
    def dtype(self) -> Dtype:
        """Dtype of activations and of products that are not in 8 bits."""
        return "bfloat16" if self.compute in ("fp8", "fp8_rowwise", "fp8_delayed") else self.compute

    @property
    def eight_bits(self) -> bool:
        """Whether the products of the blocks run in 8 bits."""
        return self.compute in EIGHT_BITS


HANDOUT = Policy("naive", "eager", "separate", "whole", compute="float32", casting="autocast")
"""The CS336 model as its handout describes it, in float32."""


def stream_itemsize(policy: Policy) -> int:
    """Return the bytes of an element of the residual stream."""
    return ITEMSIZE[policy.dtype if policy.casting == "explicit" else policy.weights]


def moment_bytes(policy: Policy, count: int) -> int:
    """Return the bytes of one AdamW moment of `count` weights."""
    return count + 4 * (count // 256) if policy.moments == "8bit" else ITEMSIZE[policy.moments] * count
