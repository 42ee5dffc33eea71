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

import numpy as np

from app.core.config import PROJECT_ROOT
from app.llm.engine.openvino.loading import keep_telemetry_out

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
LEAST_AGREEMENT = 0.8
"""Rounding to 4 bits changes fewer of the likeliest tokens; a part that is missing changes more."""
_TEXT = (
    "The water cycle describes how water moves on, above and below the surface of the Earth. The "
    "sun warms the oceans, and water rises as vapour. In the cold air it becomes clouds, falls as "
    "rain or snow, and runs in rivers back to the sea. How long does a drop of water stay there?"
)


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


def compare(model: str, folder: Path) -> tuple[float, float]:
    """Compare an exported model's logits with those of transformers, after each token of a text.

    Args:
        model: The original: a repository or a folder.
        folder: The exported model.

    Returns:
        At how many of the places, from 0 to 1, the likeliest token is the same, and the mean
        difference of its log-probability in nats.
    """
    keep_telemetry_out()
    # They take seconds, and the arguments are checked first.
    import openvino  # noqa: PLC0415
    import torch  # noqa: PLC0415
    from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: PLC0415

    tokens = AutoTokenizer.from_pretrained(folder)(_TEXT, return_tensors="pt").input_ids  # nosec B615
    original = AutoModelForCausalLM.from_pretrained(  # nosec B615
        model, dtype="auto", use_safetensors=True
    )
    with torch.inference_mode():
        expected = original(tokens).logits[0].float().log_softmax(-1)
    del original
    inputs = {
        "input_ids": tokens.numpy(),
        "attention_mask": np.ones(tokens.shape, np.int64),
        "position_ids": np.arange(tokens.shape[1])[None],
        "beam_idx": np.zeros(1, np.int32),
    }
    exported = openvino.Core().compile_model(folder / "openvino_model.xml", "CPU")
    wanted = {name for port in exported.inputs for name in port.names}
    logits = exported({k: v for k, v in inputs.items() if k in wanted})["logits"]
    got = torch.from_numpy(logits)[0].float().log_softmax(-1)
    likeliest = expected.argmax(-1, keepdim=True)
    same = got.argmax(-1, keepdim=True) == likeliest
    difference = (got.gather(-1, likeliest) - expected.gather(-1, likeliest)).abs()
    return float(same.float().mean()), float(difference.mean())


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
        same, difference = compare(asked.model, partial)
        print(
            f"Of the likeliest tokens of a text {same:.0%} are those of transformers; their "
            f"log-probabilities differ by {difference:.3f} in the mean"
        )
        if same < LEAST_AGREEMENT:
            print("That is more than rounding: serve it with transformers", file=sys.stderr)
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
