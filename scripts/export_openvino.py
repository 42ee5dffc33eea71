"""Convert a safetensors model to OpenVINO's own format, for ``MODEL__ENGINE=openvino``.

The exporter, optimum-intel, needs an older transformers than the service. It is installed once, in
a separate environment under .tools/ (git-ignored; several GB, because it needs torch).
"""

import argparse
import json
import shutil
import subprocess
import sys
import venv
from collections.abc import Sequence
from pathlib import Path

from app.core.config import PROJECT_ROOT

TOOLS = PROJECT_ROOT / ".tools" / "optimum"
# This package reports each use to Google Analytics; openvino and nncf work without it.
UNWANTED = "openvino-telemetry"
# With transformers 5, optimum-intel 2.2.0 cannot export Llama, Phi or Gemma 2.
REQUIREMENTS = (
    "optimum-intel==2.2.0",
    "transformers==4.57.6",
    "openvino==2026.4.1",
    "openvino-tokenizers==2026.4.1.0",
)
WEIGHTS = ("int8", "int4")


def make_tools(folder: Path = TOOLS) -> Path:
    """Install the exporter into ``folder`` unless it is there, and return the path of its program.

    Raises:
        subprocess.CalledProcessError: pip cannot install it.
    """
    program = folder / "bin" / "optimum-cli"
    stamp = folder / f".{'-'.join(REQUIREMENTS)}-without-{UNWANTED}"
    if not stamp.exists():
        print(f"Installing {REQUIREMENTS[0]} into {folder} (several GB, once)", flush=True)
        venv.create(folder, clear=True, with_pip=True)
        pip = [
            str(folder / "bin" / "python"),
            "-m",
            "pip",
            "--quiet",
            "--disable-pip-version-check",
        ]
        subprocess.run([*pip, "install", *REQUIREMENTS], check=True)
        subprocess.run([*pip, "uninstall", "--yes", UNWANTED], check=True)
        stamp.touch()
    return program


def export_command(program: Path, model: str, weights: str, output: Path) -> list[str]:
    """The exporter's command line."""
    task = ["--task", "text-generation-with-past", "--weight-format", weights]
    return [str(program), "export", "openvino", "--model", model, *task, str(output)]


def default_output(model: str, weights: str) -> Path:
    """The default folder of a converted model: models/NAME-WEIGHTS-openvino."""
    return PROJECT_ROOT / "models" / f"{Path(model).name}-{weights}-openvino"


def find_fault(model: str, folder: Path) -> str | None:
    """Why the exported model in ``folder`` cannot be served, or ``None``.

    transformers 4 cannot read a tokenizer that transformers 5 saved, and the exporter then writes
    none. The service can: files of a local ``model`` that are missing in ``folder`` are copied.
    """
    for pattern in ("*token*.json", "chat_template.*", "generation_config.json"):
        for file in Path(model).glob(pattern):
            if not (folder / file.name).exists():
                shutil.copy(file, folder)
    for name in ("openvino_model.xml", "openvino_model.bin", "config.json", "tokenizer.json"):
        if not (folder / name).is_file():
            return f"the exporter wrote no {name}: see its messages above"
    if json.loads((folder / "config.json").read_bytes()).get("attn_logit_softcapping"):
        return (
            "OpenVINO leaves out the soft cap of this model's attention: serve it with transformers"
        )
    return None


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", help="hub repository, or folder with safetensors")
    parser.add_argument("--weights", choices=WEIGHTS, default="int8")
    parser.add_argument("--output", type=Path, help="default: models/NAME-WEIGHTS-openvino")
    asked = parser.parse_args(arguments)
    output = (asked.output or default_output(asked.model, asked.weights)).absolute()
    if output.exists():
        print(f"{output} is there already: remove it, or name another --output", file=sys.stderr)
        return 1
    # The name is given at the end, so that a half-written model never has it.
    partial = output.with_name(f".{output.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        program = make_tools()
        subprocess.run(export_command(program, asked.model, asked.weights, partial), check=True)
        if fault := find_fault(asked.model, partial):
            print(fault, file=sys.stderr)
            return 1
        partial.rename(output)
    except subprocess.CalledProcessError as error:
        print(f"{Path(error.cmd[0]).name} failed: see its messages above", file=sys.stderr)
        return 1
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    print(f"Done. Serve it with: MODEL__SOURCE=local MODEL__NAME={output} make run")
    return 0


if __name__ == "__main__":
    sys.exit(main())
