"""Evaluate each call of the CS336 guide with the arguments of the course's adapter, and compare it with a plain definition.

Run as a program, this file is one of the two processes that run the distributed adapters.
"""

import io
import math
import re
from collections import Counter
from functools import partial

import numpy as np
import pytest
import regex
import torch
import torch.distributed as dist
import torch.nn.functional as F
from learning_cases import naive_merges
from pages import code_spans, read_sections
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.testing import assert_close
from two_processes import as_one_of_two, run_in_two_processes

from handout import HandoutLM
from tilewright.cli.command_line import COMMANDS
from tilewright.errors import UserError
from tilewright.model import (
    GEGLU,
    CausalSelfAttention,
    ModelConfig,
    TransformerLM,
    from_cs336,
    load_cs336,
    scaled_dot_product_attention,
    to_cs336,
)
from tilewright.tokenizer import END_OF_TEXT
from tilewright.train import get_batch, load_checkpoint, save_checkpoint
from tilewright.train.data.token_file import TokenDataset, write_tokens

PAGE = read_sections("cs336.md")
NAMES: dict = {}
for section in PAGE:
    exec(section.code, NAMES)
CALLS = {
    code_spans(row[0])[0]: code_spans(row[1])[0]
    for section in PAGE
    if section.heading.endswith("adapters")
    for row in section.rows
}
CONFIG = ModelConfig(vocab_size=50, context_length=12, d_model=16, num_layers=2, num_heads=2, d_ff=24, rope_theta=1000.0)
SHAPE = {"d_model": 16, "num_heads": 2, "max_seq_len": 12, "theta": 1000.0}


def evaluate(adapter, **arguments):
    """Return the value of the page's call of an adapter."""
    return eval(CALLS[adapter], {**NAMES, **arguments})


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def plain_model(config=CONFIG):
    """Return the model of the handout, and its weights under the course's names."""
    model = HandoutLM(config)
    names = {"embedding": "token_embeddings", "head": "lm_head", "feed": "ffn", "o": "attn.output_proj"}
    names |= {part: f"attn.{part}_proj" for part in "qkv"}
    weights = {".".join(names.get(part, part) for part in n.split(".")): w for n, w in model.state_dict().items()}
    return model, weights


def check_linear(call):
    w, x = torch.randn(5, 3), torch.randn(2, 4, 3)
    assert_close(call(d_in=3, d_out=5, weights=w, in_features=x), x @ w.T)


def check_embedding(call):
    w, ids = torch.randn(7, 3), torch.tensor([[0, 6], [2, 2]])
    assert_close(call(vocab_size=7, d_model=3, weights=w, token_ids=ids), w[ids])


def check_silu(call):
    x = torch.randn(4, 3)
    assert_close(call(in_features=x), x / (1 + torch.exp(-x)))


def check_softmax(call):
    x = torch.randn(4, 3)
    assert_close(call(in_features=x + 1000, dim=0), x.exp() / x.exp().sum(0), rtol=1e-3, atol=1e-5)


def check_rmsnorm(call):
    x, w = torch.randn(2, 4, 8), torch.randn(8)
    assert_close(call(d_model=8, eps=0.1, weights=w, in_features=x), x / (x.square().mean(-1, keepdim=True) + 0.1).sqrt() * w)


def check_swiglu(call):
    x, w1, w2, w3 = torch.randn(2, 8), torch.randn(24, 8), torch.randn(8, 24), torch.randn(24, 8)
    result = call(d_model=8, d_ff=24, w1_weight=w1, w2_weight=w2, w3_weight=w3, in_features=x)
    assert_close(result, (x @ w1.T * torch.sigmoid(x @ w1.T) * (x @ w3.T)) @ w2.T)


def check_rope(call):
    x, positions = torch.randn(2, 3, 8), torch.tensor([4, 0, 9])
    # Each pair of channels is a complex number, which a rotation multiplies by exp(i * angle).
    angles = positions[:, None] * 1000.0 ** (-torch.arange(0, 8, 2) / 8)
    rotated = torch.view_as_complex(x.unflatten(-1, (-1, 2))) * torch.polar(torch.ones_like(angles), angles)
    result = call(d_k=8, theta=1000.0, max_seq_len=12, in_query_or_key=x, token_positions=positions)
    assert_close(result, torch.view_as_real(rotated).flatten(-2))


