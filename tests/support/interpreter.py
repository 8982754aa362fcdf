"""Triton's interpreter without half of its work.

It replaces the functions of triton.language by interpreted ones at every call of a device function,
which takes a look at each member of the module. Once in a launch and module of kernels is enough:
a launch puts the functions back at its end.
"""

from typing import Any

from triton.runtime import interpreter


def patch_once_a_launch() -> None:
    patch, run, patched = interpreter._patch_lang, interpreter.GridExecutor.__call__, set()

    def patch_once(fn: Any) -> Any:
        if id(fn.__globals__) in patched:
            return None  # only a launch, which is the first, asks what was replaced
        patched.add(id(fn.__globals__))
        return patch(fn)

    def run_with_nothing_patched(self: Any, *args: Any, **options: Any) -> Any:
        patched.clear()
        return run(self, *args, **options)

    interpreter._patch_lang = patch_once
    interpreter.GridExecutor.__call__ = run_with_nothing_patched
