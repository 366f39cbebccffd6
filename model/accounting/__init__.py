"""Cost of a model in parameters, FLOPs, bytes, seconds and money: every figure is a sum over one list of operations.

`operations` builds the list; each other module sums it for one subject. FLOPs count matrix products only. GB is 1e9 bytes,
GiB is 2^30 bytes.
"""

from ..config import pad_vocabulary
from ..memory_size import parse_memory
from ..policy import HANDOUT, Policy
from .block import attended_pairs
from .conventions import Convention, conventions
from .flops import (
    forward_flops,
    forward_flops_by_group,
    hardware_flops,
    model_flops,
    model_flops_utilisation,
    num_active_parameters,
    num_parameter_tensors,
    num_parameters,
    parameters_by_group,
    training_flops_per_token,
)
from .generation import Generation, generation, kv_cache_bytes
from .memory import Memory, TimelinePoint, handout_memory, largest_batch, training_memory
from .operation import Operation
from .operations import operations
from .roofline import Plan, Roofline, adamw_bytes, adamw_flops, roofline, training_plan

__all__ = [
    "HANDOUT",
    "Convention",
    "Generation",
    "Memory",
    "Operation",
    "Plan",
    "Policy",
    "Roofline",
    "TimelinePoint",
    "adamw_bytes",
    "adamw_flops",
    "attended_pairs",
    "conventions",
    "forward_flops",
    "forward_flops_by_group",
    "generation",
    "handout_memory",
    "hardware_flops",
    "kv_cache_bytes",
    "largest_batch",
    "model_flops",
    "model_flops_utilisation",
    "num_active_parameters",
    "num_parameter_tensors",
    "num_parameters",
    "operations",
    "pad_vocabulary",
    "parameters_by_group",
    "parse_memory",
    "roofline",
    "training_flops_per_token",
    "training_memory",
    "training_plan",
]