def check_attention(call):
    q, k, v, mask = torch.randn(2, 3, 4, 8), torch.randn(2, 3, 6, 8), torch.randn(2, 3, 6, 5), torch.rand(2, 3, 4, 6) < 0.7
    mask[0, 0, 1] = False
    weights = (q @ k.mT / math.sqrt(8)).masked_fill(~mask, -math.inf).softmax(-1).nan_to_num()
    assert_close(call(Q=q, K=k, V=v, mask=mask), weights @ v)


def check_multihead_self_attention(call, rope=False):
    model, weights = plain_model(ModelConfig(**{**vars(CONFIG), "rope": rope}))
    weights = {name.removeprefix("layers.0.attn."): w for name, w in weights.items() if name.startswith("layers.0.attn.")}
    x, positions = torch.randn(2, 9, 16), torch.arange(2, 11)
    expected = model.layers[0].attend(x, model.cos[positions], model.sin[positions])
    assert_close(call(**SHAPE, weights=weights, in_features=x, token_positions=positions), expected)


def check_transformer_block(call):
    x = torch.randn(2, 12, 16)
    for norm in ("pre", "post", "none"):
        config = ModelConfig(**{**vars(CONFIG), "norm": norm})
        model, weights = plain_model(config)
        weights = {name.removeprefix("layers.0."): w for name, w in weights.items() if name.startswith("layers.0.")}
        result = call(**SHAPE, d_ff=24, config=config, weights=weights, in_features=x)
        assert_close(result, model.layers[0](x, model.cos, model.sin))


def check_transformer_lm(call):
    model, weights = plain_model()
    tokens = torch.randint(50, (2, 12))
    assert_close(call(config=CONFIG, weights=weights, in_indices=tokens), model(tokens))


def check_cross_entropy(call):
    logits, targets = torch.randn(6, 9) * 100, torch.randint(9, (6,))
    assert_close(call(inputs=logits, targets=targets), (logits.logsumexp(1) - logits[range(6), targets]).mean())


def check_get_batch(call):
    dataset = np.arange(100, 120, dtype=np.uint16)
    inputs, targets = call(dataset=dataset, batch_size=500, context_length=7, device="cpu")
    assert inputs.dtype == targets.dtype == torch.int64
    assert_close(targets, inputs + 1)
    assert_close(inputs, inputs[:, :1] + torch.arange(7))
    assert set(inputs[:, 0].tolist()) == set(range(100, 113))


def check_gradient_clipping(call):
    parameters = [nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(1))]
    gradients = [torch.randn(3), torch.randn(2)]
    for limit in (100.0, 0.1):
        for parameter, gradient in zip(parameters, gradients, strict=False):
            parameter.grad = gradient.clone()
        call(parameters=parameters, max_l2_norm=limit)
        factor = min(1.0, limit / (torch.cat(gradients).norm() + 1e-6).item())
        for parameter, gradient in zip(parameters, gradients, strict=False):
            assert_close(parameter.grad, gradient * factor)


def check_adamw(call):
    w = nn.Parameter(torch.randn(4))
    expected, m, v = w.detach().clone(), torch.zeros(4), torch.zeros(4)
    optimizer = call()([w], lr=0.1, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.01)
    for t in range(1, 4):
        w.grad = torch.randn(4)
        m, v = 0.9 * m + 0.1 * w.grad, 0.95 * v + 0.05 * w.grad**2
        expected = expected - 0.1 * 0.01 * expected - 0.1 * (m / (1 - 0.9**t)) / ((v / (1 - 0.95**t)).sqrt() + 1e-8)
        optimizer.step()
        assert_close(w.detach(), expected)


def check_schedule(call):
    settings = {"max_learning_rate": 1.0, "min_learning_rate": 0.1, "warmup_iters": 4, "cosine_cycle_iters": 10}
    expected = {0: 0.0, 1: 0.25, 4: 1.0, 6: 0.1 + 0.45 * 1.5, 7: 0.55, 10: 0.1, 25: 0.1}
    assert {it: pytest.approx(call(it=it, **settings)) for it in expected} == expected


