"""Generate texts with a trained model."""

from .options import SampleConfig
from .pretrained import TextModel
from .texts import Text, continue_texts


def write_texts(text_model: TextModel, config: SampleConfig) -> list[Text]:
    """Continue the prompts until an end token, a stop string, `max_new_tokens` or the end of the context."""
    return continue_texts(
        text_model,
        config.read_prompts(),
        config.max_new_tokens,
        config.sampling,
        num_samples=config.num_samples,
        stop=config.stop,
        seed=config.seed,
        crop=config.crop,
    )
