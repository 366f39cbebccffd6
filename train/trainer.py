"""A model, its optimizer and its data: able to take a step, to validate itself, and to hand over its whole state."""

import contextlib
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from ..model import TransformerLM
from .checkpoint.layout import read_state, read_tensors
from .config import TrainConfig
from .data.datasets import TokenDataset, validation_batches
from .data.prefetch import Prefetcher
from .data.sampling import TrainingData
from .device import prepare_allocator, resolve_device, resolve_dtype
from .distributed import IGNORED_TARGET, World
from .ema import WeightMean
from .guard import Guard
from .optimizer import Optimizer
from .parallel import compile_blocks, exchanging_gradients, forget_gathered, place, spread, whole
from .schedule import learning_rate


class TrainingLoss(nn.Module):
    """A model and its loss as one module: what is compiled."""

    def __init__(
        self, model: TransformerLM, z_loss: float = 0.0, end_of_text: int | None = None, router_loss: float = 0.0
    ) -> None:
        """Attend across documents, or, where the id of the token that ends each is given, only inside them."""
        super().__init__()
        self.model = model
        self._z_loss, self._end_of_text, self._router_loss = z_loss, end_of_text, router_loss

    def forward(self, inputs: Tensor, targets: Tensor, documents: Tensor | None = None) -> Tensor:
        """Return the summed loss in nats; inputs, targets, ids of documents (B, T).

        While training, z-loss and router loss are in it.
        """
        if documents is None and self._end_of_text is not None:
            ends = inputs == self._end_of_text
            # The token that ends a document belongs to it.
            documents = ends.cumsum(dim=1, dtype=torch.int32) - ends.int()
        z_loss, router_loss = (self._z_loss, self._router_loss) if torch.is_grad_enabled() else (0.0, 0.0)
        return self.model.loss(inputs, targets, document_ids=documents, z_loss=z_loss, router_loss=router_loss)


