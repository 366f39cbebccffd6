import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tilewright.errors import UserError
from tilewright.model import BatchEngine, Generation, ModelConfig, Sampling, TransformerLM, generate

CONFIG = ModelConfig(vocab_size=11, context_length=24, d_model=16, num_layers=2, num_heads=2, d_ff=16)
SAMPLINGS = [Sampling(0.0), Sampling(), Sampling(0.7, top_k=5, top_p=0.9), Sampling(1.2, min_p=0.05, repetition_penalty=1.3)]


@pytest.fixture(scope="module", params=[None, 3], ids=["global", "windows"])
def model(request):
    torch.manual_seed(1)
    windows = {} if request.param is None else {"window": 3, "window_pattern": "LG", "attention_softcap": 2.0}
    return TransformerLM(ModelConfig(**{**vars(CONFIG), **windows})).eval()


def engine_of(model, num_slots, max_length=None, **options):
    engine = BatchEngine(model, num_slots, max_length, **options)
    for layer in engine._cache.layers:
        # Positions beyond a sequence's length must never be read.
        layer.k.fill_(torch.nan), layer.v.fill_(torch.nan)
    return engine


def alone(model, generation):
    options = {name: getattr(generation.sampling, name) for name in vars(generation.sampling)}
    stops, seed = generation.stop_tokens, generation.seed
    return generate(model, [generation.prompt], generation.max_new_tokens, stop_tokens=stops, seed=seed, **options)[0]


generations = st.builds(
    Generation,
    prompt=st.lists(st.integers(0, 10), min_size=1, max_size=12),
    max_new_tokens=st.none() | st.integers(1, 12),
    sampling=st.sampled_from(SAMPLINGS),
    stop_tokens=st.sampled_from([(), (3,), (1, 7)]),
    seed=st.integers(0, 99),
)


@settings(derandomize=True, deadline=None, max_examples=15)
@given(
    arrivals=st.lists(st.tuples(generations, st.integers(0, 6)), min_size=1, max_size=7),
    num_slots=st.integers(1, 4),
    prefill_tokens=st.sampled_from([1, 5, 100]),
    cancelled=st.none() | st.tuples(st.integers(0, 6), st.integers(0, 8)),
)
def test_batched_sequences_match_single_generation(model, arrivals, num_slots, prefill_tokens, cancelled):
    engine = engine_of(model, num_slots, prefill_tokens=prefill_tokens)
    waits = sorted((steps, i) for i, (_, steps) in enumerate(arrivals))
    victim = None if cancelled is None else arrivals[cancelled[0] % len(arrivals)][0]
    step = 0
    while waits or engine.num_waiting or engine.num_running:
        while waits and waits[0][0] <= step:
            engine.add(arrivals[waits.pop(0)[1]][0])
        if cancelled is not None and step == cancelled[1]:
            engine.cancel(victim)
        engine.step()
        assert engine.num_running <= num_slots
        step += 1
    for generation, _ in arrivals:
        expected = alone(model, generation)
        if generation.finish_reason == "cancelled":
            assert generation is victim
            assert generation.tokens == expected[: len(generation.tokens)]
        else:
            assert generation.tokens == expected
            full = len(expected) == (generation.max_new_tokens or 24 - len(generation.prompt))
            assert generation.finish_reason in (("length", "stop") if full else ("stop",))


def test_only_running_sequences_are_computed(model):
    shapes = []
    hook = model.layers[0].register_forward_hook(
        lambda *inputs_and_output: shapes.append(tuple(inputs_and_output[-1][1].shape[:2]))
    )
    engine = engine_of(model, 8)
    for new in (4, 1, 2):
        engine.add(Generation([1, 2, 3], new))
    while engine.num_waiting or engine.num_running:
        engine.step()
    hook.remove()
    # Three prompts, after which one sequence is complete; then two sequences, then one.
    assert shapes == [(1, 3)] * 3 + [(2, 1), (1, 1), (1, 1)]


def test_sequences_end_at_max_length(model):
    engine = engine_of(model, 1, max_length=10)
    generation = Generation([1, 2, 3])
    engine.add(generation)
    while engine.num_waiting or engine.num_running:
        engine.step()
    assert (len(generation.tokens), generation.finish_reason) == (7, "length")
    assert engine.step() == []
    with pytest.raises(UserError, match="a prompt of 9 tokens and 2 new tokens exceed the context of 10 tokens"):
        engine.add(Generation([1] * 9, 2))
    engine.add(cropped := Generation(list(range(9)), 2), crop=True)
    assert cropped.prompt == list(range(1, 9))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_slots": 0}, "num_slots is 0: expected at least 1"),
        ({"num_slots": 1, "max_length": 25}, "max_length is 25: expected at most the context length, 24"),
        ({"num_slots": 1, "prefill_tokens": 0}, "prefill_tokens is 0: expected at least 1"),
    ],
)
def test_bad_sizes_are_rejected(model, options, message):
    with pytest.raises(UserError, match=message):
        BatchEngine(model, **options)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_nonfinite_weights_are_reported(temperature):
    model = TransformerLM(CONFIG).eval()
    with torch.no_grad():
        model.ln_final.weight[0] = torch.nan
    engine = BatchEngine(model, 2)
    engine.add(Generation([1, 2], 3, Sampling(temperature)))
    with pytest.raises(UserError, match=r"the model's logits are not finite: its weights are NaN or infinite"):
        engine.step()
