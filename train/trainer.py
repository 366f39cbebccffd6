"""A model, its optimizer and its data: able to take a step, to validate itself, and to hand over its whole state."""

import contextlib
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path

import torch
from torch import Tensor, nn

from ..model import TransformerLM
from ..model.fp8 import use_fp8
from .checkpoint.joined import joined_parts
from .checkpoint.reader import load_into, read_state, read_tensors
from .config import TrainConfig
from .data.packing import Packing
from .data.prefetch import Prefetcher
from .data.sampling import TrainingData
from .data.token_file import TokenDataset
from .data.validation import ValidationData
from .device import prepare_allocator, resolve_device, resolve_dtype
from .distributed import IGNORED_TARGET, World
from .ema import WeightMean
from .graph import StepGraph
from .guard import Guard
from .optimizer import Optimizer
from .parallel import compile_blocks, exchanging_gradients, forget_gathered, place, spread, whole
from .schedule import batch_size, learning_rate, sequences
from .sources import Sources


class TrainingLoss(nn.Module):
    """A model and its loss as one module: what is compiled."""

    def __init__(
        self,
        model: TransformerLM,
        z_loss: float = 0.0,
        end_of_text: int | None = None,
        router_loss: float = 0.0,
        by_sequence: bool = False,
    ) -> None:
        """Attend across documents, or, where the id of the token that ends each is given, only inside them."""
        super().__init__()
        self.model = model
        self._z_loss, self._end_of_text, self._router_loss = z_loss, end_of_text, router_loss
        self._by_sequence = by_sequence

    def forward(self, inputs: Tensor, targets: Tensor, documents: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """Return the summed loss in nats; inputs, targets, ids of documents (B, T).

        While training, z-loss and router loss are in it. With `by_sequence` the losses of the sequences, (B,), follow.
        """
        if documents is None and self._end_of_text is not None:
            ends = inputs == self._end_of_text
            # The token that ends a document belongs to it.
            documents = ends.cumsum(dim=1, dtype=torch.int32) - ends.int()
        z_loss, router_loss = (self._z_loss, self._router_loss) if torch.is_grad_enabled() else (0.0, 0.0)
        options = {"document_ids": documents, "z_loss": z_loss, "router_loss": router_loss}
        return self.model.loss(inputs, targets, **options, by_sequence=self._by_sequence)


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
        sources: Sources | None = None,
    ) -> None:
        """Draw the first weights, unless `initialise` gives the model others; without a `world` this process is alone.

        Where the run `resumes`, weights are left to `load`. Of the processes only the first one draws or initialises.
        """
        self.config = config
        self.world = world or World(resolve_device(config.device))
        self.train_data, self.valid_data, self.sources = train_data, valid_data, sources
        packing = Packing(config.data.packing, end_of_text)
        self.validation = ValidationData(valid_data, config.eval_sequences, config.model.context_length, packing)
        self.device = self.world.device
        self.dtype = resolve_dtype(config.precision, self.device)
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
        if config.weights == "bfloat16":
            # The tables of RoPE stay float32.
            for parameter in self.model.parameters():
                parameter.data = parameter.data.bfloat16()
        self.model.compute_dtype = self.dtype
        assert config.activation_checkpointing != "auto"
        self.model.activation_checkpointing = config.activation_checkpointing
        bound = end_of_text if config.data.documents else None
        self._sources_apart = sources if sources is not None and sources.trains_apart else None
        by_sequence = self._sources_apart is not None
        self.loss = TrainingLoss(self.model, config.z_loss, bound, config.router_loss, by_sequence)
        # From here on the parameters are where, and what, they will be.
        self._loss_sum = self._spread_and_compiled()
        self._fp8_scales = None
        if config.precision in ("fp8", "fp8_rowwise", "fp8_delayed"):
            rows = self.micro_batch_size * config.model.context_length // self.world.layout.cp
            self._fp8_scales = use_fp8(self.model, config.precision, rows)
        self.optimizer = Optimizer(self.model, config.optimizer, config.seed)
        self.ema = self.optimizer.mean if config.ema_decay is None else WeightMean(self.model, config.ema_decay)
        self.guard = Guard(self.device, config.spike_deviations)
        self._step = StepGraph(self._update) if config.cuda_graphs else self._update
        self.step = 0
        self.targets = torch.empty(0, dtype=torch.long, device=self.device)
        """Those of the last step, (B, T) int64, on this process."""
        self._batches: Prefetcher | None = None

    def _spread_and_compiled(self) -> Callable[[Tensor, Tensor], Tensor]:
        config = self.config
        compiles = self.device.type == "cuda" if config.compile is None else config.compile
        if self.world.size > 1:
            if compiles:
                compile_blocks(self.model.layers)
            return spread(self.loss, self.model, self.world, self.dtype)
        place(self.loss, self.model, self.device)
        if not compiles:
            return self.loss
        # A wrapper around the module, whose parameters keep their names.
        return torch.compile(self.loss, fullgraph=True, dynamic=False)

    @property
    def peak(self) -> str:
        """The peak that the MFU is a share of, as `GPU.peak_flops` names it: fp8 where the blocks multiply in 8 bits."""
        if self.config.precision.startswith("fp8"):
            return "fp8"
        return "bf16" if self.dtype == torch.bfloat16 else "fp32"

    @property
    def micro_batch_size(self) -> int:
        """Sequences of a forward pass."""
        micro = self.config.micro_batch_size
        assert micro != "auto"
        return micro or self.config.smallest_batch // self.world.num_readers

    def samples(self, step: int) -> range:
        """Return the numbers of the samples of a step, which count from where the data last changed."""
        first = sequences(self.config, self.config.at(step).since("data.train"), step)
        return range(first, first + batch_size(self.config, step))

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
        return self._backward(*batch)[0]

    def _backward(self, *batch: Tensor) -> tuple[Tensor, Tensor]:
        """Return the loss as `backward` does, and that of each sequence, (B,), where sources are told apart."""
        loss, by_sequence = torch.zeros((), device=self.device), []
        # Divided by a process's share of the tokens of all batches, so that the size of a micro-batch changes nothing; of this,
        # the gradients are averaged over the replicas.
        replicas = self.world.num_replicas
        if self.train_data.packed:
            tokens = self._num_scored(batch[1]) / replicas
        else:
            sequences_of_all = len(batch[0]) * self.world.num_readers
            tokens = sequences_of_all * self.config.model.context_length // replicas
        parts = list(zip(*(tensor.split(self.micro_batch_size) for tensor in batch), strict=True))
        for i, part in enumerate(parts, 1):
            with exchanging_gradients(self._loss_sum, last=i == len(parts)):
                loss_sum, *others = self._sums(*part)
                micro_loss = loss_sum / tokens
                micro_loss.backward()
            loss += micro_loss.detach()
            by_sequence += others
        return self.world.sum(loss) / replicas, torch.cat(by_sequence) if by_sequence else loss.new_empty(0)

    def _sums(self, *batch: Tensor) -> tuple[Tensor, ...]:
        sums = self._loss_sum(*batch)
        return sums if isinstance(sums, tuple) else (sums,)

    def _num_scored(self, targets: Tensor) -> Tensor:
        """Return how many targets of all processes are scored, at least 1; the host does not wait."""
        return (self.world.sum((targets != IGNORED_TARGET).sum()) // self.world.times_read).clamp(min=1)

    def train_step(self) -> dict[str, Tensor | float]:
        """Take one optimizer step; return its loss (nats per token), gradient norm and learning rate, unread."""
        config = self.config
        lr = learning_rate(config, self.step)
        self.optimizer.set_learning_rate(lr)
        batch = next(self.batches)
        self.targets = batch[1]
        loss, grad_norm, by_sequence = self._step(*batch)
        if self._fp8_scales is not None:
            self._fp8_scales.end_step(self.world.largest)
        self.step += 1
        if self.ema is not None:
            self.ema.update(self.step)
        metrics = {"loss": loss, "grad_norm": grad_norm, "lr": lr}
        if self._sources_apart is not None:
            numbers = self.train_data.sources(self.world.rows(self.samples(self.step - 1)))
            metrics |= self._sources_apart.training_losses(by_sequence, batch[1], numbers, self.world)
        return metrics

    def _update(self, *batch: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Step on a batch; return its loss, its gradient norm, and what `_backward` gives of its sequences.

        All that changes from step to step is read on the device.
        """
        loss, by_sequence = self._backward(*batch)
        grad_norm = whole(torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.optimizer.max_grad_norm))
        self.optimizer.step(self.guard.judge(loss, grad_norm))
        self.optimizer.zero_grad()
        return loss, grad_norm, by_sequence

    def mean_of_weights(self) -> AbstractContextManager[None]:
        """Let the model compute with the mean of its weights while the context lasts, where the run keeps one."""
        return contextlib.nullcontext() if self.ema is None else self.ema.in_place_of_the_weights()

    def validate(self, interrupted: Callable[[], bool] = lambda: False) -> float | None:
        """Return the validation loss in nats per token; None where it was `interrupted` between two batches."""
        with self.mean_of_weights():
            return self._validate(self.validation, interrupted)

    def validate_sources(self, interrupted: Callable[[], bool] = lambda: False) -> dict[str, float] | None:
        """Return what is logged of the validation of each source; None where it was `interrupted`."""
        row: dict[str, float] = {}
        if self.sources is None:
            return row
        with self.mean_of_weights():
            for name, data in self.sources.valid.items():
                if (loss := self._validate(data, interrupted)) is None:
                    return None
                row |= self.sources.validation_row(name, loss)
        return row

    @torch.no_grad()
    def _validate(self, data: ValidationData, interrupted: Callable[[], bool]) -> float | None:
        total, num_tokens = torch.zeros((), device=self.device), 0
        try:
            for batch in data.batches(self.micro_batch_size * self.world.num_readers):
                if interrupted():
                    return None
                total += self._sums(*(tensor.to(self.device) for tensor in self.world.own_rows(*batch)))[0]
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
        fp8 = {} if self._fp8_scales is None else {"fp8": self._fp8_scales.tensors()}
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.tensors(),
            "guard": self.guard.tensors(),
            "rng": rng,
            **ema,
            **fp8,
        }

    def load(self, checkpoint: Path) -> None:
        """Go on from what `tensors` gave at the end of a step; however many processes had it."""
        self.step = int(read_state(checkpoint)["step"])
        if self.step > 0:
            self.optimizer.allocate()
        tensors = {name: tensors for name, tensors in self.tensors().items() if name != "rng"}
        load_into(checkpoint, tensors, joined=joined_parts(self.model))
        if self._fp8_scales is not None:
            self._fp8_scales.loaded()
        rng = read_tensors(checkpoint, "rng")
        if "cpu" in rng:
            torch.set_rng_state(rng["cpu"])
        # Not of the device, which may be another one now.
        if self.device.type == "cuda" and "cuda" in rng:
            torch.cuda.set_rng_state(rng["cuda"], self.device)
