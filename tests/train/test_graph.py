import pytest
import torch

from tilewright.train.data.sampling import TrainingData
from tilewright.train.data.token_file import TokenDataset, write_tokens
from tilewright.train.graph import EAGER_STEPS
from tilewright.train.trainer import Trainer


@pytest.mark.gpu
@pytest.mark.parametrize("micro_batch_size", [None, 2])
def test_steps_as_a_graph_are_those_without(changed, tmp_path, micro_batch_size):
    write_tokens(tmp_path / "a.tokens", [torch.randint(300, (4096,)).numpy()], 300)
    data = TokenDataset(tmp_path / "a.tokens")
    results = []
    for cuda_graphs in (False, True):
        config = changed(device="cuda", compile=False, cuda_graphs=cuda_graphs, micro_batch_size=micro_batch_size)
        trainer = Trainer(config, TrainingData((data,), 16, 0), data)
        metrics = [trainer.train_step() for _ in range(EAGER_STEPS + 1)]
        # The next replay overwrites the results of a step.
        losses = [metrics[-1]["loss"].clone(), *(trainer.train_step()["loss"].clone() for _ in range(3))]
        results.append((losses, dict(trainer.model.named_parameters())))
        trainer.close()
    torch.testing.assert_close(*results)
