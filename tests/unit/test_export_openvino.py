"""make export-openvino: the commands it runs, and that a failed export leaves nothing behind."""

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from scripts import export_openvino


@pytest.fixture
def exporter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The command lines of an exporter that writes a model, or fails on one called broken."""
    commands: list[list[str]] = []

    def run(command: list[str], **_: Any) -> None:
        commands.append(command)
        folder = Path(command[-1])
        folder.mkdir()
        (folder / "openvino_model.bin").write_bytes(b"half")
        if "broken" in command:
            raise subprocess.CalledProcessError(1, command)
        if "silent" not in command:
            (folder / "openvino_model.xml").write_text("<net>")
        capped = 50.0 if "capped" in command else None
        (folder / "config.json").write_text(json.dumps({"attn_logit_softcapping": capped}))
        if command[4].startswith("owner/") or "capped" in command:
            (folder / "tokenizer.json").write_text("{}")

    monkeypatch.setattr(export_openvino, "make_tools", lambda: tmp_path / "optimum-cli")
    agreement = {"owner/far": 0.7}
    monkeypatch.setattr(
        export_openvino, "compare", lambda model, _: (agreement.get(model, 0.97), 0.012)
    )
    monkeypatch.setattr("scripts.export_openvino.subprocess.run", run)
    return commands


def test_the_exporter_is_installed_once_and_reports_to_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The telemetry package is removed, and a broken installation is started over."""
    commands: list[list[str]] = []
    faults = [subprocess.CalledProcessError(1, "pip")]

    def run(command: list[str], **_: Any) -> None:
        commands.append(command[command.index("--disable-pip-version-check") + 1 :])
        if "uninstall" in command and faults:
            raise faults.pop()

    def create(folder: Path, **_: Any) -> None:
        folder.mkdir(exist_ok=True)

    monkeypatch.setattr("scripts.export_openvino.subprocess.run", run)
    monkeypatch.setattr("scripts.export_openvino.venv.create", create)
    install = ["install", *export_openvino.REQUIREMENTS]
    uninstall = ["uninstall", "--yes", "openvino-telemetry"]
    folder = tmp_path / "tools"
    with pytest.raises(subprocess.CalledProcessError):
        export_openvino.make_tools(folder)
    assert export_openvino.make_tools(folder) == folder / "bin" / "optimum-cli"
    export_openvino.make_tools(folder)
    assert commands == [install, uninstall] * 2


def test_a_model_is_exported(
    exporter: list[list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The model is exported with the requested weights, and the next command is printed."""
    output = tmp_path / "out"
    status = export_openvino.main(["owner/name", "--weights", "int4", "--output", str(output)])
    assert status == 0
    assert (output / "openvino_model.xml").is_file()
    (command,) = exporter
    assert command[1:9] == [
        "export", "openvino", "--model", "owner/name",
        "--task", "text-generation-with-past", "--weight-format", "int4",
    ]  # fmt: skip
    said = capsys.readouterr().out
    assert "97% are those of transformers; their log-probabilities differ by 0.012" in said
    assert f"MODEL__SOURCE=local MODEL__NAME={output} make run" in said


@pytest.mark.parametrize(
    ("model", "line"),
    [
        ("broken", "optimum-cli failed: see its messages above"),
        ("silent", "the exporter wrote no openvino_model.xml: see its messages above"),
        ("mute", "the exporter wrote no tokenizer.json: see its messages above"),
        ("capped", "OpenVINO leaves out the soft cap of this model's attention"),
        ("owner/far", "That is more than rounding: serve it with transformers"),
    ],
)
def test_a_failed_export_leaves_nothing(
    exporter: list[list[str]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    model: str,
    line: str,
) -> None:
    """A failed export says why and leaves no file, so half a model never looks like one."""
    (tmp_path / "here").mkdir()
    assert export_openvino.main([model, "--output", str(tmp_path / "here" / "out")]) == 1
    assert capsys.readouterr().err.startswith(line)
    assert list((tmp_path / "here").iterdir()) == []


def test_a_tokenizer_of_transformers_5(exporter: list[list[str]], tmp_path: Path) -> None:
    """Files of a local model that the exporter cannot read are copied, and no others."""
    model, output = tmp_path / "model", tmp_path / "out"
    model.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "config.json"):
        (model / name).write_text(name)
    (model / "model.safetensors").write_text("weights")
    assert export_openvino.main([str(model), "--output", str(output)]) == 0
    assert {file.name for file in output.iterdir()} == {
        "openvino_model.xml", "openvino_model.bin", "config.json",
        "tokenizer.json", "tokenizer_config.json", "chat_template.jinja",
    }  # fmt: skip
    assert (output / "tokenizer.json").read_text() == "tokenizer.json"
    assert (output / "config.json").read_text() != "config.json"


def test_a_model_is_not_overwritten(exporter: list[list[str]], tmp_path: Path) -> None:
    """An export to a folder that exists fails without running the exporter."""
    assert export_openvino.main(["owner/name", "--output", str(tmp_path)]) == 1
    assert exporter == []


def test_the_default_output() -> None:
    """Each model and precision has its folder under models/."""
    output = export_openvino.default_output("owner/name", "int8")
    assert output.parts[-2:] == ("models", "name-int8-openvino")