def check_save_and_load(save, load, tmp_path):
    def trained(steps):
        torch.manual_seed(1)
        model = nn.Linear(3, 2)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
        for _ in range(steps):
            step(model, optimizer)
        return model, optimizer

    def step(model, optimizer):
        model(torch.ones(3)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    model, optimizer = trained(3)
    for out in (tmp_path / "new" / "checkpoint.pt", str(tmp_path / "other.pt"), io.BytesIO()):
        save(model=model, optimizer=optimizer, iteration=3, out=out)
        if isinstance(out, io.BytesIO):
            out.seek(0)
        restored = trained(0)
        assert load(src=out, model=restored[0], optimizer=restored[1]) == 3
        step(*restored)
        assert all(torch.equal(a, b) for a, b in zip(trained(4)[0].parameters(), restored[0].parameters(), strict=True))


GPT2 = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
TEXT = f"low lower lowest, it's newer {END_OF_TEXT}low newest 12 12 {END_OF_TEXT} low low wide"


def check_train_bpe(call, tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    words = Counter(word.encode() for document in TEXT.split(END_OF_TEXT) for word in regex.findall(GPT2, document))
    merges = naive_merges(words, 10)
    vocab, ours = call(input_path=path, vocab_size=256 + 1 + 10, special_tokens=[END_OF_TEXT])
    assert ours == merges
    assert set(vocab.values()) == {*(bytes([b]) for b in range(256)), END_OF_TEXT.encode(), *(a + b for a, b in merges)}


def check_tokenizer(call):
    vocab = dict(enumerate([*(bytes([b]) for b in range(256)), b"lo", b"low", END_OF_TEXT.encode()]))
    tokenizer = call(vocab=vocab, merges=[(b"l", b"o"), (b"lo", b"w")], special_tokens=[END_OF_TEXT])
    ids = tokenizer.encode(f"low lo{END_OF_TEXT}")
    assert ids == [257, 32, 256, 258]
    assert tokenizer.decode(ids) == f"low lo{END_OF_TEXT}"


def check_flash_attention(call, saves_lse=False):
    q, k, v, do = torch.randn(4, 3, 40, 16).unbind(0)
    for causal in (False, True):
        inputs = [t.clone().requires_grad_() for t in (q, k, v)]
        o = call().apply(*inputs, causal)
        scores = q @ k.mT / 4
        if causal:
            scores = scores.masked_fill(torch.ones(40, 40, dtype=torch.bool).triu(1), -math.inf)
        if saves_lse:
            lse = [t for t in o.grad_fn.saved_tensors if t.shape == (3, 40)]
            assert_close(lse, [scores.logsumexp(-1)])
        plain = [t.clone().requires_grad_() for t in (q, k, v)]
        expected = F.scaled_dot_product_attention(*plain, is_causal=causal)
        assert_close(o, expected)
        assert_close(torch.autograd.grad(o, inputs, do), torch.autograd.grad(expected, plain, do))


LOCAL = {
    "run_linear": check_linear,
    "run_embedding": check_embedding,
    "run_silu": check_silu,
    "run_softmax": check_softmax,
    "run_rmsnorm": check_rmsnorm,
    "run_swiglu": check_swiglu,
    "run_rope": check_rope,
    "run_scaled_dot_product_attention": check_attention,
    "run_multihead_self_attention": check_multihead_self_attention,
    "run_multihead_self_attention_with_rope": partial(check_multihead_self_attention, rope=True),
    "run_transformer_block": check_transformer_block,
    "run_transformer_lm": check_transformer_lm,
    "run_cross_entropy": check_cross_entropy,
    "run_get_batch": check_get_batch,
    "run_gradient_clipping": check_gradient_clipping,
    "get_adamw_cls": check_adamw,
    "run_get_lr_cosine_schedule": check_schedule,
    "get_tokenizer": check_tokenizer,
    "get_flashattention_autograd_function_pytorch": partial(check_flash_attention, saves_lse=True),
    "get_flashattention_autograd_function_triton": check_flash_attention,
}
# Each of these has its own test.
WITH_FILES = {"run_save_checkpoint", "run_load_checkpoint", "run_train_bpe"}


@pytest.mark.parametrize("adapter", LOCAL)
def test_the_call_of_an_adapter_equals_its_definition(adapter):
    LOCAL[adapter](partial(evaluate, adapter))


def test_save_and_load_checkpoint(tmp_path):
    check_save_and_load(partial(evaluate, "run_save_checkpoint"), partial(evaluate, "run_load_checkpoint"), tmp_path)


def test_train_bpe(tmp_path):
    check_train_bpe(partial(evaluate, "run_train_bpe"), tmp_path)


def plain_steps(make_optimizer=None):
    """Return a small module, the batch of both processes, and the gradients of the last step (three with an optimizer)."""
    torch.manual_seed(2)
    module, x = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2)), torch.randn(8, 4)
    for _ in range(3 if make_optimizer else 1):
        module.zero_grad()
        module(x).square().mean().backward()
        if make_optimizer:
            make_optimizer(module.parameters()).step()
    return module, x, [p.grad.clone() for p in module.parameters()]


