"""What the server of `faults.py` has ready for those that it forks: imported, and loaded where that is done at first use.

It starts no thread, and takes no lock that a killed process could keep from others, such as that of tqdm's bars.
"""

import matplotlib.backends.backend_agg
import torch

import faults
import tilewright.train.command
from tilewright.tokenizer import Tokenizer

__all__ = ["faults", "matplotlib", "tilewright"]

torch.set_num_threads(1)
# The compiled code of the tokenizer.
Tokenizer({number: bytes([number]) for number in range(256)}, []).expect(1 << 40)
