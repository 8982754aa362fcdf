"""help() of a public name has what the source says beside its arguments: shapes, what returns."""

import ast
import inspect
import re
from pathlib import Path

import pytest

import gold_kernels
import gold_trainer

FUNCTIONS = [name for name in gold_kernels.__all__ if name[0].islower()]
MODULES = [name for name in gold_kernels.__all__ if name.endswith("Loss") and name != "RowLoss"]
SHAPE = re.compile(r"# (\([^)]*\))")


def shapes(function) -> dict[str, str]:
    """Arguments that are tensors -> their shapes, from the comments of the signature."""
    file = Path(inspect.getsourcefile(function))
    lines = file.read_text(encoding="utf-8").splitlines()
    start = inspect.getsourcelines(function)[1]
    (node,) = (
        node
        for node in ast.walk(ast.parse("\n".join(lines)))
        if isinstance(node, ast.FunctionDef)
        and start == min([node.lineno, *(mark.lineno for mark in node.decorator_list)])
    )
    found = {}
    for argument in [*node.args.args, *node.args.kwonlyargs]:
        comment = SHAPE.search(lines[argument.lineno - 1])
        if argument.annotation is not None and "Tensor" in ast.dump(argument.annotation):
            found[argument.arg] = "" if comment is None else comment[1]
    return {name: shape for name, shape in found.items() if shape}


def assert_shapes(function):
    text = " ".join((function.__doc__ or "").split())
    for name, shape in shapes(function).items():
        assert f"{name} {shape}" in text, f"{name} {shape} of {function.__qualname__}"
    return text


@pytest.mark.parametrize("name", [n for n in FUNCTIONS if n != "peak_extra_bytes"])
def test_help_of_a_function_has_the_shape_of_each_tensor_and_what_is_refused(name):
    function = inspect.unwrap(getattr(gold_kernels, name))
    assert len(shapes(function)) >= 2
    text = assert_shapes(function)
    assert "Returns " in text and "Raises ValueError" in text
    assert name.startswith("head_") or "budget_bytes" in text or "in_place" in text


@pytest.mark.parametrize("name", MODULES)
def test_help_of_a_module_s_call_has_shapes_or_names_the_function_that_has_them(name):
    forward = getattr(gold_kernels, name).forward
    meant = re.search(r"as in (\w+)\.", forward.__doc__)
    if meant is None:
        assert_shapes(forward)
    else:
        assert set(shapes(forward)) <= set(shapes(getattr(gold_kernels, meant[1])))


@pytest.mark.parametrize("name", gold_kernels.__all__)
def test_every_public_name_has_a_help_of_its_own(name):
    public = getattr(gold_kernels, name)
    text = inspect.getdoc(public)
    assert len(text.split()) > 10
    is_elsewhere = re.search(r"\b(LinearOptions|LossOptions|CallTensors)\b", text)
    assert not is_elsewhere or "gold_kernels.engine.options" in text, "help() cannot find them"
    for method in ("forward", "from_tokenizers", "align", "report"):
        own = vars(public).get(method) if inspect.isclass(public) else None
        assert own is None or getattr(public, method).__doc__, f"{name}.{method}"


def test_public_names_of_the_trainer_are_listed_before_they_are_imported():
    assert len(gold_trainer.__all__) >= 4
    assert set(gold_trainer.__all__) <= set(dir(gold_trainer))
