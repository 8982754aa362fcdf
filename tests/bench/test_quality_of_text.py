"""The table of text: no file and no docstring is on both sides, every kind of row runs, and each
precision is what it says.
"""

import math
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import bench_quality as bench
from quality import tasks, text_rows, text_runs, text_table, texts, weights
from quality.scales import TEXT_TINY, with_weights
from transformers import LlamaForCausalLM

from support.inline_pool import Inline

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def parts() -> dict[str, list[str]]:
    return texts.collect(("python",), most_files=100)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, parts) -> Path:
    folder = tmp_path_factory.mktemp("text")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(texts, "collect", lambda *args: dict(parts))
        text_rows.draw(folder, TEXT_TINY, 1)
    tasks.school_teacher(folder, TEXT_TINY)
    tasks.school_student(folder, TEXT_TINY, "small")
    return folder


@pytest.fixture
def own(folder) -> text_runs.TextBench:
    return text_runs.TextBench(folder, TEXT_TINY, CPU)


def test_no_docstring_is_both_trained_on_and_held_out(parts):
    assert all(parts.values())
    everything = [text for part in parts.values() for text in part]
    assert len(everything) == len(set(everything))
    assert "python " in texts.sources(("python",))
    assert texts.files_of("a_package_that_is_not_here") == []


