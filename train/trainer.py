"""Trainer: holds the model, optimizer and data of a run, takes steps, validates, and provides the state for checkpoints."""

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
from .ema import EMA
from .graph import StepGraph
from .guard import Guard
from .optimizer import Optimizer
from .parallel import compile_blocks, full_tensor, gradient_sync, parallelize, place, reshard
from .schedule import batch_size, learning_rate, sequences
from .sources import Sources


class TrainingLoss(nn.Module):
    """A model and its loss as one module, which is compiled as a whole."""

    def __init__(
        self,
        model: TransformerLM,
        z_loss: float = 0.0,
        end_of_text: int | None = None,
        router_loss: float = 0.0,
        by_sequence: bool = False,
    ) -> None:
        """Mask attention across documents if `end_of_text`, the id that ends each document, is given."""
        super().__init__()
        self.model = model
        self._z_loss, self._end_of_text, self._router_loss = z_loss, end_of_text, router_loss
        self._by_sequence = by_sequence

    def forward(self, inputs: Tensor, targets: Tensor, documents: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """Return the summed loss in nats; inputs, targets and document ids have shape (B, T).

        With gradients enabled, the loss includes z-loss and router loss. With `by_sequence`, also return the losses of the
        sequences, (B,).
        """
        if documents is None and self._end_of_text is not None:
            ends = inputs == self._end_of_text
            # The token that ends a document belongs to it.
            documents = ends.cumsum(dim=1, dtype=torch.int32) - ends.int()
        z_loss, router_loss = (self._z_loss, self._router_loss) if torch.is_grad_enabled() else (0.0, 0.0)
        options = {"document_ids": documents, "z_loss": z_loss, "router_loss": router_loss}
        return self.model.loss(inputs, targets, **options, by_sequence=self._by_sequence)


class Trainer:
    """The training state of a run. `batch_size.fit_memory` must have resolved the memory-dependent `auto` options."""

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
        """Initialize the weights randomly, or with `initialise`; without a `world`, this is the only process.

        If the run `resumes`, `load` sets the weights later. Only the first process initializes weights.
        """
        self.config = config
        self.world = world or World(resolve_device(config.device))
        self.train_data, self.valid_data, self.sources = train_data, valid_data, sources
        packing = Packing(config.data.packing, end_of_text)
        self.validation = ValidationData(valid_data, config.eval_sequences, config.model.context_length, packing)
        self.device = self.world.device
        self.dtype = resolve_dtype(config.precision, self.device)
        prepare_allocator(self.device)
        # Initialize on the CPU, so that every device starts with the same weights.
        torch.manual_seed(config.seed)
        initializes = self.world.is_first and not resumes
        with contextlib.nullcontext() if initializes else torch.device("meta"):
            self.model = TransformerLM(config.model)
        if initialise is not None:
            self.world.on_first(lambda: initialise(self.model))
        # The other processes wait here for the first one, and continue with its RNG state.
        torch.set_rng_state(self.world.on_first(torch.get_rng_state))
        if config.weights == "bfloat16":
            # RoPE tables stay in float32.
            for parameter in self.model.parameters():
                parameter.data = parameter.data.bfloat16()
        self.model.compute_dtype = self.dtype
        assert config.activation_checkpointing != "auto"
        self.model.activation_checkpointing = config.activation_checkpointing
        bound = end_of_text if config.data.documents else None
        self._training_sources = sources if sources is not None and sources.log_training_losses else None
        by_sequence = self._training_sources is not None
        self.loss = TrainingLoss(self.model, config.z_loss, bound, config.router_loss, by_sequence)
        # This moves and shards the parameters, so the optimizer must be built afterwards.
        self._loss_sum = self._parallelize_and_compile()
        self._fp8_scales = None
        if config.precision in ("fp8", "fp8_rowwise", "fp8_delayed"):
            rows = self.micro_batch_size * config.model.context_length // self.world.layout.cp
            self._fp8_scales = use_fp8(self.model, config.precision, rows)
        self.optimizer = Optimizer(self.model, config.optimizer, config.seed)
        self.ema = self.optimizer.mean if config.ema_decay is None else EMA(self.model, config.ema_decay)
        self.guard = Guard(self.device, config.spike_deviations)
        self._step = StepGraph(self._update) if config.cuda_graphs else self._update
        self.step = 0
        self.targets = torch.empty(0, dtype=torch.long, device=self.device)
        """Targets of the last step on this process, (B, T) int64."""
        self._batches: Prefetcher | None = None

    def _parallelize_and_compile(self) -> Callable[[Tensor, Tensor], Tensor]:
        config = self.config
        compiles = self.device.type == "cuda" if config.compile is None else config.compile
        if self.world.size > 1:
            if compiles:
                compile_blocks(self.model.layers)
            return parallelize(self.loss, self.model, self.world, self.dtype)
        place(self.loss, self.model, self.device)
        if not compiles:
            return self.loss
        # self.model stays uncompiled, so its parameters keep their names.
        return torch.compile(self.loss, fullgraph=True, dynamic=False)

    @property
    def peak(self) -> str:
        """Name of the peak in `GPU.peak_flops` that MFU is relative to: fp8 if the blocks use FP8 products."""
        if self.config.precision.startswith("fp8"):
            return "fp8"
        return "bf16" if self.dtype == torch.bfloat16 else "fp32"

    @property
    def micro_batch_size(self) -> int:
        """Number of sequences in a forward pass."""
        micro = self.config.micro_batch_size
        assert micro != "auto"
        return micro or self.config.smallest_batch // self.world.num_readers

    def samples(self, step: int) -> range:
        """Return the sample indices of a step, counted from the last change of the data."""
        first = sequences(self.config, self.config.at(step).since("data.train"), step)
        return range(first, first + batch_size(self.config, step))

    @property
    def batches(self) -> Prefetcher:
        """Iterator over the batches of the coming steps, with prefetching."""
        if self._batches is None:
            self._batches = Prefetcher(
                lambda step: self.train_data.batch(self.world.rows(self.samples(step))),
                self.step,
                self.config.steps,
                self.device,
            )
        return self._batches

    def close(self) -> None:
        """Stop the prefetch thread."""
        if self._batches is not None:
            self._batches.close()
            self._batches = None

    def backward(self, *batch: Tensor) -> Tensor:
        """Accumulate the gradients of a batch over all processes; return the loss in nats per scored token.

        `batch` is the result of `TrainingData.batch` for this process.
        """
        return self._backward(*batch)[0]

    def _backward(self, *batch: Tensor) -> tuple[Tensor, Tensor]:
        """Return the loss as `backward` does, and the loss of each sequence, (B,), if training losses by source are logged."""
        loss, by_sequence = torch.zeros((), device=self.device), []
        # Divide by the tokens per replica of the whole batch, so that the result does not depend on the micro-batch size.
        # Gradients are averaged over the replicas.
        replicas = self.world.num_replicas
        if self.train_data.packed:
            tokens = self._num_scored(batch[1]) / replicas
        else:
            sequences_of_all = len(batch[0]) * self.world.num_readers
            tokens = sequences_of_all * self.config.model.context_length // replicas
        parts = list(zip(*(tensor.split(self.micro_batch_size) for tensor in batch), strict=True))
        for i, part in enumerate(parts, 1):
            with gradient_sync(self._loss_sum, last=i == len(parts)):
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
        """Return the number of scored targets of all processes, at least 1, without synchronizing with the host."""
        return (self.world.sum((targets != IGNORED_TARGET).sum()) // self.world.times_read).clamp(min=1)

    def train_step(self) -> dict[str, Tensor | float]:
        """Take one optimizer step; return loss (nats per token), gradient norm and learning rate without synchronizing."""
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
        if self._training_sources is not None:
            numbers = self.train_data.sources(self.world.rows(self.samples(self.step - 1)))
            metrics |= self._training_sources.training_losses(by_sequence, batch[1], numbers, self.world)
        return metrics

    def _update(self, *batch: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Update the weights with a batch; return the loss, the gradient norm, and the losses by sequence of `_backward`.

        A CUDA graph can capture this: every value that changes between steps is in device memory.
        """
        loss, by_sequence = self._backward(*batch)
        grad_norm = full_tensor(torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.optimizer.max_grad_norm))
        self.optimizer.step(self.guard.judge(loss, grad_norm))
        self.optimizer.zero_grad()
        return loss, grad_norm, by_sequence

    def averaged_weights(self) -> AbstractContextManager[None]:
        """Use the averaged weights inside the context, if the run has them."""
        return contextlib.nullcontext() if self.ema is None else self.ema.in_place_of_the_weights()

    def validate(self, interrupted: Callable[[], bool] = lambda: False) -> float | None:
        """Return the validation loss in nats per token, or None if `interrupted` returned true between two batches."""
        with self.averaged_weights():
            return self._validate(self.validation, interrupted)

    def validate_sources(self, interrupted: Callable[[], bool] = lambda: False) -> dict[str, float] | None:
        """Return the validation metrics of each source, or None if `interrupted` returned true."""
        row: dict[str, float] = {}
        if self.sources is None:
            return row
        with self.averaged_weights():
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
            reshard(self._loss_sum)
        return float(self.world.sum(total)) / max(1, num_tokens)

    def tensors(self) -> dict[str, Mapping[str, Tensor]]:
        """Return the tensors of a checkpoint, by the name of their file."""
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
        """Load a checkpoint, which any number of processes may have written."""
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
        # The run may have moved to another kind of device.
        if self.device.type == "cuda" and "cuda" in rng:
            torch.cuda.set_rng_state(rng["cuda"], self.device)
