import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tilewright.errors import UserError
from tilewright.train.evaluation import Scorer
from tilewright.train.evaluation.texts import SlidingWindow, score_texts
from tilewright.train.pretrained import TextModel

DOCUMENTS = ["the cat sat on a mat and saw one small red bird in that old tree. " * 4, "a bird", "é " * 30, "one"]


def write(path, documents):
    path.write_text("<|endoftext|>".join(documents))
    return path


def reference_nats(nats_of, tokens, start, context, stride):
    """Return the nats of each token, scored separately with the context of its window."""
    sequence, nats = [*start, *tokens], []
    end = context + 1
    for i in range(max(1, len(start)), len(sequence)):
        while i >= end:
            end += stride
        nats.append(nats_of(sequence[max(0, min(end, len(sequence)) - context - 1) : i + 1]))
    return nats


@pytest.mark.parametrize(("stride", "context"), [(None, None), (24, None), (1, None), (5, 10)])
def test_token_scores_match_a_reference(text_model, nats_of, tmp_path, stride, context):
    scorer = Scorer(text_model, "float32", batch_tokens=100, context_length=context)
    path = write(tmp_path / "text.txt", DOCUMENTS)
    row = score_texts(scorer, [path], stride)[str(path)]
    context = context or 24
    parts = [reference_nats(nats_of, scorer.encode(text), scorer.start, context, stride or context // 2) for text in DOCUMENTS]
    nats = [each for part in parts for each in part]
    assert row["nats"] == pytest.approx(sum(nats), rel=1e-5)
    assert (row["tokens"], row["documents"]) == (len(nats), 4)
    assert row["bytes"] == sum(len(text.encode()) for text in DOCUMENTS)
    assert row["bits_per_byte"] == pytest.approx(row["nats"] / math.log(2) / row["bytes"])
    assert row["perplexity"] == pytest.approx(math.exp(row["nats"] / row["tokens"]))


@given(st.data())
@settings(deadline=None)
def test_windows_score_each_token_once(data):
    context = data.draw(st.integers(1, 8), "context")
    stride = data.draw(st.integers(1, context), "stride")
    start = list(range(-data.draw(st.integers(0, min(2, context)), "start"), 0))
    pieces = data.draw(st.lists(st.integers(0, 20), max_size=5), "pieces")
    window, tokens, found = SlidingWindow(start, context, stride), 0, []
    for size in pieces:
        found += window.add(np.arange(tokens, tokens + size))
        tokens += size
    found += window.finish()
    scored = [int(token) for request in found for token in request.tokens[-request.num_scored :]]
    assert scored == list(range(tokens))[0 if start else 1 :]
    for i, request in enumerate(found):
        assert 1 <= request.num_scored < len(request.tokens) <= context + 1
        # All windows except the first have the full context length.
        assert i == 0 or len(request.tokens) == context + 1
        assert np.all(np.diff(request.tokens) == 1)


def test_rows_of_json_lines_and_parquet_are_documents(scorer, tmp_path):
    text, table = write(tmp_path / "a.txt", DOCUMENTS), tmp_path / "a.jsonl"
    table.write_text("".join(json.dumps({"text": document}) + "\n" for document in DOCUMENTS))
    rows = score_texts(scorer, [text, table])
    assert list(rows) == [str(text), str(table), "all"]
    assert rows[str(text)] == rows[str(table)]
    assert rows["all"]["nats"] == pytest.approx(2 * rows[str(text)]["nats"])
    assert rows["all"]["bits_per_byte"] == pytest.approx(rows[str(text)]["bits_per_byte"])


def test_text_is_read_in_blocks(scorer, tmp_path, monkeypatch):
    path = write(tmp_path / "a.txt", DOCUMENTS * 20)
    whole = score_texts(scorer, [path])[str(path)]
    defaults = {"pattern": "gpt2", "block_bytes": 64, "document_end": ""}
    monkeypatch.setattr("tilewright.tokenizer.text.sources.iter_blocks.__kwdefaults__", defaults)
    parts = score_texts(scorer, [path])[str(path)]
    assert parts["nats"] == pytest.approx(whole["nats"], rel=1e-6)
    assert {name: parts[name] for name in ("tokens", "bytes", "documents")} == {
        name: whole[name] for name in ("tokens", "bytes", "documents")
    }


def test_joined_documents_share_context_and_separators_are_not_scored(scorer, nats_of, tmp_path):
    path = write(tmp_path / "a.txt", ["the cat", "sat on a mat"])
    row = score_texts(scorer, [path], join_documents=True)[str(path)]
    first, second = scorer.encode("the cat"), scorer.encode("sat on a mat")
    sequence = [scorer.separator, *first, scorer.separator, *second]
    places = [i for i, token in enumerate(sequence) if token != scorer.separator]
    assert row["nats"] == pytest.approx(sum(nats_of(sequence[: i + 1]) for i in places), rel=1e-5)
    assert (row["tokens"], row["bytes"], row["documents"]) == (len(places), 19, 2)


def test_first_token_is_not_scored_without_a_start_token(text_model, nats_of, tmp_path):
    scorer = Scorer(TextModel(text_model.model, text_model.tokenizer), "float32")
    path = write(tmp_path / "a.txt", ["the cat sat"])
    row = score_texts(scorer, [path])[str(path)]
    tokens = scorer.encode("the cat sat")
    assert row["nats"] == pytest.approx(sum(nats_of(tokens[:end]) for end in range(2, len(tokens) + 1)), rel=1e-5)
    assert (row["tokens"], row["bytes"]) == (len(tokens) - 1, 11 - len(scorer.tokenizer.vocab[tokens[0]]))
    with pytest.raises(UserError, match="no token that ends a document"):
        score_texts(scorer, [path], join_documents=True)


def test_invalid_texts_and_strides_raise(scorer, tmp_path):
    path = write(tmp_path / "a.txt", ["the cat"])
    with pytest.raises(UserError, match="stride is 25: expected 1 to 24"):
        score_texts(scorer, [path], 25)
    with pytest.raises(UserError, match="does not exist"):
        score_texts(scorer, [tmp_path / "b.txt"])
    with pytest.raises(UserError, match="has no token to score"):
        score_texts(scorer, [write(tmp_path / "c.txt", ["", ""])])