def check_data_parallel(adapter, **arguments):
    """Compare the gradients that two processes reduce, each from half a batch, with the gradients of the batch."""
    module, x, expected = plain_steps()
    module.zero_grad()
    torch.manual_seed(3 + dist.get_rank())  # the wrapper must copy the weights of the first process
    if dist.get_rank():
        for parameter in module.parameters():
            nn.init.normal_(parameter)
    wrapped = evaluate(adapter, module=module, **arguments)
    wrapped(x.chunk(2)[dist.get_rank()]).square().mean().backward()
    assert_close([p.grad for p in module.parameters()], expected)


def check_fsdp():
    module, x, expected = plain_steps()
    module.zero_grad()
    weights = {name: p.detach().clone() for name, p in module.named_parameters()}
    mesh = init_device_mesh("cpu", (2,))
    wrapped = evaluate("get_fsdp", module=module, mesh=mesh, compute_dtype=None)
    assert all(p.to_local().numel() == p.numel() // 2 for p in wrapped.parameters())
    wrapped(x.chunk(2)[dist.get_rank()]).square().mean().backward()
    assert_close([p.grad.full_tensor() for p in wrapped.parameters()], expected)
    assert_close(evaluate("fsdp_gather_full_params", fsdp_model=wrapped), weights)


def check_sharded_optimizer():
    def train(make_optimizer):
        module, x, _ = plain_steps()
        optimizer = make_optimizer(module.parameters())
        for _ in range(3):
            optimizer.zero_grad()
            module(x).square().mean().backward()
            optimizer.step()
        return [p.detach() for p in module.parameters()], optimizer

    options = {"optimizer_cls": torch.optim.AdamW, "kwargs": {"lr": 0.1}}
    sharded, optimizer = train(lambda parameters: evaluate("get_sharded_optimizer", params=parameters, **options))
    assert_close(sharded, train(partial(torch.optim.AdamW, lr=0.1))[0])
    assert len(optimizer.optim.state) < len(sharded)


DISTRIBUTED = {
    "get_ddp": partial(check_data_parallel, "get_ddp"),
    "get_ddp_bucketed": partial(check_data_parallel, "get_ddp_bucketed", bucket_size_mb=0.00001),
    "get_fsdp": check_fsdp,
    "get_sharded_optimizer": check_sharded_optimizer,
}

if __name__ == "__main__":
    as_one_of_two(*DISTRIBUTED.values())


def test_distributed_adapters_in_two_processes(tmp_path):
    run_in_two_processes(__file__, tmp_path)


def test_every_call_of_the_page_is_checked():
    assert CALLS.keys() == LOCAL.keys() | WITH_FILES | DISTRIBUTED.keys() | {"fsdp_gather_full_params"}


def test_commands_of_the_page_exist():
    commands = [
        code for section in PAGE for row in section.rows for code in code_spans(row[-1]) if code.startswith("tilewright ")
    ]
    assert len(commands) > 15
    for command in commands:
        words = command.split()
        assert any(" ".join(words[1:end]) in COMMANDS for end in (2, 3)), command


def test_weights_round_trip():
    config = ModelConfig(vocab_size=50, context_length=8, d_model=16, num_layers=2, num_heads=4, d_ff=24, num_kv_heads=2)
    model = TransformerLM(config)
    weights = to_cs336(model)
    assert weights["token_embeddings.weight"].shape == (50, 16)
    assert weights["layers.1.attn.k_proj.weight"].shape == (8, 16)
    restored = from_cs336(weights)
    assert restored.keys() == model.state_dict().keys()
    assert all(torch.equal(restored[name], tensor) for name, tensor in model.state_dict().items())
    ablation = TransformerLM(ModelConfig(**{**vars(CONFIG), "ffn": "silu"}))
    assert {"layers.0.ffn.w1.weight", "layers.0.ffn.w2.weight"} <= to_cs336(ablation).keys()
    load_cs336(ablation, to_cs336(ablation))


def test_weights_that_cannot_be_converted():
    weights = to_cs336(GEGLU(8, 16))
    del weights["w1.weight"]
    with pytest.raises(UserError, match=re.escape("the weights lack w1.weight: expected all of w1.weight, w3.weight")):
        from_cs336(weights)
    experts = TransformerLM(ModelConfig(**{**vars(CONFIG), "num_experts": 2}))
    with pytest.raises(UserError, match="holds the weights of experts: expected a model without experts"):
        to_cs336(experts)


@pytest.mark.parametrize(
    ("name", "rows", "message"),
    [
        ("token_embeddings.weight", 60, "token_embeddings.weight has shape (60, 16): expected (50, 16)"),
        ("layers.0.attn.q_proj.weight", 8, "layers.0.attn.q_proj.weight has shape (8, 16): expected (16, 16)"),
        ("layers.1.ln1.weight", None, "the weights lack layers.1.ln1.weight: expected the shape (16,)"),
        ("layers.0.ln3.weight", 16, "the weights contain layers.0.ln3.weight: expected token_embeddings.weight, layers."),
    ],
)
def test_weights_must_have_the_names_and_shapes_of_the_course(name, rows, message):
    model = TransformerLM(CONFIG)
    weights = to_cs336(model) | {name: torch.zeros(rows or 0, 16)}
    if rows is None:
        del weights[name]
    with pytest.raises(UserError, match=f"^{re.escape(message)}"):
        load_cs336(model, weights)


@pytest.mark.parametrize(
    ("dataset", "batch_size", "context_length", "message"),
    [
        (np.zeros((9, 2), np.int64), 1, 4, r"dataset has shape \(9, 2\) and dtype int64: expected a 1-D array of integers"),
        (np.zeros(9), 1, 4, r"dataset has shape \(9,\) and dtype float64: expected a 1-D array of integers"),
        (np.arange(9), 0, 4, "batch_size is 0: expected at least 1"),
        (np.arange(9), 1, -4, "context_length is -4: expected at least 1"),
        (np.arange(9), 1, 9, "context_length is 9: expected less than the dataset's 9 tokens"),
    ],
)
def test_invalid_batches(dataset, batch_size, context_length, message):
    with pytest.raises(UserError, match=message):
        get_batch(dataset, batch_size, context_length)


def test_batches_of_every_kind_of_dataset_are_equal(tmp_path):
    ids = np.arange(40, dtype=np.uint16)
    write_tokens(tmp_path / "ids.tokens", [ids], vocab_size=40)
    batches = [
        get_batch(dataset, 4, 8, generator=torch.Generator().manual_seed(5))
        for dataset in (ids, ids.tolist(), torch.from_numpy(ids.astype(np.int32)), TokenDataset(tmp_path / "ids.tokens"))
    ]
    for batch in batches[1:]:
        assert_close(batch, batches[0])


def test_invalid_checkpoint_files(tmp_path):
    model = nn.Linear(2, 2)
    with pytest.raises(UserError, match=r"none\.pt does not exist"):
        load_checkpoint(tmp_path / "none.pt", model)
    (tmp_path / "text.pt").write_text("text")
    torch.save({"model": model.state_dict()}, tmp_path / "half.pt")
    for name in ("text.pt", "half.pt"):
        with pytest.raises(
            UserError, match=rf"cannot read the checkpoint .*{name}: expected a file that save_checkpoint wrote"
        ):
            load_checkpoint(tmp_path / name, model)
    # torch.load with weights_only=True rejects a NumPy integer, so the checkpoint stores an int.
    save_checkpoint(model, torch.optim.AdamW(model.parameters()), np.int64(7), tmp_path / "whole.pt")
    assert load_checkpoint(tmp_path / "whole.pt", model) == 7


def test_rope_needs_its_tables():
    with pytest.raises(ValueError, match=r"cos or sin is None: expected the tables of kernels\.rope_tables"):
        CausalSelfAttention(16, 2)(torch.randn(1, 4, 16))


def test_a_mask_of_numbers_is_an_error():
    q = torch.randn(2, 4, 8)
    with pytest.raises(ValueError, match=r"mask has dtype torch\.float32: expected torch\.bool"):
        scaled_dot_product_attention(q, q, q, torch.zeros(4, 4))
