import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from tilewright.errors import UserError
from tilewright.kernels import use_backend
from tilewright.kernels.attention.operands import aligned
from tilewright.kernels.dispatch import HAS_TRITON
from tilewright.model import KVCache, ModelConfig, TransformerLM, generate
from tilewright.model.cache import LayerCache
from tilewright.model.sampler import Sampler
from tilewright.model.sampling import Sampling

needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="Triton cannot be imported")

CONFIG = ModelConfig(vocab_size=11, context_length=24, d_model=16, num_layers=2, num_heads=2, d_ff=16)
WINDOWS = {"window": 3, "window_pattern": "LG", "local_rope_theta": 50.0, "head_dim": 6, "attention_softcap": 2.0}


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(1)
    return TransformerLM(CONFIG).eval()


@settings(derandomize=True, deadline=None, max_examples=20)
@given(
    prompts=st.lists(st.lists(st.integers(0, 10), min_size=1, max_size=9), min_size=1, max_size=4),
    new=st.integers(1, 12),
    temperature=st.sampled_from([0.0, 0.7, 1.5]),
    stop=st.none() | st.integers(0, 10),
)
def test_cached_generation_equals_uncached(model, prompts, new, temperature, stop):
    options = {"temperature": temperature, "top_k": 6, "top_p": 0.9, "stop_tokens": [] if stop is None else [stop], "seed": 3}
    assert generate(model, prompts, new, **options) == generate(model, prompts, new, use_cache=False, **options)


@settings(derandomize=True, deadline=None, max_examples=20)
@given(
    prompts=st.lists(st.lists(st.integers(0, 10), min_size=1, max_size=9), min_size=2, max_size=4),
    stop=st.none() | st.integers(0, 10),
)
def test_batches_of_unequal_prompts_match_single_prompts(model, prompts, stop):
    together = generate(model, prompts, 10, temperature=0, stop_tokens=[] if stop is None else [stop])
    assert together == [generate(model, [p], 10, temperature=0, stop_tokens=[] if stop is None else [stop])[0] for p in prompts]


def test_prompts_are_lists_or_tensors(model):
    prompts = [[1, 2, 3], [4, 5, 6]]
    tensor = torch.tensor(prompts)
    assert generate(model, tensor, 4, seed=0) == generate(model, list(tensor), 4, seed=0) == generate(model, prompts, 4, seed=0)
    assert generate(model, torch.empty(0, 3, dtype=torch.long), 4) == []


@pytest.mark.parametrize("use_cache", [True, False])
def test_prompts_share_one_pass(model, use_cache):
    passes = []
    hook = model.layers[0].register_forward_hook(lambda *inputs_and_output: passes.append(inputs_and_output[-1][1].shape[1]))
    rows = generate(model, [[1], [1] * 18, [2] * 3], 5, seed=0, use_cache=use_cache)
    hook.remove()
    assert [len(row) for row in rows] == [5, 5, 5]
    # One pass over the prompts, then one pass per token.
    assert passes == ([18, 1, 1, 1, 1] if use_cache else [18, 19, 20, 21, 22])


def test_greedy_takes_the_most_likely_token(model):
    sequence = [1, 2, 3]
    for _ in range(5):
        sequence.append(int(model(torch.tensor([sequence]))[0, -1].argmax()))
    assert generate(model, [[1, 2, 3]], 5, temperature=0) == [sequence[3:]]


def test_generation_ends_before_the_stop_token(model):
    free = generate(model, [[1]], 12, temperature=1.0, seed=0)
    stop = free[0][4]
    stopped = generate(model, [[1]], 12, temperature=1.0, seed=0, stop_tokens=[] if stop is None else [stop])[0]
    assert stop not in stopped
    assert stopped == free[0][: free[0].index(stop)]


def test_every_row_respects_its_limit(model):
    for seed in range(40):
        rows = generate(model, [[1], [1] * 18], 5, stop_tokens=[seed % 11], seed=seed)
        assert all(len(row) <= 5 and seed % 11 not in row for row in rows)


def test_ids_above_vocab_size_are_never_sampled(model):
    assert max(generate(model, [[1]], 20, temperature=5.0, vocab_size=4, seed=0)[0]) < 4


