"""Patched transformers models under Trainer, accelerate, PEFT, FSDP2 and torch.compile."""

import copy

import pytest
import torch

import tilewright
from apply_cases import assert_equal_training, make_batch, make_model, make_pair
from tilewright.errors import UserError

pytest.importorskip("transformers")


@pytest.fixture(autouse=True)
def reset_accelerate(monkeypatch):
    """Reset accelerate's process-wide state, which keeps the first requested precision."""
    state = pytest.importorskip("accelerate.state")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    yield
    state.AcceleratorState._reset_state(reset_partial_state=True)


def losses_of_trainer(model, folder, **options):
    transformers = pytest.importorskip("transformers")
    generator = torch.Generator().manual_seed(2)
    rows = torch.randint(2, 64, (16, 10), generator=generator)
    # Unequal lengths, so that batches are padded.
    data = [{"input_ids": row[: 10 - i % 3], "labels": row[: 10 - i % 3]} for i, row in enumerate(rows)]

    def collate(examples):
        padded = {
            key: torch.nn.utils.rnn.pad_sequence([e[key] for e in examples], True, value)
            for key, value in (("input_ids", 0), ("labels", -100))
        }
        return padded | {"attention_mask": (padded["labels"] != -100).long()}

    arguments = transformers.TrainingArguments(
        output_dir=str(folder), max_steps=10, per_device_train_batch_size=2, gradient_accumulation_steps=2, logging_steps=1,
        learning_rate=1e-2, report_to=[], disable_tqdm=True, save_strategy="no", use_cpu=True, seed=3, **options,
    )  # fmt: skip
    trainer = transformers.Trainer(model=model, args=arguments, train_dataset=data, data_collator=collate)
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("family", ["Llama", "Qwen3"])
def test_ten_trainer_steps_match_the_unpatched_model(family, tmp_path):
    plain, applied = make_pair(family)
    expected = losses_of_trainer(plain, tmp_path / "plain")
    assert len(expected) == 10
    assert expected[-1] < expected[0]
    assert losses_of_trainer(applied, tmp_path / "applied") == pytest.approx(expected, rel=2e-5)


def test_trainer_with_checkpointing_and_autocast(tmp_path):
    plain, applied = make_pair()
    options = {"gradient_checkpointing": True, "bf16": True}
    expected = losses_of_trainer(plain, tmp_path / "plain", **options)
    assert losses_of_trainer(applied, tmp_path / "applied", **options) == pytest.approx(expected, rel=2e-2)


def test_accelerate_can_wrap_and_unwrap_a_patched_model():
    accelerate = pytest.importorskip("accelerate")
    model = make_model("Llama")
    plain = copy.deepcopy(model)
    handle = tilewright.apply_to(model)
    accelerator = accelerate.Accelerator(cpu=True, mixed_precision="bf16")
    prepared = accelerator.prepare(model)
    batch = make_batch("left")
    accelerator.backward(prepared.train()(**batch).loss)
    assert all(p.grad is not None for p in model.parameters())
    with pytest.raises(UserError, match="unwrap_model"):
        handle.revert()
    accelerator.unwrap_model(prepared, keep_fp32_wrapper=False)
    handle.revert()
    assert torch.equal(model.eval()(**batch).loss, plain(**batch).loss)


@pytest.mark.parametrize("order", ["before", "after"])
@pytest.mark.parametrize("target", ["gate_proj", "lm_head"])
def test_lora_trains_whether_patched_before_or_after(order, target):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(
        r=2, target_modules=["q_proj", "up_proj", target], init_lora_weights=False, task_type="CAUSAL_LM", lora_dropout=0.0
    )
    model = make_model("Qwen3")
    other = copy.deepcopy(model)
    torch.manual_seed(4)
    plain = peft.get_peft_model(other, config)
    if order == "before":
        tilewright.apply_to(model)
    torch.manual_seed(4)
    adapted = peft.get_peft_model(model, config)
    if order == "after":
        tilewright.apply_to(adapted)
    if target == "lm_head":
        with pytest.warns(UserWarning, match="computing the loss from the logits"):
            assert_equal_training(plain, adapted, make_batch("right"))
    else:
        assert_equal_training(plain, adapted, make_batch("right"))


@pytest.fixture
def mesh():
    from torch import distributed
    from torch.distributed.device_mesh import init_device_mesh

    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    distributed.destroy_process_group()


@pytest.mark.parametrize("order", ["before", "after"])
def test_fsdp_shards_a_patched_model(order, mesh):
    from torch.distributed.fsdp import fully_shard

    plain = make_model("Llama")
    model = copy.deepcopy(plain)
    if order == "before":
        tilewright.apply_to(model)
    for part in (*model.model.layers, model.lm_head, model):
        fully_shard(part, mesh=mesh)
    if order == "after":
        handle = tilewright.apply_to(model)
        assert len(handle.replaced["norms"]) == 5
    batch = make_batch("left")
    losses = [each.train()(**batch, use_cache=False).loss for each in (plain, model)]
    torch.testing.assert_close(losses[1], losses[0])
    for loss in losses:
        loss.backward()
    sharded = dict(model.named_parameters())
    for name, parameter in plain.named_parameters():
        gradient = sharded[name].grad.full_tensor()
        torch.testing.assert_close(gradient, parameter.grad, rtol=1e-4, atol=1e-4 * parameter.grad.abs().max().item())


def test_gradient_checkpointing_matches():
    plain, applied = make_pair("Gemma2")
    applied.gradient_checkpointing_enable()
    assert_equal_training(plain, applied, make_batch("packed"))


def test_torch_compile_applies_padding_in_one_graph():
    plain, applied = make_pair("Llama", num_hidden_layers=1)
    compiled = torch.compile(applied, fullgraph=True, backend="eager")
    batch = make_batch("left")
    plain.train()
    applied.train()
    losses = [model(**batch, use_cache=False).loss for model in (plain, compiled)]
    torch.testing.assert_close(losses[1], losses[0])
    losses[1].backward()
    # Padding between tokens is unknown at capture time.
    with pytest.raises(RuntimeError, match="padding between tokens"):
        compiled(**make_batch("between"), use_cache=False)
