"""Which models OpenVINO runs, which fall back to transformers, and which are refused."""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import msgspec
import pytest
from tokenizers import Tokenizer

from app.core.config import ModelSettings
from app.llm.engine.openvino.loading import keep_telemetry_out
from app.llm.models.description import (
    ModelTokenizer,
    Vocabulary,
    gguf_vocabulary,
    json_vocabulary,
    read_tokenizer,
)
from app.llm.models.gguf_header import GgufHeader
from app.llm.models.snapshot import Snapshot
from app.llm.protocol import Backend, RegexGrammar
from tests.support import zoo_tokenizers as zoo
from tests.support.backends import load_local, refusal, request, run, tokens
from tests.support.tiny_gguf import make_tiny_gguf
from tests.support.vocabularies import own_and_librarys_vocabulary

WORDS = '{"model": {"vocab": {"a": 0}}, "decoder": {"type": "WordPiece"}}'


@pytest.fixture(scope="module")
def gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model as a GGUF file; a test must not change it."""
    return make_tiny_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf")


@pytest.fixture(scope="module")
def openvino_dir(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model in OpenVINO's own format; copy it before changing it."""
    keep_telemetry_out()
    import openvino_genai

    folder = tmp_path_factory.mktemp("ir")
    path = make_tiny_gguf(folder / "tiny.gguf")
    # With this option the library saves the converted model beside the GGUF file.
    openvino_genai.ContinuousBatchingPipeline(
        str(path), openvino_genai.SchedulerConfig(), "CPU", {"enable_save_ov_model": True}
    )
    path.unlink()
    names = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json")
    for name in (*names, "chat_template.jinja"):
        shutil.copy(tiny_model_dir / name, folder)
    return folder


@pytest.fixture
def copy(openvino_dir: Path, tmp_path: Path) -> Path:
    """A copy of the model in OpenVINO's own format that a test may change."""
    return shutil.copytree(openvino_dir, tmp_path / "model")


@pytest.fixture(scope="module")
def said() -> list[str]:
    """The progress messages of loading the GGUF file."""
    return []


@pytest.fixture(scope="module")
def loaded(gguf: Path, said: list[str]) -> Backend:
    """The GGUF file, loaded."""
    return load_local(gguf, said)


def test_auto_uses_openvino_for_a_gguf_file(loaded: Backend, gguf: Path, said: list[str]) -> None:
    """On a CPU, OpenVINO runs a GGUF file that it can read, and the info has the reason."""
    info = loaded.info
    assert (info.backend, info.dtype, info.context_length) == ("openvino", "f16", 512)
    assert info.backend_reason == "model.engine is auto, and OpenVINO is the fastest on a CPU"
    assert said == [f"loading {gguf} with OpenVINO"]


def test_the_vocabulary_equals_the_librarys(loaded: Backend, gguf: Path) -> None:
    """Grammars have the vocabulary that the library would read from the GGUF file."""
    own, librarys = own_and_librarys_vocabulary(gguf)
    assert own == librarys
    assert len(own[0]) == loaded.info.vocabulary_size


def test_special_tokens_may_have_any_characters() -> None:
    """A token with a character that is not a byte's symbol is taken as plain text."""
    metadata = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.tokens": ["<\uff5cend\uff5c>", "\u0120caf\u00c3\u00a9", "<|x|>"],
        "tokenizer.ggml.eos_token_id": 0,
    }
    assert gguf_vocabulary(GgufHeader(metadata, {}, 0)) == Vocabulary(
        ["<\uff5cend\uff5c>".encode(), " caf\u00e9".encode(), b"<|x|>"], 0
    )


