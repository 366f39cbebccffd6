"""Preloaded by the fork server of `faults.py`: imports, and code that loads on first use.

It starts no threads and takes no locks that a killed child could hold, such as tqdm's lock.
"""

import matplotlib.backends.backend_agg
import torch

import faults
import tilewright.train.command
import tilewright.train.run
from tilewright.tokenizer import Tokenizer

__all__ = ["faults", "matplotlib", "tilewright"]

torch.set_num_threads(1)
# Load the compiled code of the tokenizer.
Tokenizer({number: bytes([number]) for number in range(256)}, []).expect(1 << 40)
