"""Safetensors that become OpenVINO's own format at the first start."""

import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from app.core.config import ModelSettings
from app.llm.engine.openvino import conversion, converted
from app.llm.engine.openvino.compression import weight_constant
from app.llm.engine.openvino.conversion import convert
from app.llm.engine.openvino.converted import NotConvertedError, convert_once
from app.llm.engine.openvino.tracing import UnconvertibleError, to_openvino
from app.llm.models.progress import Progress
from app.llm.models.snapshot import OPENVINO_MODEL, Snapshot
from scripts import export_openvino
from tests.conftest import restored_logging
from tests.support.backends import (
    change_config,
    load_local,
    refusal,
    request,
    run,
    stages,
    tokens,
)
from tests.zoo import check, tiny

FLOAT32 = ModelSettings(source="local", name="tiny", dtype="float32")


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty HF_HOME."""
    home = tmp_path / "home"
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(home))
    monkeypatch.setenv("HF_HOME", str(home))
    return home


FILLS = f"echo x > $5/{OPENVINO_MODEL}"
"""What a converting process does at the least; its fifth argument is the folder."""


class Converter:
    """A shell's program in the place of the interpreter that runs a conversion."""

    def __init__(self, folder: Path) -> None:
        self.path, self.fifo, self._runs = folder / "python", folder / "fifo", folder / "runs"
        os.mkfifo(self.fifo)

    def does(self, commands: str) -> None:
        """Have the next conversions run commands of a shell."""
        new = self.path.with_suffix(".new")
        new.write_text(f"#!/bin/sh\necho x >> {self._runs}\n{commands}\n")
        new.chmod(0o755)
        new.rename(self.path)

    def runs(self) -> int:
        """How many conversions began."""
        return len(self._runs.read_text().split())


@pytest.fixture
def converter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Converter:
    """The program that runs in place of Python, and counts how often."""
    converter = Converter(tmp_path)
    monkeypatch.setattr(sys, "executable", str(converter.path))
    return converter


def start(
    folder: Path, revision: str | None = None, progress: Progress = lambda *_: None
) -> Snapshot:
    """The part of a service's start that has a model converted."""
    return convert_once(FLOAT32, Snapshot(folder, None, revision), progress)


@pytest.mark.full_size
def test_a_family_answers_as_generate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Greedy tokens of a converted Gemma 3 equal ``generate``'s, past a window and in a batch.

    ``make models`` tries all architectures.
    """
    monkeypatch.setattr(check, "ANSWER", 6)
    tiny.make("gemma3_text", tmp_path / "tiny")
    convert(FLOAT32, Snapshot(tmp_path / "tiny", None), tmp_path / "out", lambda *_: None)
    backend = load_local(tmp_path / "out", engine="openvino")
    assert check.faults(backend, check.Reference(tmp_path / "tiny"), (3, 300)) == []


def test_a_graph_computes_what_the_model_does(tiny_model_dir: Path) -> None:
    """The graph's logits are the model's, for a prompt and for a token after it."""
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32)
    ids = torch.arange(20, 30)[None]
    with torch.no_grad():
        expected = model(ids).logits.numpy()
    import openvino

    graph = to_openvino(model, lambda weight: weight_constant(weight, 16))
    exact = {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32"}
    steps = openvino.Core().compile_model(graph, "CPU", exact).create_infer_request()
    for first, end in ((0, 9), (9, 10)):
        given = {
            "input_ids": ids[:, first:end].numpy(),
            "attention_mask": np.ones((1, end), np.int64),
            "position_ids": np.arange(first, end)[None],
            "beam_idx": np.zeros(1, np.int32),
        }
        assert np.abs(steps.infer(given)["logits"] - expected[:, first:end]).max() < 1e-4


@pytest.mark.full_size
def test_killed_and_twice_at_once(home: Path, tiny_model_dir: Path) -> None:
    """A start that is killed leaves no model; of two starts at once one converts, both have it."""
    settings = FLOAT32.model_copy(update={"name": str(tiny_model_dir)})
    program = (
        "import sys; from app.core.config import ModelSettings; "
        "from app.llm.engine.openvino.converted import convert_once; "
        "from app.llm.models.snapshot import Snapshot; from pathlib import Path; "
        "convert_once(ModelSettings.model_validate_json(sys.argv[1]), "
        "Snapshot(Path(sys.argv[2]), None), lambda line, _=None: print(line, flush=True))"
    )
    command = [sys.executable, "-c", program, settings.model_dump_json(), str(tiny_model_dir)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as killed:
        assert killed.stdout
        assert any(b"reading the weights" in line for line in killed.stdout)
        killed.send_signal(signal.SIGKILL)
    assert not [*home.rglob(OPENVINO_MODEL)]
    said: list[str] = []
    with ThreadPoolExecutor() as pool:
        starts = [
            pool.submit(convert_once, settings, Snapshot(tiny_model_dir, None), stages(said))
            for _ in range(2)
        ]
        first, second = (start.result() for start in starts)
    assert first == second
    assert sum("reading the weights" in line for line in said) == 1
    assert "waiting for another start, which converts the model" in said
    assert [path.name for path in home.rglob(".partial")] == []
    said.clear()
    backend = load_local(tiny_model_dir, said, engine="openvino")
    assert said == [f"loading {tiny_model_dir} with OpenVINO"]
    assert (backend.info.backend, backend.info.dtype) == ("openvino", "float32")


def test_a_model_that_is_not_converted(tiny_model_dir: Path, home: Path, tmp_path: Path) -> None:
    """Gemma 2's soft cap is found before its weights are read, and one line names it."""
    folder = shutil.copytree(tiny_model_dir, tmp_path / "tiny")
    change_config(folder, attn_logit_softcapping=50.0)
    assert "OpenVINO's paged attention has no softcap" in refusal(folder, engine="openvino")
    assert not home.exists()


