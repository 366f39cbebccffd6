import random

import numpy as np
import pytest

from tilewright.errors import UserError
from tilewright.train.evaluation import Request, Scorer
from tilewright.train.pretrained import TextModel


def random_requests(count, seed=0):
    rng = random.Random(seed)
    for _ in range(count):
        tokens = [rng.randrange(300) for _ in range(rng.randint(2, 25))]
        yield Request(tokens, rng.randint(1, len(tokens) - 1))


def test_batched_scores_equal_separate_scores(scorer, nats_of):
    requests = list(random_requests(40))
    scored = list(scorer.score(iter(requests)))
    assert [request for request, _ in scored] == requests
    for request, scores in scored:
        first = len(request.tokens) - request.num_scored
        expected = [nats_of(request.tokens[: end + 1]) for end in range(first, len(request.tokens))]
        np.testing.assert_allclose(scores.nats, expected, rtol=2e-5, atol=1e-5)


def test_greedy_tokens_are_the_most_likely(scorer, nats_of):
    tokens = [5, 7, 9]
    best = min(range(300), key=lambda token: nats_of([*tokens, token]))
    ((_, right), (_, wrong)) = scorer.score([Request([*tokens, best], 1), Request([*tokens, (best + 1) % 300], 1)])
    assert (right.is_greedy.tolist(), wrong.is_greedy.tolist()) == ([True], [False])


def test_logits_are_computed_in_chunks(scorer, monkeypatch):
    requests = list(random_requests(5, seed=1))
    whole = [scores.nats for _, scores in scorer.score(requests)]
    monkeypatch.setattr("tilewright.train.evaluation.scoring._LOGITS", 2 * scorer.model.config.vocab_size)
    for (_, scores), nats in zip(scorer.score(requests), whole, strict=True):
        np.testing.assert_allclose(scores.nats, nats, rtol=1e-5)


@pytest.mark.parametrize(
    ("context", "continuation"),
    [("the cat", " sat on"), ("the cat  ", "sat"), ("the cat\n", " sat"), ("", " sat"), ("  ", "sat")],
)
def test_continuation_is_encoded_with_its_context(scorer, context, continuation):
    request = scorer.continuation(context, continuation)
    tokens = list(request.tokens)
    bare = scorer.encode(context.rstrip())
    start = [] if context.strip() else scorer.start
    assert tokens == start + scorer.encode(context + continuation)
    assert tokens[: -request.num_scored] == start + bare


def test_long_prompt_is_truncated_on_the_left(scorer):
    request = scorer.continuation("the cat sat on a mat and " * 10, "saw one")
    whole = scorer.encode("the cat sat on a mat and " * 10 + "saw one")
    assert request.is_cut
    assert request.tokens == whole[-25:]
    assert not scorer.continuation("the cat", " sat").is_cut
    with pytest.raises(UserError, match="tokens at once: expected at most 24"):
        scorer.continuation("the", " cat sat on a mat" * 20)


def test_special_tokens_in_a_text_are_plain_text(scorer):
    assert scorer.separator not in scorer.encode("a<|endoftext|>b")


def test_begin_tokens_precede_a_text(text_model):
    scorer = Scorer(TextModel(text_model.model, text_model.tokenizer, begin_tokens=(3, 4), end_tokens=(9,)), "float32")
    assert list(scorer.continuation("the", " cat").tokens)[:2] == [3, 4]
    assert list(scorer.continuation("", "the").tokens)[:2] == [3, 4]


def test_invalid_sizes_raise(text_model):
    for options, message in (
        ({"context_length": 25}, "context_length is 25: expected 2 to 24"),
        ({"batch_tokens": 0}, "batch_tokens is 0"),
    ):
        with pytest.raises(UserError, match=message):
            Scorer(text_model, **options)
    bare = Scorer(TextModel(text_model.model, text_model.tokenizer))
    with pytest.raises(UserError, match="a context is empty"):
        bare.continuation("", "cat")
