"""Print the cycles of the attention main loops on sm_90 by the static model; `loop_cycles.json` holds the last output."""

import json

import torch
import triton

from tilewright.bench.static_model import analyse
from tilewright.kernels.attention.choice import FORMS, use_attention_kernel
from tilewright.kernels.inspect import launches
from tilewright.kernels.op import ALL


def main() -> None:
    found = {}
    for head_dim in (64, 128):
        sizes = {"batch": 1, "num_heads": 16, "num_kv_heads": 16, "num_queries": 16384, "num_keys": 16384, "head_dim": head_dim}
        for form in FORMS:
            with use_attention_kernel(form):
                cases = list(launches(ALL["attention"], {**sizes, "dtype": torch.bfloat16}, "sm_90"))
            for case in cases:
                loops = analyse(case)
                if loops.full is None or loops.masked is None:
                    continue
                # Cycles of multiplying, of an unmasked tile, and of a masked tile.
                cycles = [loops.full.tensor, loops.full.cycles, loops.masked.cycles]
                found[f"{case.kernel.__name__} K{head_dim}"] = [round(x) for x in cycles]
    lines = ",\n".join(f"  {json.dumps(name)}: {found[name]}" for name in sorted(found))
    print(f'{{\n "triton": "{triton.__version__}",\n "cycles": {{\n{lines}\n }}\n}}')


if __name__ == "__main__":
    main()
