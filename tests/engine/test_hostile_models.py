"""Hostile or broken model folders end in one line, before a library takes memory for them."""

import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from app.core.config import ModelSettings
from app.llm.engine.echo import EchoBackend
from app.llm.models.description import read_gguf
from app.llm.models.snapshot import Snapshot
from app.llm.protocol import EngineInfo
from app.llm.tokenizer import PromptTokenizer
from app.utils.errors import ModelLoadError, ValidationFailedError
from tests.support import backends
from tests.support.tiny_gguf import make_tiny_gguf
from tests.support.tiny_model import split_weights

# With auto a model is converted for OpenVINO first.
load_local = partial(backends.load_local, engine="transformers")
refusal = partial(backends.refusal, engine="transformers")


@pytest.fixture
def model(tiny_model_dir: Path, tmp_path: Path) -> Path:
    """A copy of the tiny model that tests may break."""
    return shutil.copytree(tiny_model_dir, tmp_path / "model")


def edit(path: Path, **changes: Any) -> None:
    """Change members of a JSON file."""
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def set_number(gguf: Path, key: str, value: int) -> None:
    """Change a 32-bit number in the header of a GGUF file."""
    data = bytearray(gguf.read_bytes())
    # The value follows the name and the number of its type.
    at = data.index(key.encode()) + len(key) + 4
    data[at : at + 4] = value.to_bytes(4, "little")
    gguf.write_bytes(data)


# --- Templates and tokenizers ---------------------------------------------------------------------


@pytest.mark.parametrize("template", ["{{ 1 // 0 }}", "{% for %}"])
def test_a_broken_template(model: Path, tmp_path: Path, template: str) -> None:
    """A folder, and a GGUF file on OpenVINO, whose chat template cannot be rendered is refused."""
    (model / "chat_template.jinja").write_text(template)
    whole = make_tiny_gguf(tmp_path / "tiny.gguf", template=template)
    for path in (model, whole):
        line = refusal(path)
        assert line.startswith(f"the chat template of {path} cannot be used: ")


def test_a_tokenizer_that_panics_at_load(model: Path) -> None:
    """A panic of the tokenizers library, which is no Exception, ends in one line."""
    edit(
        model / "tokenizer.json",
        normalizer={"type": "Precompiled", "precompiled_charsmap": "AAAA"},
    )
    line = refusal(model)
    assert line.startswith(f"the tokenizer in {model} cannot be loaded (")
    assert "Cannot parse precompiled_charsmap" in line


@pytest.mark.parametrize(
    "changes",
    [
        {"pre_tokenizer": {"type": "FixedLength", "length": 0}},
        {"model": {"type": "Unigram", "unk_id": None, "vocab": [["a", 0.0]]}},
    ],
    ids=["panic", "exception"],
)
async def test_a_tokenizer_that_fails_on_a_prompt(changes: dict[str, Any]) -> None:
    """A panic or an error of the tokenizers library at encoding is an error of the request."""
    info = EchoBackend().info
    broken = json.dumps(json.loads(info.tokenizer_json) | changes)
    fields = {name: getattr(info, name) for name in info.__struct_fields__}
    tokenizer = PromptTokenizer(EngineInfo(**{**fields, "tokenizer_json": broken}))
    with pytest.raises(ValidationFailedError, match="tokenizer fails on this prompt") as caught:
        await tokenizer.run(tokenizer.encode_text, "the inn")
    assert 400 <= caught.value.status < 500
    tokenizer.close()


# --- Links ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    ["model.safetensors", "tokenizer.json", "extra.json", "additional_chat_templates/tool.jinja"],
)
def test_a_link_out_of_the_folder_is_refused(model: Path, tmp_path: Path, name: str) -> None:
    """A link to a file elsewhere is refused, and the line names it."""
    path, secret = model / name, tmp_path / "secret"
    secret.write_text("{}")
    path.parent.mkdir(exist_ok=True)
    path.unlink(missing_ok=True)
    path.symlink_to(secret)
    assert refusal(model).startswith(f"{path} leads out of {model}, which is refused: ")


def test_an_index_that_names_files_elsewhere_is_refused(model: Path, tmp_path: Path) -> None:
    """The index of the weights cannot lead out of the folder either."""
    first, _ = split_weights(model)
    shutil.move(model / first, tmp_path / first)
    index = model / "model.safetensors.index.json"
    index.write_text(index.read_text().replace(first, f"../{first}"))
    assert refusal(model).startswith(f"{model / '..' / first} leads out of {model}, ")


