"""A plan counts a field that changes a run's memory, or says that it does not."""

import pytest
import torch

from gold_kernels import head_means
from gold_trainer import GOLDConfig
from gold_trainer.__main__ import main
from gold_trainer.planning import passes
from gold_trainer.planning.ledger import Ledger
from gold_trainer.planning.memory import Planner, Setup
from gold_trainer.planning.remedies import remedies
from gold_trainer.planning.uncounted import FIELDS, uncounted
from support.cache_cases import save_pair
from support.plan_cases import subject_of

GPU = 1 << 30
COLOCATE = {"use_vllm": True, "vllm_mode": "colocate", "lmbda": 0.5}
COUNTED = {
    "gradient_checkpointing": True,
    "gradient_accumulation_steps": 2,
    "optim": "adamw_bnb_8bit",
    "chunk_size": 1,
    "logits_dtype": "bfloat16",
    "loss_budget_mib": 0.01,
    "lmbda": 1.0,
    "seq_kd": True,
    "teacher_offload": "cpu",
    "teacher_device": "cpu",
    "teacher_model_init_kwargs": {"quantization_config": {"load_in_4bit": True}},
}
NAMED = {
    "per_device_eval_batch_size": 64,
    "gradient_checkpointing_kwargs": {"offload": True},
    "teacher_batch_size": 1,
    "neftune_noise_alpha": 5.0,
    "optim_target_modules": ["q_proj"],
    "auto_find_batch_size": True,
    "rollout_compile": True,
    "loss_backend": "torch",
    "token_weighting": "picture_detail",
    "fsdp": True,
    "fsdp_config": {"version": 2},
    "deepspeed": {"zero_optimization": {"stage": 2}},
    "vllm_gpu_memory_utilization": 0.5,
}


def moments(setup=None, **fields):
    return dict(Planner(subject_of("qwen3", **fields), setup or Setup())._moments())


@pytest.fixture(scope="module")
def plain():
    return moments(gradient_checkpointing=False)


@pytest.mark.parametrize("field", COUNTED)
def test_a_field_that_is_counted_changes_the_plan(field, plain):
    fields = {"gradient_checkpointing": False, field: COUNTED[field]}
    assert moments(**fields) != plain


def test_a_field_that_is_not_counted_is_named():
    args = GOLDConfig("unused", use_cpu=True, lmbda=0.0)
    assert uncounted(args, Setup()) == []
    args.eval_strategy, args.use_vllm, args.vllm_mode = "steps", True, "colocate"
    for field, value in NAMED.items():
        setattr(args, field, value)
    lines = uncounted(args, Setup())
    assert FIELDS.keys() <= NAMED.keys() and len(lines) == len(NAMED)
    for field, value in NAMED.items():
        assert any(line.startswith(f"not counted: {field}={value!r}, ") for line in lines), field


def test_an_engine_of_vllm_takes_its_share_of_the_gpu():
    share = int(0.5 * GPU)
    fields = COLOCATE | {"vllm_gpu_memory_utilization": 0.5}
    found = moments(Setup(gpu_bytes=GPU), **fields)
    assert {parts["rollouts"] for parts in found.values()} == {share}
    asleep = moments(Setup(gpu_bytes=GPU), **fields, vllm_enable_sleep_mode=True)
    assert {name for name, parts in asleep.items() if parts["rollouts"]} == {"writing of rollouts"}
    subject = subject_of("qwen3", **fields)
    numbers = sum(p.numel() for p in subject.student.parameters())
    unknown = dict(Planner(subject, Setup())._moments())
    assert {parts["rollouts"] for parts in unknown.values()} == {2 * numbers}
    server = moments(Setup(gpu_bytes=GPU), use_vllm=True, lmbda=0.5)
    assert not any(parts["rollouts"] for parts in server.values())
    planner = Planner(subject, Setup(gpu_bytes=4 << 20))
    lines = [remedy.lines for remedy in remedies(planner, 1)]
    assert "vllm_enable_sleep_mode: true" in lines


@pytest.mark.parametrize("budget", [2 << 20, 64 << 20])
def test_the_loss_from_means_takes_the_rows_that_its_budget_holds(budget, monkeypatch):
    """512 rows of 4096 float32 logits are 8 MiB, their 16-bit parts 4 MiB."""
    found, loss_buffers = [], passes.loss_buffers
    monkeypatch.setattr(
        passes, "loss_buffers", lambda *call: found.append(loss_buffers(*call)) or found[-1]
    )
    from gold_kernels import fused_linear_mean_kl

    def tensor(*shape):
        return torch.empty(*shape, dtype=torch.bfloat16, device="meta")

    means = head_means(
        torch.zeros(512, 32), torch.zeros(4096, 32), torch.zeros(4096, 64), chunk_size=64
    )
    means = type(means)(*(part.to("meta") for part in means))
    with Ledger(passes.loss_buffers):
        hidden = tensor(512, 64).requires_grad_()
        fused_linear_mean_kl(hidden, tensor(4096, 64), means, budget_bytes=budget)
    (size,) = found
    rows = 512 * (4 * 4096 + 2 * 4096)
    assert min(budget, rows) * 0.6 < size <= budget


def test_a_run_from_means_is_planned_without_the_teachers_head(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    pair = save_pair(tmp_path, "qwen3")
    fields = {"beta": 0.0, "use_peft": True, "teacher_cache": tmp_path / "cache"}
    pair.cache("cache", teacher_cache_form="head_means", **dict(list(fields.items())[:2]))
    capsys.readouterr()
    monkeypatch.setattr("gold_trainer.planning.command.GIB", 2**10)
    argv = [word for word in pair.command(**fields) if "use_cpu" not in word]
    assert main(["plan", *argv, "--loss_backend=torch"]) == 0
    text = capsys.readouterr().out
    assert "teacher: " in text and "from its cache" in text
    assert "not counted: loss_backend='torch', buffers are those of triton's kernels" in text
    head = 2 * 384 * 64 / 2**10
    teacher = [line for line in text.splitlines() if line.startswith("teacher  ")]
    assert not teacher or float(teacher[0].split()[1]) < head
