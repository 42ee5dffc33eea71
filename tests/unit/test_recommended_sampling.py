"""What a model's files recommend for sampling."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from app.llm.models.gguf_header import GgufHeader
from app.llm.models.recommended_sampling import recommended_sampling
from app.llm.models.snapshot import Snapshot
from app.llm.protocol import SAMPLING_FIELDS

QWEN = {"do_sample": True, "temperature": 0.7, "top_p": 0.8, "top_k": 20, "repetition_penalty": 1.1}


def read(folder: Path, content: Any, supported: tuple[str, ...] = SAMPLING_FIELDS) -> Any:
    """The recommendation of a generation_config.json."""
    text = content if isinstance(content, str) else json.dumps(content)
    (folder / "generation_config.json").write_text(text, encoding="utf-8")
    return recommended_sampling(Snapshot(folder, None), None, supported)


def test_generation_config_is_read(tmp_path: Path) -> None:
    """Sampling fields of generation_config.json are read, and nothing else of it."""
    expected = {name: value for name, value in QWEN.items() if name != "do_sample"}
    assert read(tmp_path, QWEN) == expected
    assert read(tmp_path, {"eos_token_id": [1, 2], "top_k": -1, "temperature": None}) == {}
    assert recommended_sampling(Snapshot(tmp_path / "none", None), None, SAMPLING_FIELDS) == {}


def test_the_header_of_a_gguf_file_is_read(tmp_path: Path) -> None:
    """The keys general.sampling.* of a GGUF file are read, and no file beside it."""
    read(tmp_path, QWEN)
    metadata = {"general.sampling.temp": 0.5, "general.sampling.penalty_repeat": 1.25}
    header = GgufHeader(metadata, {}, 0)
    found = recommended_sampling(Snapshot(tmp_path, "m.gguf"), header, SAMPLING_FIELDS)
    assert found == {"temperature": 0.5, "repetition_penalty": 1.25}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", 2.5),
        ("temperature", "0.7"),
        ("top_k", True),
        ("top_p", 0),
        ("top_k", 1.5),
        ("top_k", -2),
        ("min_p", [0.1]),
        ("repetition_penalty", 0.0),
    ],
)
def test_what_no_request_may_ask_for_is_left_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str, value: Any
) -> None:
    """A value that is not possible is left out with one warning that names it."""
    with caplog.at_level(logging.WARNING, logger="llm_service"):
        assert read(tmp_path, {name: value, "top_p" if name != "top_p" else "min_p": 0.5}) == {
            "top_p" if name != "top_p" else "min_p": 0.5
        }
    (record,) = caplog.records
    assert name in record.getMessage()


@pytest.mark.parametrize("content", ["", "[]", "{", '{"temperature": NaN}'])
def test_a_file_that_is_no_json_recommends_nothing(tmp_path: Path, content: str) -> None:
    """A broken file recommends nothing; the libraries say what is wrong with it."""
    assert read(tmp_path, content) == {}


def test_what_the_engine_does_not_support_is_left_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A field that the engine would ignore is left out with one warning."""
    with caplog.at_level(logging.WARNING, logger="llm_service"):
        found = read(tmp_path, QWEN, ("temperature", "top_p", "top_k"))
    assert found == {"temperature": 0.7, "top_p": 0.8, "top_k": 20}
    (record,) = caplog.records
    assert record.getMessage() == (
        "the model recommends repetition_penalty, which this engine does not support"
    )
