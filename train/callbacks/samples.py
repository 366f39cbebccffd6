"""Texts that the model writes while it trains, for whoever watches the run."""

import sys

import torch
from tqdm import tqdm

from ...errors import UserError
from ...model import TransformerLM
from ...model.prompts import checked_prompt
from ...tokenizer import AnyTokenizer
from ..config import TrainConfig
from ..device import resolve_dtype
from ..metrics import MetricLog
from ..parallel import whole
from ..pretrained import TextModel, text_bounds
from ..sample import SampleConfig
from ..sample_log import SampleLog
from ..texts import continue_texts, encode_prompt
from ..trainer import Trainer
from .callback import Callback, Pause
from .good_steps import diverged


class Samples(Callback):
    """Goes on with each of `sample_prompts` every `sample_every` steps, with the mean of the weights where there is one.

    Tokens are drawn as `tilewright generate` draws them by default, with the run's seed and generators of their own: the same
    weights give the same texts, and the run itself goes as it would have gone without. The first process writes.
    """

    def __init__(self, trainer: Trainer, tokenizer: AnyTokenizer, metrics: MetricLog | None, resume_step: int) -> None:
        """Write to `metrics` and the run's `samples.jsonl`, without the texts there after `resume_step`."""
        super().__init__(trainer)
        config = self.config
        self.every, self._tokenizer, self._metrics = config.sample_every, tokenizer, metrics
        self._log = SampleLog(config.out, resume_step) if trainer.world.is_first else None

    def in_pause(self, pause: Pause) -> None:
        """Write the texts, where the step is one to write at."""
        if not pause.finished or not self.is_due(self.every):
            return
        with self.trainer.mean_of_weights():
            model = self._whole_model()
            if model is not None:
                self._write(model)

    def _write(self, model: TransformerLM) -> None:
        config, step = self.config, self.trainer.step
        text_model = TextModel(model, self._tokenizer, *_bounds(config, self._tokenizer))
        longest = max(len(encode_prompt(text_model, prompt)) for prompt in config.sample_prompts)
        max_new_tokens = min(config.sample_tokens, config.model.context_length - longest)
        try:
            texts = continue_texts(text_model, config.sample_prompts, max_new_tokens, SampleConfig().sampling, seed=config.seed)
        except UserError as error:
            # The prompts were looked at before the run began: what is left is that the weights are no numbers.
            raise diverged(config, f"no text can be drawn after step {step} ({error})") from error
        for number, text in enumerate(texts, 1):
            if self._log is not None:
                self._log.write(step, text.prompt, text.text)
            if self._metrics is not None:
                self._metrics.text(step, f"sample/{number}", text.prompt + text.text)
            tqdm.write(f"step {step}, sample {number}: {text.prompt}{text.text}", file=sys.stderr)

    def _whole_model(self) -> TransformerLM | None:
        """Return the model in the first process, None in the others.

        Where there are others, it is a copy: the first process alone has no shards to gather, and calls no module that waits
        for the others. Matrices are gathered one after the other.
        """
        trainer = self.trainer
        if trainer.world.size == 1:
            return trainer.model
        dtype, weights = resolve_dtype("auto", trainer.device), {}
        for name, tensor in trainer.model.state_dict().items():
            gathered = whole(tensor)
            if trainer.world.is_first:
                weights[name] = gathered.to(dtype) if gathered.dim() > 1 else gathered
        if not trainer.world.is_first:
            return None
        with torch.device("meta"):
            model = TransformerLM(trainer.config.model)
        model.load_state_dict(weights, assign=True)
        model.make_tables(trainer.device)
        return model


def check_samples(config: TrainConfig, tokenizer: AnyTokenizer) -> None:
    """Raise a `UserError` where the run is to write texts, and the model cannot go on with a prompt."""
    if config.sample_every is None:
        return
    # Whether there are any, and of valid Unicode.
    SampleConfig(prompt=config.sample_prompts)
    with torch.device("meta"):
        model = TransformerLM(config.model)
    text_model = TextModel(model, tokenizer, *_bounds(config, tokenizer))
    for prompt in config.sample_prompts:
        try:
            checked_prompt(config.model, encode_prompt(text_model, prompt), None)
        except UserError as error:
            raise UserError(f"sample_prompts has {prompt:.60}: {error}") from error


def _bounds(config: TrainConfig, tokenizer: AnyTokenizer) -> tuple[tuple[int, ...], tuple[int, ...]]:
    # The folder whose files the run's own is given.
    folder = config.init or config.data.tokenizer.parent
    return text_bounds(folder, tokenizer, config.model.vocab_size)
