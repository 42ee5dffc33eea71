"""How far code depends on names that others may change without notice."""

from pathlib import Path

import pytest

from app.core.config import PROJECT_ROOT
from tests.architecture.private_names import find, find_in_tests

MAX_PRIVATE_NAMES = 9
MAX_IN_TESTS = 1

SAMPLE = """
import sys
from logging import Handler

from huggingface_hub._inner import thing
from langchain_huggingface import HuggingFacePipeline
from torch import nn as layers
import torch.utils.data

from sample._own import neighbour


class Module(layers.Module):
    def __init__(self) -> None:
        self._buffers = {}
        self._mine = thing._secret

    def _apply(self) -> None:
        return neighbour._mine


class Deeper(Module):
    def _apply(self) -> None: ...

    def _load_from_state_dict(self) -> None: ...


class Data(torch.utils.data.Dataset):
    def _own(self) -> None: ...


class Model(HuggingFacePipeline):
    def _generate(self) -> None:
        return getattr(self, "_hidden")


class Plain(Handler):
    def emit(self) -> None:
        self._own_method()

    def _own_method(self) -> None:
        sys.modules["transformers.deep"] = None
"""


@pytest.mark.no_cover
def test_few_private_names_of_other_libraries_are_used() -> None:
    """The number of private names of other libraries that app/ uses does not grow."""
    found = find(PROJECT_ROOT / "app")
    lines = "\n".join(f"{use.file}: {use.library}: {use.name}" for use in found)
    assert len(found) <= MAX_PRIVATE_NAMES, f"{len(found)} names:\n{lines}"


def test_each_kind_of_use_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Imports, attributes, overridden names and replaced modules are found; own names are not."""
    (tmp_path / "sample").mkdir()
    (tmp_path / "sample" / "module.py").write_text(SAMPLE, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    assert {(use.library, use.name) for use in find(tmp_path / "sample")} == {
        ("huggingface_hub", "huggingface_hub._inner.thing"),
        ("layers.Module", "_buffers"),
        ("layers.Module", "_apply"),
        ("Module", "_apply"),
        ("Module", "_load_from_state_dict"),
        ("attribute", "_secret"),
        ("attribute", "_hidden"),
        ("transformers", "sys.modules['transformers.deep']"),
    }


@pytest.mark.no_cover
def test_tests_use_what_is_public() -> None:
    """Few tests know a private name of the service: what is private may change without them."""
    found = find_in_tests(PROJECT_ROOT / "tests", PROJECT_ROOT / "app")
    assert len(found) <= MAX_IN_TESTS, "\n".join([f"{len(found)} uses:", *found])


def test_each_use_in_a_test_is_found(tmp_path: Path) -> None:
    """An import, an attribute and a patched name count where they are the service's."""
    for folder, text in {
        "app": "def _run(): ...\n\nclass A:\n    def _step(self):\n        self._state = 1\n",
        "tests": (
            "from app.module import _run\n"
            "assert A()._state == thing._foreign\n"
            "patch.setattr(A, '_step', None)\n"
            "class Fake:\n    def f(self):\n        self._own = 1\n"
        ),
    }.items():
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "module.py").write_text(text, encoding="utf-8")
    found = find_in_tests(tmp_path / "tests", tmp_path / "app")
    assert found == [
        "tests/module.py:1: _run",
        "tests/module.py:3: _step",
        "tests/module.py:2: _state",
    ]