@pytest.mark.parametrize(
    "metadata",
    [
        {"tokenizer.ggml.model": "t5", "tokenizer.ggml.tokens": ["a"]},
        {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.tokens": 3},
        {"tokenizer.ggml.tokens": ["a"]},
        {"tokenizer.ggml.model": "gpt2"},
    ],
)
def test_vocabularies_of_other_kinds_are_left_to_the_library(metadata: dict[str, Any]) -> None:
    """Only byte-level BPE and SentencePiece vocabularies are read here."""
    assert gguf_vocabulary(GgufHeader(metadata, {}, 0)) is None


@pytest.mark.parametrize(
    "kind", [zoo.gpt2, zoo.llama3, zoo.qwen, zoo.deepseek, zoo.llama2, zoo.gemma, zoo.unigram]
)
def test_the_vocabulary_of_a_tokenizers_file(kind: zoo.Build, tmp_path: Path) -> None:
    """The bytes of a text's tokens are the text; a space may stand before it."""
    tokenizer = kind(["<s>", "</s>", "<|im_end|>"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    size = tokenizer.get_vocab_size() + 2
    vocabulary = json_vocabulary(tmp_path / "tokenizer.json", size)
    assert vocabulary is not None
    assert len(vocabulary.tokens) == size
    assert vocabulary.tokens[-2:] == [b"", b""]
    text = "The capital of France is Paris.<|im_end|>"
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    assert b"".join(vocabulary.tokens[i] for i in ids).decode().strip() == text


@pytest.mark.parametrize("content", [None, "{", '{"model": {"vocab": 3}}', WORDS])
def test_a_tokenizers_file_of_another_kind(content: str | None, tmp_path: Path) -> None:
    """A file that is missing, broken or of another kind gives no vocabulary."""
    file = tmp_path / "tokenizer.json"
    if content is not None:
        file.write_text(content)
    assert json_vocabulary(file, 3) is None


def test_a_vocabulary_may_have_no_end_of_sequence() -> None:
    """Grammars can be compiled for a base model without an end-of-sequence token."""
    from app.llm.engine.openvino.vocabulary import vocabulary_tokenizer

    tokenizer = vocabulary_tokenizer(Vocabulary([b"a", b"", b"\xff"], None))
    assert tokenizer.get_eos_token_id() == -1
    assert len(tokenizer.get_vocab()) == 3


@pytest.mark.usefixtures("tokenizer_here")
def test_a_machine_without_a_folder_for_temporary_files(
    gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The model runs with the vocabulary that the library reads, and the log has the reason."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "missing"))
    with caplog.at_level("WARNING", logger="llm_service"):
        backend = load_local(gguf)
    assert "the library reads the vocabulary, which takes longer: " in caplog.text
    assert backend.info.backend == "openvino"
    assert len(tokens(run(backend, request("r"))["r"])) == 8


def test_the_description_is_read_without_torch(gguf: Path) -> None:
    """The description equals the one by transformers' GGUF reader, and torch is not imported."""
    settings = ModelSettings(source="local", name=str(gguf))
    expected = read_tokenizer(settings, Snapshot(gguf.parent, gguf.name))
    program = (
        "import os, sys; from app.llm.models import tokenizer_process as p; p.main(sys.argv[1:]); "
        "sys.stderr.write(str(sys.modules['torch'])); sys.stderr.flush(); os._exit(0)"
    )
    # The process ends when its standard input does.
    mine, its = os.pipe()
    try:
        done = subprocess.run(
            [sys.executable, "-c", program, settings.model_dump_json(), gguf.parent, gguf.name],
            stdin=mine,
            capture_output=True,
            text=True,
            check=True,
            timeout=100,
        )
    finally:
        os.close(mine)
        os.close(its)
    assert done.stderr == "None"
    assert msgspec.json.decode(done.stdout, type=ModelTokenizer) == expected


def test_no_telemetry_is_sent(loaded: Backend) -> None:
    """Importing OpenVINO does not load the package that reports to Google Analytics."""
    import openvino

    sender = openvino.tools.ovc.telemetry_utils.tm
    assert sender.__name__ == "openvino.tools.ovc.telemetry_stub"


def test_a_gguf_file_can_be_given_to_transformers(gguf: Path) -> None:
    """With the engine ``transformers`` a GGUF file is run by transformers."""
    assert load_local(gguf, engine="transformers").info.backend == "transformers"


def test_a_folder_in_openvinos_format(openvino_dir: Path, loaded: Backend) -> None:
    """A folder with OpenVINO's weights alone gives the same tokens as the GGUF file."""
    backend = load_local(openvino_dir)
    assert backend.info.backend == "openvino"
    assert backend.info.dtype == "uncompressed"
    expected = tokens(run(loaded, request("r"))["r"])
    assert tokens(run(backend, request("r"))["r"]) == expected


@pytest.mark.usefixtures("tokenizer_here")
def test_grammars_without_openvinos_tokenizer(copy: Path) -> None:
    """The vocabulary is that of tokenizer.json, as a converted folder has no other."""
    for path in copy.glob("openvino_*tokenizer.*"):
        path.unlink()
    backend = load_local(copy)
    asked = msgspec.structs.replace(request("r"), grammar=RegexGrammar("(yes|no)!"))
    said = tokens(run(backend, asked)["r"])
    decoded = Tokenizer.from_str(backend.info.tokenizer_json).decode(said)
    assert decoded in {"yes!", "no!"}


@pytest.mark.usefixtures("tokenizer_here")
def test_openvinos_format_is_preferred_on_a_cpu(copy: Path, tiny_model_dir: Path) -> None:
    """Auto runs a folder with both kinds of weights with OpenVINO."""
    shutil.copy(tiny_model_dir / "model.safetensors", copy)
    assert load_local(copy).info.backend == "openvino"
    assert load_local(copy, engine="transformers").info.backend == "transformers"


def test_a_gguf_file_keeps_its_precision(gguf: Path) -> None:
    """Only transformers rounds the weights of a GGUF file, and the line for OpenVINO says so."""
    assert load_local(gguf, quantization="int8").info.backend == "transformers"
    assert refusal(gguf, engine="openvino", quantization="int8") == (
        "model.engine is openvino, but OpenVINO computes in the precision that a model was "
        "converted to: set MODEL__ENGINE=auto"
    )


@pytest.fixture
def unreadable(tmp_path: Path) -> Path:
    """A complete GGUF file of a type that transformers reads and OpenVINO does not."""
    return make_tiny_gguf(tmp_path / "float32.gguf", half=False)


@pytest.mark.usefixtures("tokenizer_here")
def test_a_file_that_openvino_cannot_read_falls_back(
    unreadable: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Auto runs it with transformers, and a warning has the reason."""
    with caplog.at_level("WARNING", logger="llm_service"):
        backend = load_local(unreadable)
    assert backend.info.backend == "transformers"
    assert backend.info.backend_reason == (
        f"model.engine is auto, but OpenVINO cannot run {unreadable}: Unsupported quantization type"
    )
    (warning,) = [r for r in caplog.records if r.levelname == "WARNING"]
    assert warning.getMessage() == (
        f"OpenVINO cannot run {unreadable}: Unsupported quantization type; transformers will"
    )
    assert len(tokens(run(backend, request("r", max_tokens=4))["r"])) == 4


@pytest.mark.usefixtures("tokenizer_here")
def test_a_file_that_openvino_cannot_read_is_refused(unreadable: Path) -> None:
    """With the engine ``openvino`` there is no fallback."""
    assert refusal(unreadable, engine="openvino") == (
        f"OpenVINO cannot run {unreadable}: Unsupported quantization type; choose another model, "
        "or set MODEL__ENGINE=auto"
    )


@pytest.mark.usefixtures("tokenizer_here")
def test_an_unknown_shape_falls_back(gguf: Path, tmp_path: Path) -> None:
    """A file without the key that sizes OpenVINO's cache is run by transformers."""
    path = tmp_path / "odd.gguf"
    path.write_bytes(gguf.read_bytes().replace(b"llama.context_length", b"llama.contexts_other"))
    reason = f"OpenVINO cannot run {path}: its metadata have no number llama.context_length"
    info = load_local(path).info
    assert (info.backend, info.backend_reason) == (
        "transformers",
        f"model.engine is auto, but {reason}",
    )
    assert refusal(path, engine="openvino").startswith(reason)


def test_a_truncated_gguf_file(gguf: Path, tmp_path: Path) -> None:
    """A truncated file is refused before native code maps it."""
    whole = gguf.read_bytes()
    # In the last tensor, and in the metadata.
    for size in (len(whole) - 1, 300):
        path = tmp_path / "cut.gguf"
        path.write_bytes(whole[:size])
        line = refusal(path)
        assert line.startswith(f"{path} cannot be loaded (")
        assert line.endswith("if it is truncated or corrupt, delete it and download it again")


@pytest.mark.parametrize("content", [None, b""])
def test_openvino_weights_that_are_missing(copy: Path, content: bytes | None) -> None:
    """The line names weights that are missing or empty."""
    path = copy / "openvino_model.bin"
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    assert refusal(copy) == f"{path} is missing or empty: download the model again"


@pytest.mark.usefixtures("tokenizer_here")
@pytest.mark.parametrize("break_it", ["xml", "bin"])
def test_openvino_files_that_are_corrupt(copy: Path, break_it: str) -> None:
    """Corrupt files are refused without a fallback."""
    path = copy / f"openvino_model.{break_it}"
    path.write_bytes(path.read_bytes()[:100])
    line = refusal(copy)
    assert line.startswith(f"OpenVINO cannot run {copy}: ")
    assert line.endswith("; choose another model")


def test_openvinos_format_needs_openvino(openvino_dir: Path) -> None:
    """The line for OpenVINO's format with transformers has the settings that run it."""
    assert refusal(openvino_dir, engine="transformers") == (
        f"{openvino_dir} has only OpenVINO weights: set MODEL__DEVICE=cpu and MODEL__ENGINE=auto, "
        "or choose a model with safetensors or GGUF weights"
    )


def test_a_broken_tokenizer(copy: Path) -> None:
    """The line is the error of the process that reads the tokenizer."""
    (copy / "tokenizer.json").write_text("{")
    assert refusal(copy).startswith(f"the tokenizer in {copy} cannot be loaded (")


def test_the_reading_process_dies(gguf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The line for a killed reading process differs from that for a broken model."""
    popen = subprocess.Popen

    def killed(*args: Any, **kwargs: Any) -> Any:
        process = popen(*args, **kwargs)
        process.kill()
        return process

    monkeypatch.setattr("app.llm.models.tokenizer_process.subprocess.Popen", killed)
    assert refusal(gguf) == (
        "reading the model's tokenizer ended with code -9: start again; if it stays, set "
        "MODEL__ENGINE=transformers"
    )


@pytest.mark.usefixtures("tokenizer_here")
@pytest.mark.model
@pytest.mark.parametrize("engine", ["openvino", "transformers"])
def test_a_template_of_ones_own_replaces_the_models(
    gguf: Path, tiny_model_dir: Path, tmp_path: Path, engine: str
) -> None:
    """model.chat_template names a file that both engines serve instead of the model's own."""
    model = gguf if engine == "openvino" else tiny_model_dir
    path = tmp_path / "own.jinja"
    path.write_text("{% for m in messages %}é{{ m.content }}{% endfor %}", encoding="utf-8")
    info = load_local(model, engine=engine, chat_template=str(path)).info
    assert info.chat_template == path.read_text(encoding="utf-8")
