"""Generate sample texts during training."""

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
from ..options import SampleConfig
from ..parallel import full_tensor
from ..pretrained import TextModel, text_bounds
from ..sample_log import SampleLog
from ..texts import continue_texts, encode_prompt
from ..trainer import Trainer
from .callback import Callback, Pause
from .divergence import diverged


class Samples(Callback):
    """Continues each of `sample_prompts` every `sample_every` steps, with the averaged weights if the run has them.

    Sampling uses the defaults of `tilewright generate` and the run's seed. Its random generators are separate, so the same
    weights give the same texts, and sampling does not change the run. Only the first process generates.
    """

    def __init__(self, trainer: Trainer, tokenizer: AnyTokenizer, metrics: MetricLog | None, resume_step: int) -> None:
        """Open the run's `samples.jsonl` and drop its texts after `resume_step`; texts also go to the tracker of `metrics`."""
        super().__init__(trainer)
        config = self.config
        self.every, self._tokenizer, self._metrics = config.sample_every, tokenizer, metrics
        self._log = SampleLog(config.out, resume_step) if trainer.world.is_first else None

    def in_pause(self, pause: Pause) -> None:
        """Generate the texts if the step is due."""
        if not pause.finished or not self.is_due(self.every):
            return
        with self.trainer.averaged_weights():
            model = self._full_model()
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
            # `check_samples` has checked the prompts, so the weights must be non-finite.
            raise diverged(config, f"cannot generate samples after step {step} ({error})") from error
        for number, text in enumerate(texts, 1):
            if self._log is not None:
                self._log.write(step, text.prompt, text.text)
            if self._metrics is not None:
                self._metrics.text(step, f"sample/{number}", text.prompt + text.text)
            tqdm.write(f"step {step}, sample {number}: {text.prompt}{text.text}", file=sys.stderr)

    def _full_model(self) -> TransformerLM | None:
        """Return the unsharded model in the first process, None in the others.

        With several processes the model is a copy, because the first process cannot run sharded modules alone. Parameters are
        gathered one at a time.
        """
        trainer = self.trainer
        if trainer.world.size == 1:
            return trainer.model
        dtype, weights = resolve_dtype("auto", trainer.device), {}
        for name, tensor in trainer.model.state_dict().items():
            gathered = full_tensor(tensor)
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
    """Raise a `UserError` if the run generates samples and the model cannot continue one of the prompts."""
    if config.sample_every is None:
        return
    # Its constructor rejects an empty list and invalid Unicode.
    SampleConfig(prompt=config.sample_prompts)
    with torch.device("meta"):
        model = TransformerLM(config.model)
    text_model = TextModel(model, tokenizer, *_bounds(config, tokenizer))
    for prompt in config.sample_prompts:
        try:
            checked_prompt(config.model, encode_prompt(text_model, prompt), None)
        except UserError as error:
            raise UserError(f"sample_prompts contains {prompt:.60}: {error}") from error


def _bounds(config: TrainConfig, tokenizer: AnyTokenizer) -> tuple[tuple[int, ...], tuple[int, ...]]:
    # `make_run_folder` copies the chat files from this folder.
    folder = config.init or config.data.tokenizer.parent
    return text_bounds(folder, tokenizer, config.model.vocab_size)