def test_a_run_of_each_kind_leaves_a_row(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(bench.Workers, "_new", lambda self: Inline())
    monkeypatch.setitem(text_rows.SCALES, "small", TEXT_TINY)
    path = tmp_path / "text.csv"
    options = ["--task", "text", "--small", "--rehearse", "--folder", str(folder)]
    assert bench.main([*options, "--output", str(path)]) == 0
    found = bench.rows_of(path)
    keys = [tuple(row[key] for key in text_rows.KEYS) for row in found]
    assert sorted(keys) == sorted(case.key for case in text_rows.small_cases())
    for row in found:
        assert row["status"] == "ok" and row["text"].startswith("python ")
        assert math.isclose(
            math.log2(float(row["perplexity"])) / float(row["bits_per_byte"]),
            math.log2(float(found[0]["perplexity"])) / float(found[0]["bits_per_byte"]),
            rel_tol=1e-3,
        )
        assert row["teacher_perplexity"] == found[0]["perplexity"]
    assert float(found[0]["agreement"]) == 1 and float(found[0]["kl"]) < 1e-5  # with itself


def test_a_quantised_student_is_its_teacher_in_fifteen_values_a_group(own):
    before = own.model("teacher").model.layers[0].mlp.up_proj
    layer = own.model("int4").model.layers[0].mlp.up_proj
    seen, kept = layer.weight, layer.parametrizations.weight.original
    assert torch.equal(kept, before.weight)
    scales = before.weight.unflatten(1, (-1, 32)).abs().amax(-1) / 7
    assert all(len(group.unique()) <= 15 for row in seen for group in row.split(32))
    far = (seen - before.weight).abs().unflatten(1, (-1, 32)) / scales[..., None]
    assert 0.4 < far.max() < 0.5001
    seen.mul(2).sum().backward()
    assert torch.equal(kept.grad, torch.full_like(kept, 2))


def test_precisions_are_of_one_loss_and_only_the_precise_one_is_exact_near_convergence(own):
    ids = own.tokens["held_out"][:4].long()
    student = own.model("teacher")
    with torch.no_grad():
        for weight in student.parameters():
            weight.mul_(1 + 0.01 * torch.randn_like(weight))
    tensors, _ = own.sides(student, ids, own.teacher)
    log_q, log_p = (
        (hidden.double() @ head.double().T).log_softmax(-1)
        for hidden, head in (tensors[:2], tensors[2:])
    )
    exact = (log_p.exp() * (log_p - log_q)).sum(-1).mean().item()
    errors = {}
    for precision in text_rows.PRECISIONS:
        case = text_rows.Case("int4", "jsd_0", precision)
        errors[precision] = abs(own.loss(student, ids, case, None).item() - exact) / exact
    assert errors["precise"] < 1e-3 < min(errors["fast"], errors["eager_bf16"])


def test_the_most_important_rows_of_all_seeds_come_first():
    cases = text_rows.cases_of(range(3))
    assert len({case.key for case in cases}) == len(cases)
    ranks = [case.rank for case in cases]
    assert ranks == sorted(ranks)
    first = {case.loss for case in cases if not case.rank and case.seed == 2}
    assert first == {"labels", *text_rows.LOSSES}
    rated = {(case.loss, case.rate) for case in cases if case.rank == 1}
    assert rated == {(name, rate) for name, rates in text_rows.RATES.items() for rate in rates}


def test_a_run_has_the_rate_and_the_steps_of_its_row(own, monkeypatch):
    monkeypatch.setattr(own, "scale", replace(TEXT_TINY, int4_steps=3))
    slow = own.run(text_rows.Case("small", "uld", rate=0.1))
    assert slow["learning_rate"] == pytest.approx(0.1 * TEXT_TINY.learning_rate)
    assert slow["steps"] == TEXT_TINY.steps and math.isfinite(slow["perplexity"])
    assert own.run(text_rows.Case("int4", "jsd_0"))["steps"] == 3


def test_uld_is_of_sorted_probabilities_and_others_are_not(own):
    """A student with permuted tokens is as sure as its teacher, of other tokens."""
    ids, student = own.tokens["held_out"][:2].long(), own.model("teacher")
    theirs = own.sides(student, ids, own.teacher)[0][2:]
    permuted = own.teacher.lm_head.weight.roll(7, 0)
    own.sides = lambda *args: ((theirs[0], permuted, *theirs), ids[:, 1:].flatten())
    assert own.loss(student, ids, text_rows.Case("small", "uld"), None).item() < 1e-3
    assert own.loss(student, ids, text_rows.Case("small", "jsd_0"), None).item() > 1e-2


def test_the_table_of_rates_has_one_seed_and_a_blank_where_none_was_run():
    def row(loss: str, rate: str, perplexity: str, **others: str) -> dict[str, str]:
        names = dict.fromkeys(text_table.MEASURES, "1") | {"perplexity": perplexity}
        keys = {"student": "small", "loss": loss, "precision": "precise", "crossentropy": "no"}
        return {**keys, "seed": "0", "rate": rate, "status": "ok", **names, **others}

    rows = [row("before", "1.0", "90"), row("teacher", "1.0", "10"), row("skew_kl", "1.0", "70")]
    rows += [row("uld", "1.0", "300"), row("uld", "0.1", "95"), row("jsd_0", "1.0", "60")]
    rows += [row("jsd_0", "1.0", "0", seed="1"), row("jsd_0", "3.0", "50")]
    rows.append(row("uld", "3.0", "0", status="ValueError: no"))
    assert text_table.rates(rows).splitlines()[2:] == [
        "| `before` | perplexity |  | 90.00 |  |",
        "| `uld` | perplexity | 95.00 | 300.00 |  |",
        "| `jsd_0` | perplexity |  | 60.00 | 50.00 |",
        "| `before` | KL, nats |  | 1.00 |  |",
        "| `uld` | KL, nats | 1.00 | 1.00 |  |",
        "| `jsd_0` | KL, nats |  | 1.00 | 1.00 |",
    ]
    assert text_table.rates(rows[:3]) == ""


def test_public_weights_are_the_teacher_and_their_layers_the_student(
    tmp_path, monkeypatch, own, parts
):
    """The file itself is 93 MB; its reader is transformers'."""
    config = own.model("teacher").config
    config.num_hidden_layers = 7
    whole = LlamaForCausalLM(config)
    tokenizer = texts.build_tokenizer(parts["teacher"], 300)

    def unpack(file: Path, folder: Path) -> SimpleNamespace:
        config.save_pretrained(folder)
        return SimpleNamespace(backend_tokenizer=tokenizer, eos_token_id=5)

    monkeypatch.setattr(texts, "collect", lambda *args: dict(parts))
    monkeypatch.setattr(weights, "unpack", unpack)
    monkeypatch.setattr(weights, "load", lambda file: whole)
    scale = with_weights(TEXT_TINY, Path("any.gguf"))
    scale = replace(scale, student=replace(scale.student, layers=3))
    text_rows.draw(tmp_path, scale, 1)
    mine = text_runs.TextBench(tmp_path, scale, CPU)
    assert "teacher" not in mine.tokens and (mine.tokens["distil"] == 5).any()
    assert mine.school_teacher()["agreement"] > 0.99
    student = mine.model("small", is_fresh=True)
    weights.thin_(student, mine.model("teacher"))
    for layer, place in zip(student.model.layers, (0, 3, 6), strict=True):
        theirs = whole.model.layers[place]
        assert torch.equal(layer.mlp.up_proj.weight, theirs.mlp.up_proj.weight)
    assert torch.equal(student.lm_head.weight, whole.model.embed_tokens.weight)
    before = mine.school_student("small")
    row = mine.run(text_rows.Case("small", "jsd_0"))
    assert before["steps"] == 2 and math.isfinite(row["kl"]) and row["tokens"] > 0
    with pytest.raises(SystemExit):
        bench.parse_options(["--weights", "any.gguf"])