def test_a_temperature_near_zero_is_greedy(model):
    assert generate(model, [[1, 2]], 6, temperature=1e-40, seed=0) == generate(model, [[1, 2]], 6, temperature=0)


@pytest.mark.parametrize("backend", ["reference", pytest.param("triton", marks=needs_triton)])
@pytest.mark.parametrize("change", [{}, {"qk_norm": True, "num_kv_heads": 1}, {"rope": False}, WINDOWS], ids=str)
@torch.no_grad()
def test_sequences_of_unequal_length_share_a_cache(change, backend, device):
    torch.manual_seed(0)
    model = TransformerLM(dataclasses.replace(CONFIG, **change)).to(device)
    tokens, lengths = torch.randint(0, 11, (3, 12), device=device), [2, 7, 1]
    with use_backend(backend):
        cache = KVCache(model, 3, 24)
        for layer in cache.layers:
            # Positions beyond a sequence's length must never be read.
            layer.k.fill_(torch.nan), layer.v.fill_(torch.nan)
        model(tokens[:, :7], cache)
        cache.keep(lengths)
        for count in (1, 3, 1):
            new = torch.stack([tokens[i, n : n + count] for i, n in enumerate(lengths)])
            logits, lengths = model(new, cache), [n + count for n in lengths]
            for i, n in enumerate(lengths):
                expected = model(tokens[i : i + 1, :n])[0, -count:]
                torch.testing.assert_close(logits[i], expected, rtol=1e-5, atol=1e-5)
        assert cache.length == 12
        assert cache.lengths is not None
        assert cache.lengths.tolist() == lengths


@torch.no_grad()
def test_full_sequences_do_not_stop_the_others(model):
    tokens = torch.randint(0, 11, (2, 8))
    cache = KVCache(model, 2, 6)
    model(tokens[:, :6], cache)
    cache.keep([6, 3])
    for n in range(3, 6):
        logits = model(tokens[:, n : n + 1], cache)
        torch.testing.assert_close(logits[1, 0], model(tokens[1:, : n + 1])[0, -1], rtol=1e-5, atol=1e-5)
    assert cache.length == 6
    with pytest.raises(ValueError, match=r"lengths are \[7, 1\]: expected 0 to 6"):
        cache.keep([7, 1])


@pytest.mark.parametrize("head_dim", [6, 20, 64])
def test_kernels_read_the_cache_without_a_copy(head_dim):
    cache = LayerCache((2, 1, 8, head_dim), torch.bfloat16, torch.device("cpu"))
    k, v = torch.randn(2, 2, 1, 3, head_dim, dtype=torch.bfloat16)
    for kept, new in zip(cache.append(k, v), (k, v), strict=True):
        assert aligned(kept) is kept
        assert torch.equal(kept, new)


def test_the_cache_follows_autocast(model):
    with torch.autocast("cpu", torch.bfloat16):
        cache = KVCache(model, 1, 8)
        assert cache.layers[0].k.dtype == torch.bfloat16
        cached, uncached = (generate(model, [[1, 2]], 6, temperature=0, use_cache=use) for use in (True, False))
    assert cached == uncached


class CountWeightCasts(TorchDispatchMode):
    """Counts casts of matrices with the shapes of the model's weights."""

    def __init__(self, model):
        super().__init__()
        self.shapes = {p.shape for p in model.parameters() if p.dim() == 2}
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result.dtype == torch.bfloat16 and result.shape in self.shapes:
            self.count += args[0].dtype == torch.float32 and args[0].shape == result.shape
        return result


@pytest.mark.parametrize("tied", [False, True])
def test_weights_are_cast_once_for_all_tokens(tied):
    torch.manual_seed(1)
    model = TransformerLM(dataclasses.replace(CONFIG, tie_embeddings=tied)).eval()
    options = {"temperature": 0.8, "seed": 0}
    with CountWeightCasts(model) as casts:
        tokens = generate(model, [[1, 2]], 9, dtype=torch.bfloat16, **options)
    assert casts.count == sum(p.dim() == 2 for p in model.parameters())
    model.compute_dtype = torch.bfloat16
    with CountWeightCasts(model) as casts:
        assert generate(model, [[1, 2]], 9, **options) == tokens
    assert casts.count == sum(p.dim() == 2 for p in model.parameters())
    # The original model does not change.
    assert all(p.dtype == torch.float32 and p.requires_grad for p in model.parameters())
    cast, row = model.cast(torch.bfloat16), torch.arange(8)[None]
    assert torch.equal(cast(row), model(row))
    assert cast.lm_head is None if tied else cast.lm_head.weight.dtype == torch.bfloat16
    assert cast.ln_final.weight.data_ptr() == model.ln_final.weight.data_ptr()
    assert model.cast(torch.float32)(row).dtype == torch.float32
    assert cast.cast(torch.bfloat16) is cast