class Trainer:
    """A run's moving parts; `config` has no `auto` left that depends on memory (see `batch_size.fit_memory`)."""

    def __init__(
        self,
        config: TrainConfig,
        train_data: TrainingData,
        valid_data: TokenDataset,
        end_of_text: int | None = None,
        initialise: Callable[[TransformerLM], None] | None = None,
        world: World | None = None,
        resumes: bool = False,
    ) -> None:
        """Draw the first weights, unless `initialise` gives the model others; without a `world` this process is alone.

        Where the run `resumes`, weights are left to `load`. Of the processes only the first one draws or initialises.
        """
        self.config = config
        self.world = world or World(resolve_device(config.device))
        self.train_data, self.valid_data = train_data, valid_data
        self.device = self.world.device
        self.dtype = resolve_dtype(config.dtype, self.device)
        prepare_allocator(self.device)
        # Drawn on the CPU, unless the caller has another default: so every device begins with the same weights.
        torch.manual_seed(config.seed)
        draws = self.world.is_first and not resumes
        with contextlib.nullcontext() if draws else torch.device("meta"):
            self.model = TransformerLM(config.model)
        if initialise is not None:
            self.world.on_first(lambda: initialise(self.model))
        # The others wait here for the first one, and go on as if they had drawn what it has.
        torch.set_rng_state(self.world.on_first(torch.get_rng_state))
        self.model.compute_dtype = self.dtype
        assert config.activation_checkpointing != "auto"
        self.model.activation_checkpointing = config.activation_checkpointing
        bound = end_of_text if config.data.documents else None
        self.loss = TrainingLoss(self.model, config.z_loss, bound, config.router_loss)
        # From here on the parameters are where, and what, they will be.
        self._loss_sum = self._spread_and_compiled()
        self.optimizer = Optimizer(self.model, config.optimizer)
        self.ema = None if config.ema_decay is None else WeightMean(self.model, config.ema_decay)
        self.guard = Guard(self.device, config.spike_deviations)
        self.step = 0
        self._batches: Prefetcher | None = None

    def _spread_and_compiled(self) -> Callable[[Tensor, Tensor], Tensor]:
        config = self.config
        compiles = self.device.type == "cuda" if config.compile is None else config.compile
        if self.world.size > 1:
            if compiles:
                compile_blocks(self.model.layers)
            return spread(self.loss, self.model, self.world, config, self.dtype)
        place(self.loss, self.model, self.device)
        if not compiles:
            return self.loss
        # A wrapper around the module, whose parameters keep their names.
        return torch.compile(self.loss, fullgraph=True, dynamic=False, mode="reduce-overhead" if config.cuda_graphs else None)

    @property
    def micro_batch_size(self) -> int:
        """Sequences of a forward pass."""
        micro, batch_size = self.config.micro_batch_size, self.config.batch_size
        assert micro != "auto"
        assert batch_size != "auto"
        return micro or batch_size // self.world.size

    def samples(self, step: int) -> range:
        """Return the numbers of the samples of a step."""
        batch_size = self.config.batch_size
        assert batch_size != "auto"
        return range(step * batch_size, (step + 1) * batch_size)

    @property
    def batches(self) -> Prefetcher:
        """The batches of the steps to come, read ahead."""
        if self._batches is None:
            self._batches = Prefetcher(
                lambda step: self.train_data.batch(self.world.rows(self.samples(step))),
                self.step,
                self.config.steps,
                self.device,
            )
        return self._batches

    def close(self) -> None:
        """End the thread that reads ahead."""
        if self._batches is not None:
            self._batches.close()
            self._batches = None

    def backward(self, *batch: Tensor) -> Tensor:
        """Add the gradients of the processes' batches to those that are there; return their loss in nats per scored token.

        A batch is what `TrainingData.batch` gives for this process.
        """
        loss = torch.zeros((), device=self.device)
        # Divided by a process's share of the tokens of all batches, so that the size of a micro-batch changes nothing; of this,
        # the gradients are averaged over the processes.
        if self.train_data.chats:
            tokens = self._num_scored(batch[1]) / self.world.size
        else:
            tokens = self.config.tokens_per_step // self.world.size
        parts = list(zip(*(tensor.split(self.micro_batch_size) for tensor in batch), strict=True))
        for i, part in enumerate(parts, 1):
            with exchanging_gradients(self._loss_sum, last=i == len(parts)):
                micro_loss = self._loss_sum(*part) / tokens
                micro_loss.backward()
            loss += micro_loss.detach()
        return self.world.sum(loss) / self.world.size

    def _num_scored(self, targets: Tensor) -> Tensor:
        """Return how many targets of all processes are scored, at least 1; the host does not wait."""
        return self.world.sum((targets != IGNORED_TARGET).sum()).clamp(min=1)

    def train_step(self) -> dict[str, Tensor | float]:
        """Take one optimizer step; return its loss (nats per token), gradient norm and learning rate, unread."""
        config = self.config
        lr = learning_rate(config.optimizer, self.step, config.steps)
        self.optimizer.set_learning_rate(lr)
        loss = self.backward(*next(self.batches))
        grad_norm = whole(torch.nn.utils.clip_grad_norm_(self.model.parameters(), config.optimizer.max_grad_norm))
        self.optimizer.step(self.guard.judge(loss, grad_norm))
        self.optimizer.zero_grad()
        self.step += 1
        if self.ema is not None:
            self.ema.update(self.step)
        return {"loss": loss, "grad_norm": grad_norm, "lr": lr}

    def validate(self, interrupted: Callable[[], bool] = lambda: False) -> float | None:
        """Return the validation loss in nats per token; None where it was `interrupted` between two batches."""
        if self.ema is None:
            return self._validate(interrupted)
        with self.ema.in_place_of_the_weights():
            return self._validate(interrupted)

    @torch.no_grad()
    def _validate(self, interrupted: Callable[[], bool]) -> float | None:
        config, batch_size = self.config, self.micro_batch_size * self.world.size
        total, num_tokens = torch.zeros((), device=self.device), 0
        batches = validation_batches(self.valid_data, config.eval_sequences, batch_size, config.model.context_length)
        try:
            for batch in batches:
                if interrupted():
                    return None
                total += self._loss_sum(*(tensor.to(self.device) for tensor in self.world.own_rows(*batch)))
                num_tokens += int((batch[1] != IGNORED_TARGET).sum())
        finally:
            forget_gathered(self._loss_sum)
        return float(self.world.sum(total)) / max(1, num_tokens)

    def tensors(self) -> dict[str, Mapping[str, Tensor]]:
        """Return the state of the run that a checkpoint holds, by the file that each part goes to."""
        rng = {"cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            rng["cuda"] = torch.cuda.get_rng_state(self.device)
        ema = {} if self.ema is None else {"ema": self.ema.weights}
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.tensors(),
            "guard": self.guard.tensors(),
            "rng": rng,
            **ema,
        }

    def load(self, checkpoint: Path) -> None:
        """Go on from what `tensors` gave at the end of a step; however many processes had it."""
        from .checkpoint.sharded import load_into  # slow to import

        self.step = int(read_state(checkpoint)["step"])
        if self.step > 0:
            self.optimizer.allocate()
        load_into(checkpoint, {name: tensors for name, tensors in self.tensors().items() if name != "rng"})
        # Not of the device, which may be another one now.
        rng = read_tensors(checkpoint, "rng")
        torch.set_rng_state(rng["cpu"])
        if self.device.type == "cuda" and "cuda" in rng:
            torch.cuda.set_rng_state(rng["cuda"], self.device)