def test_a_home_that_cannot_be_written(tiny_model_dir: Path, home: Path) -> None:
    """A model that is to be converted is refused, in one line that says why."""
    home.write_text("a file")
    line = refusal(tiny_model_dir, engine="openvino")
    assert "its converted weights cannot be kept (" in line
    assert "make HF_HOME writable" in line


def test_a_conversion_that_does_not_fit(
    tiny_model_dir: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A conversion that takes more memory than is free does not begin; the line has the numbers."""
    monkeypatch.setattr(converted, "available_memory", lambda: 1)
    line = refusal(tiny_model_dir, engine="openvino")
    assert "GB, and 0.0 GB are free: convert it on a larger machine" in line
    assert [*home.rglob("*.xml")] == []


def test_files_that_change_are_converted_again(
    home: Path, tiny_model_dir: Path, converter: Converter, tmp_path: Path
) -> None:
    """Other weights of the same size are converted again, and the earlier conversion is removed."""
    folder = shutil.copytree(tiny_model_dir, tmp_path / "tiny")
    converter.does(FILLS)
    first = start(folder)
    assert start(folder) == first
    assert converter.runs() == 1
    file = folder / "model.safetensors"
    weights = bytearray(file.read_bytes())
    weights[len(weights) // 2] ^= 1
    file.write_bytes(weights)
    second = start(folder)
    assert converter.runs() == 2
    assert [path.parent for path in home.rglob(OPENVINO_MODEL)] == [second.directory]
    assert second.directory != first.directory


def test_a_revision_is_converted_once_on_each_machine(
    home: Path, tiny_model_dir: Path, converter: Converter, tmp_path: Path
) -> None:
    """A repository's commit names its files: a copy with other times is not converted again."""
    converter.does(FILLS)
    first = start(tiny_model_dir, "commit 1")
    folder = shutil.copytree(tiny_model_dir, tmp_path / "copy", copy_function=shutil.copyfile)
    assert start(folder, "commit 1") == first
    assert converter.runs() == 1
    assert start(folder, "commit 2") != first


@pytest.mark.parametrize(
    ("does", "reason"),
    [
        ("kill -KILL $$", "its conversion was killed, most likely because memory ran out"),
        ("kill -ABRT $$", "its conversion ended with code -6"),
        ("echo 'failed: OpenVINO has no aten::x'", "OpenVINO has no aten::x"),
    ],
)
def test_a_conversion_that_fails(
    home: Path, tiny_model_dir: Path, converter: Converter, does: str, reason: str
) -> None:
    """One line says why, nothing that was written stays, and the next start tries again."""
    converter.does(f"{FILLS}; {does}")
    with pytest.raises(NotConvertedError) as caught:
        start(tiny_model_dir)
    assert str(caught.value) == reason
    assert [*home.rglob("*.xml")] == []
    converter.does(FILLS)
    assert start(tiny_model_dir).directory.is_dir()


@pytest.mark.parametrize("end", ["", "kill -KILL $$"])
def test_two_starts_at_once(
    home: Path, tiny_model_dir: Path, converter: Converter, end: str
) -> None:
    """One of two starts converts, and the other waits for it, also if it ends without a model."""
    lines: SimpleQueue[str] = SimpleQueue()

    def told(line: str, _: int | None = None, /) -> None:
        lines.put(line)

    awaited = {"begun", "waiting for another start, which converts the model"}
    converter.does(f"{FILLS}; echo begun; read -r _ < {converter.fifo}; {end}")
    with ThreadPoolExecutor() as pool:
        starts = [pool.submit(start, tiny_model_dir, None, told) for _ in range(2)]
        while awaited:
            awaited.discard(lines.get(timeout=60))
        converter.does(FILLS)
        converter.fifo.write_text("go\n")
        errors = [one.exception() for one in starts]
    assert sum(error is not None for error in errors) == bool(end)
    assert len([*home.rglob(OPENVINO_MODEL)]) == 1
    assert converter.runs() == 1 + bool(end)


def test_a_start_is_killed_and_its_conversion_is_not(
    home: Path, tiny_model_dir: Path, converter: Converter
) -> None:
    """The next start waits for the process that still writes, and then converts for itself."""
    converter.does(f"{FILLS}; echo begun; read -r _ < {converter.fifo}")
    processes = multiprocessing.get_context("fork")
    ours, theirs = processes.Pipe()
    killed = processes.Process(
        target=start, args=(tiny_model_dir, None, lambda line, _=None: theirs.send(line))
    )
    killed.start()
    while ours.recv() != "begun":
        pass
    killed.kill()
    killed.join()
    lines: SimpleQueue[str] = SimpleQueue()

    def told(line: str, _: int | None = None, /) -> None:
        lines.put(line)

    with ThreadPoolExecutor() as pool:
        second = pool.submit(start, tiny_model_dir, None, told)
        assert lines.get(timeout=60) == "waiting for another start, which converts the model"
        converter.does(FILLS)
        converter.fifo.write_text("go\n")
        assert second.result().directory.is_dir()
    assert converter.runs() == 2


def test_a_full_disk(tiny_model_dir: Path, tmp_path: Path) -> None:
    """Weights that do not fit on the disk end the conversion with a line that says so."""
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "openvino_model.bin").symlink_to("/dev/full")
    with pytest.raises(OSError, match="cannot be written, is the disk full"):
        convert(FLOAT32, Snapshot(tiny_model_dir, None), folder, lambda *_: None)


