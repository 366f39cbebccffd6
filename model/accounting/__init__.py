"""What a model costs: parameters, FLOPs, bytes, seconds and money, all sums over one list of operations.

`operations` makes the list; each other file sums it up for one subject. FLOPs are those of matrix products; GB is 1e9 bytes,
GiB 2^30.
"""

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
from .memory import Memory, Moment, handout_memory, largest_batch, parse_memory, training_memory
from .operation import Operation
from .operations import operations, pad_vocabulary
from .policy import HANDOUT, Policy
from .roofline import Plan, Roofline, adamw_bytes, adamw_flops, roofline, training_plan

__all__ = [
    "HANDOUT",
    "Convention",
    "Generation",
    "Memory",
    "Moment",
    "Operation",
    "Plan",
    "Policy",
    "Roofline",
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
