"""How far the code depends on names that other libraries may change without notice."""

from pathlib import Path

from app.core.config import PROJECT_ROOT
from tests.architecture.private_names import find

MAX_PRIVATE_NAMES = 19

SAMPLE = """
import sys
from logging import Handler

from huggingface_hub._inner import thing
from langchain_huggingface import HuggingFacePipeline
from torch import nn

from sample._own import neighbour


class Module(nn.Module):
    def __init__(self) -> None:
        self._buffers = {}
        self._mine = thing._secret

    def _apply(self) -> None:
        return neighbour._mine


class Model(HuggingFacePipeline):
    def _generate(self) -> None:
        return getattr(self, "_hidden")


class Plain(Handler):
    def emit(self) -> None:
        self._own_method()

    def _own_method(self) -> None:
        sys.modules["transformers.deep"] = None
"""


def test_few_private_names_of_other_libraries_are_used() -> None:
    """The number of private names of other libraries that app/ uses does not grow."""
    found = find(PROJECT_ROOT / "app")
    lines = "\n".join(f"{use.file}: {use.library}: {use.name}" for use in found)
    assert len(found) <= MAX_PRIVATE_NAMES, f"{len(found)} names:\n{lines}"


def test_each_kind_of_use_is_found(tmp_path: Path) -> None:
    """Imports, attributes, overridden names and replaced modules are found; own names are not."""
    (tmp_path / "sample").mkdir()
    (tmp_path / "sample" / "module.py").write_text(SAMPLE, encoding="utf-8")
    assert {(use.library, use.name) for use in find(tmp_path / "sample")} == {
        ("huggingface_hub", "huggingface_hub._inner.thing"),
        ("torch", "torch.nn.Module._buffers"),
        ("torch", "torch.nn.Module._apply"),
        ("attribute", "_secret"),
        ("attribute", "_hidden"),
        ("transformers", "sys.modules['transformers.deep']"),
    }