@pytest.mark.full_size
def test_a_wrong_conversion_is_found(
    tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights that are another model's do not pass the comparison."""

    def negative(weight: Tensor, bits: int, *, grouped: bool = True) -> object:
        sign = -1 if weight.shape[0] == weight.shape[1] else 1
        return weight_constant(sign * weight, bits, grouped=grouped)

    monkeypatch.setattr(conversion, "weight_constant", negative)
    with pytest.raises(UnconvertibleError, match="its tokens differ from those of transformers"):
        convert(FLOAT32, Snapshot(tiny_model_dir, None), tmp_path / "out", lambda *_: None)


@pytest.mark.full_size
def test_an_export_is_served(
    tiny_model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """An exported folder is served in the precision that was asked for."""
    folder = tmp_path / "out"
    arguments = [str(tiny_model_dir), "--weights", "int4", "--output", str(folder)]
    with restored_logging():
        assert export_openvino.main(arguments) == 0
    assert f"MODEL__SOURCE=local MODEL__NAME={folder} make run" in capsys.readouterr().out
    backend = load_local(folder)
    assert (backend.info.backend, backend.info.dtype) == ("openvino", "int4")
    assert len(tokens(run(backend, request("r"))["r"])) == 8
    assert export_openvino.main(arguments) == 1


@pytest.mark.full_size
def test_a_failed_export_leaves_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """An export that fails says why, and half a model never looks like one."""
    model = tmp_path / "tiny"
    tiny.make("gemma2", model)
    with restored_logging():
        assert export_openvino.main([str(model), "--output", str(tmp_path / "out")]) == 1
    assert "has no softcap: serve it with transformers" in capsys.readouterr().err
    assert [*tmp_path.iterdir()] == [model]


@pytest.mark.parametrize(("bits", "step"), [(8, 1 / 255), (4, 1 / 15), (16, 2**-9)])
@pytest.mark.parametrize("columns", [128, 96, 40])
def test_weights_are_rounded_to_the_nearest(bits: int, step: float, columns: int) -> None:
    """What OpenVINO reads is off by half a step of its group at most, whatever divides a row."""
    torch.manual_seed(0)
    weight = torch.randn(6, columns).bfloat16()
    weight[0] = 0
    import openvino

    node = weight_constant(weight, bits)
    model = openvino.Model([node], [])
    read = openvino.Core().compile_model(model, "CPU")([])[0]
    bound = 0.51 * step * 2 * np.abs(weight.float().numpy()).max()
    assert np.abs(read - weight.float().numpy()).max() <= bound + 1e-3
