"""A dozen architectures answer as ``model.generate``; ``make models`` tries all."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from app.utils.errors import ModelLoadError
from tests.support.backends import load_local
from tests.zoo import check, gguf_file, tiny

# Half of the time is transformers' own, which must not be measured; other tests run the same code.
pytestmark = pytest.mark.no_cover

LENGTHS = (3, 300)
"""Below and past the window and a step's chunk of a prompt."""

SERVED = ["cohere2", "gemma2", "gemma3_text", "glm4", "gpt2", "llama", "mixtral", "phi3", "qwen3"]


@pytest.fixture(autouse=True)
def _little_work(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Short answers, and one thread: more cost more than such small models give."""
    monkeypatch.setattr(check, "ANSWER", 6)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("kind", SERVED)
def test_an_architecture_answers_as_generate(kind: str, tmp_path: Path) -> None:
    """Greedy tokens equal ``generate``'s, alone and in a batch, with a window and in pieces."""
    tiny.make(kind, tmp_path)
    backend = load_local(tmp_path, engine="transformers")
    assert check.faults(backend, check.Reference(tmp_path), LENGTHS) == []


@pytest.mark.parametrize("kind", ["diffllama", "doge", "moshi"])
def test_attention_that_a_plan_cannot_say(kind: str, tmp_path: Path) -> None:
    """A mask of its own, another window, and a layer that runs twice give no wrong answer."""
    tiny.make(kind, tmp_path)
    try:
        backend = load_local(tmp_path, engine="transformers")
    except ModelLoadError as error:
        assert "attention with " in str(error)  # noqa: PT017 - right answers would do as well
    else:
        assert check.faults(backend, check.Reference(tmp_path), LENGTHS) == []


@pytest.mark.parametrize("kind", ["bamba", "prophetnet", "reformer"])
def test_positions_and_pieces_are_those_of_the_model(kind: str, tmp_path: Path) -> None:
    """A model that needs positions, one that pads them, and one without pieces answer rightly."""
    tiny.make(kind, tmp_path)
    backend = load_local(tmp_path, engine="transformers")
    assert check.faults(backend, check.Reference(tmp_path), LENGTHS) == []


def test_a_wrong_answer_is_found(tmp_path: Path) -> None:
    """The comparison fails for another model's answers."""
    tiny.make("llama", tmp_path / "llama")
    tiny.make("qwen3", tmp_path / "qwen3")
    backend = load_local(tmp_path / "llama", engine="transformers")
    found = check.faults(backend, check.Reference(tmp_path / "qwen3"), (3,))
    assert found[0] == "alone: prompts of 3 tokens"


@pytest.mark.usefixtures("tokenizer_here")
def test_openvino_answers_as_generate(tmp_path: Path) -> None:
    """Greedy tokens of a GGUF file equal those of the same weights in transformers."""
    tiny.make("qwen3", tmp_path)
    backend = load_local(gguf_file.write(tmp_path), engine="openvino")
    assert check.faults(backend, check.Reference(tmp_path), LENGTHS) == []