def test_a_stop_token_inside_a_prompt_does_not_stop(model):
    assert generate(model, [[7, 5, 7], [7]], 4, temperature=0) == [
        generate(model, [p], 4, temperature=0)[0] for p in ([7, 5, 7], [7])
    ]


def test_without_a_limit_generation_fills_the_context(model):
    new = generate(model, [[1, 2, 3], [4]], seed=0)
    assert [len(row) for row in new] == [21, 23]


@pytest.mark.parametrize("options", [{"temperature": 1e-300}, {"top_p": 1e-300}, {"top_k": 1}, {"min_p": 1.0}], ids=str)
def test_extreme_settings_are_greedy(model, options):
    assert generate(model, [[1, 2]], 6, seed=0, **options) == generate(model, [[1, 2]], 6, temperature=0)
    widest = {"temperature": 1e300, "top_k": 10**30, "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 100.0}
    assert len(generate(model, [[1, 2]], 6, seed=0, **widest)[0]) == 6


def test_a_seed_fixes_the_result(model):
    first, again, other = (generate(model, [[1]] * 3, 8, seed=seed) for seed in (1, 1, 2))
    assert first == again != other
    assert generate(model, [], 5) == []


def _frequencies(generator=None, **options):
    logits = torch.log(torch.tensor([0.5, 0.3, 0.15, 0.05])).expand(20_000, -1)
    sampler = Sampler([Sampling(**options)] * len(logits), logits.device)
    drawn = sampler.draw(logits, generator or torch.Generator().manual_seed(0))
    return (torch.bincount(drawn, minlength=4) / len(drawn)).tolist()


def test_frequencies_follow_the_probabilities():
    squares = torch.tensor([0.25, 0.09, 0.0225, 0.0025])
    for options, expected in [
        ({}, [0.5, 0.3, 0.15, 0.05]),
        ({"top_k": 2}, [0.625, 0.375, 0, 0]),
        ({"top_p": 0.6}, [0.625, 0.375, 0, 0]),
        ({"top_p": 0.1}, [1, 0, 0, 0]),
        ({"min_p": 0.5}, [0.625, 0.375, 0, 0]),
        ({"min_p": 0.0}, [0.5, 0.3, 0.15, 0.05]),
        ({"temperature": 0.5}, (squares / squares.sum()).tolist()),
    ]:
        assert _frequencies(**options) == pytest.approx(expected, abs=0.01)


def test_rows_sample_with_their_own_settings_and_generators():
    settings = [
        Sampling(0.0),
        Sampling(),
        Sampling(top_k=3),
        Sampling(2.0, top_p=0.7),
        Sampling(min_p=0.3),
        Sampling(0.9, 4, 0.8),
    ]
    logits = torch.randn(len(settings), 30, generator=torch.Generator().manual_seed(5))

    def generators():
        return [torch.Generator().manual_seed(i) for i in range(len(settings))]

    together, alone = generators(), generators()
    sampler = Sampler(settings, logits.device)
    for _ in range(20):
        drawn = [int(Sampler([s], logits.device).draw(row[None], g)) for s, row, g in zip(settings, logits, alone, strict=True)]
        assert sampler.draw(logits, together).tolist() == drawn


def test_repetition_penalty_matches_transformers(model):
    transformers = pytest.importorskip("transformers")
    logits, ids = torch.randn(2, 11), torch.tensor([[1, 5, 5], [0, 10, 3]])
    expected = transformers.RepetitionPenaltyLogitsProcessor(1.7)(ids, logits.clone()).argmax(-1)
    seen = torch.zeros(2, 11, dtype=torch.bool).scatter_(1, ids, True)
    assert torch.equal(Sampler([Sampling(0, repetition_penalty=1.7)] * 2, logits.device).draw(logits, seen=seen), expected)
    # Check by hand: greedy generation also penalizes the tokens of the prompt.
    sequence = [1, 2, 3]
    for _ in range(8):
        row = model(torch.tensor([sequence]))[0, -1]
        taken = torch.tensor(sorted(set(sequence)))
        row[taken] = torch.where(row[taken] > 0, row[taken] / 1.7, row[taken] * 1.7)
        sequence.append(int(row.argmax()))
    rows = generate(model, [[4], [1, 2, 3]], 8, temperature=0, repetition_penalty=1.7)
    assert rows[1] == sequence[3:]


def test_rows_with_their_own_seeds_are_independent(model):
    prompts, seeds = [[1], [2, 3, 4], [5, 6]], [7, 8, 9]
    together = generate(model, prompts, 9, seed=seeds, top_p=0.9)
    assert together == [generate(model, [p], 9, seed=s, top_p=0.9)[0] for p, s in zip(prompts, seeds, strict=True)]
    with pytest.raises(UserError, match="seed has 2 entries for 3 prompts"):
        generate(model, prompts, seed=[1, 2])


def test_long_prompts_are_cropped_only_on_request(model):
    prompt = [token % 11 for token in range(30)]
    assert generate(model, [prompt], 6, temperature=0, crop=True) == generate(model, [prompt[-18:]], 6, temperature=0)
    with pytest.raises(UserError, match="24 new tokens exceed the context of 24 tokens: ask for fewer tokens"):
        generate(model, [prompt], 24, crop=True)


def test_any_of_several_stop_tokens_stops(model):
    free = generate(model, [[1]], 12, seed=0)[0]
    assert (
        generate(model, [[1]], 12, seed=0, stop_tokens={free[6], free[3]})[0]
        == free[: min(free.index(free[i]) for i in (3, 6))]
    )


def broken(weight):
    """Return a model with one weight set to `weight`."""
    model = TransformerLM(CONFIG).eval()
    with torch.no_grad():
        model.layers[1].ffn.down_proj.weight[0, 0] = weight
    return model


@pytest.mark.parametrize("weight", [torch.nan, torch.inf])
@pytest.mark.parametrize("options", [{"temperature": 0}, {}, {"top_p": 0.5, "seed": [1, 2]}, {"stop_tokens": [3]}], ids=str)
def test_nonfinite_weights_are_reported(weight, options):
    with pytest.raises(UserError, match=r"the model's logits are not finite: its weights are NaN or infinite"):
        generate(broken(weight), [[1, 2], [3]], 4, **options)


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        ([], {}, "a prompt has no tokens"),
        (torch.empty(0, dtype=torch.long), {}, "a prompt has no tokens"),
        (torch.tensor([1.0]), {}, "a prompt has shape .* and dtype torch.float32: expected a 1-D integer tensor"),
        (torch.tensor(1), {}, r"a prompt has shape \(\) and dtype torch.int64: expected a 1-D integer tensor"),
        ([11], {}, "token 11 is outside the model's vocabulary of 11"),
        ([-1, 2], {}, "token -1 is outside the model's vocabulary of 11"),
        ([1] * 24, {}, "a prompt of 24 tokens and one new token exceed the context of 24"),
        ([1] * 20, {"max_new_tokens": 5}, "a prompt of 20 tokens and 5 new tokens exceed the context of 24"),
        ([1], {"max_new_tokens": 0}, "max_new_tokens is 0"),
        ([1], {"temperature": -1.0}, "temperature is -1.0"),
        ([1], {"temperature": float("nan")}, "temperature is nan"),
        ([1], {"top_k": 0}, "top_k is 0"),
        ([1], {"top_p": 0.0}, "top_p is 0.0"),
        ([1], {"top_p": 1.5}, "top_p is 1.5"),
        ([1], {"min_p": 1.5}, "min_p is 1.5: expected from 0 to 1"),
        ([1], {"repetition_penalty": 0.0}, "repetition_penalty is 0.0: expected from 0.01 to 100"),
    ],
)
def test_bad_input_is_rejected(model, prompt, options, message):
    with pytest.raises(UserError, match=message):
        generate(model, [prompt], **options)