def test_links_inside_the_folder_and_in_the_hubs_cache_are_followed(
    model: Path, tmp_path: Path
) -> None:
    """A snapshot's links to the blobs beside it, links within a folder and to it are no danger."""
    blobs, snapshot = tmp_path / "cache" / "blobs", tmp_path / "cache" / "snapshots" / "abc"
    shutil.move(model, blobs)
    snapshot.mkdir(parents=True)
    for blob in blobs.iterdir():
        (snapshot / blob.name).symlink_to(f"../../blobs/{blob.name}")
    assert load_local(snapshot).info.backend == "transformers"
    (blobs / "again.json").symlink_to("config.json")
    (tmp_path / "link").symlink_to(blobs)
    assert load_local(tmp_path / "link").info.backend == "transformers"


# --- Sizes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("vocab_size", 10**12),
        ("vocab_size", 10**6),
        ("vocab_size", "many"),
        ("hidden_size", 10**6),
        ("hidden_size", 1e300),
        ("intermediate_size", 10**6),
        ("num_hidden_layers", 10**9),
        ("num_hidden_layers", 1000),
        ("num_hidden_layers", -1),
        ("num_attention_heads", 10**12),
        ("head_dim", 10**12),
        ("text_config", {"num_hidden_layers": 10**9}),
    ],
)
def test_a_size_that_the_weights_cannot_have(model: Path, name: str, value: object) -> None:
    """A size in config.json beyond the weights is refused before a library reads it."""
    edit(model / "config.json", **{name: value})
    line = refusal(model)
    assert line.startswith(f"{model / 'config.json'} is corrupt, since its ")
    assert "num_hidden_layers" in line or name in line


@pytest.mark.parametrize("value", [None, 0, 1.5, [1]])
@pytest.mark.parametrize("name", ["vocab_size", "num_hidden_layers", "num_attention_heads"])
def test_a_size_that_is_none(model: Path, name: str, value: object) -> None:
    """Nulls, zeros and other kinds of values are an error of one line, too."""
    edit(model / "config.json", **{name: value})
    assert "cannot be loaded (" in refusal(model)


@pytest.fixture
def _little_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """One GiB is free."""
    monkeypatch.setattr("app.llm.engine.cache_size.available_memory", lambda: 2**30)


@pytest.mark.parametrize("length", [10**9, 10**15])
@pytest.mark.usefixtures("_little_memory")
def test_a_context_beyond_the_memory(model: Path, length: int) -> None:
    """A context whose cache exceeds the memory many times is refused before any is taken."""
    edit(model / "config.json", max_position_embeddings=length)
    assert refusal(model).startswith(f"a context of {length} tokens takes ")


def test_a_deeply_nested_configuration(model: Path) -> None:
    """JSON that exceeds the parser's recursion is a corrupt file."""
    path = model / "config.json"
    path.write_text("[" * 100_000)
    assert refusal(model) == f"{path} is corrupt: delete it and download it again"


@pytest.mark.parametrize("key", ["block_count", "embedding_length", "attention.head_count"])
def test_a_gguf_file_with_absurd_sizes(tmp_path: Path, key: str) -> None:
    """A size in a GGUF file's header beyond its tensors is refused for both engines."""
    path = make_tiny_gguf(tmp_path / "tiny.gguf")
    set_number(path, f"llama.{key}", 2**31)
    with pytest.raises(ModelLoadError, match=f"its llama.{key} is {2**31}"):
        read_gguf(ModelSettings(source="local", name=str(path)), Snapshot(path.parent, path.name))
    for engine in ("auto", "transformers"):
        assert f"its llama.{key} is {2**31}" in refusal(path, engine=engine)


@pytest.mark.usefixtures("_little_memory")
def test_a_gguf_file_with_an_absurd_context(tmp_path: Path) -> None:
    """A context of four billion tokens in a GGUF file is refused."""
    path = make_tiny_gguf(tmp_path / "tiny.gguf")
    set_number(path, "llama.context_length", 2**32 - 1)
    assert refusal(path).startswith(f"a context of {2**32 - 1} tokens takes ")
