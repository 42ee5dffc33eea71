"""Convert a safetensors model to OpenVINO's own format on a build machine.

The service does the same at its first start, and keeps the result beside the hub's cache.
"""

import argparse
import logging
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from app.core.config import PROJECT_ROOT, ModelSettings, load_settings
from app.core.config.logging import LoggingSettings
from app.core.logging import configure_logging, log_progress
from app.llm.loader import find_model
from app.llm.models.files import check_files
from app.utils.errors import ModelLoadError, StartupError

WEIGHTS = ("int8", "int4", "none")


def default_output(model: str, weights: str) -> Path:
    """The default folder of a converted model: models/NAME-WEIGHTS-openvino."""
    return PROJECT_ROOT / "models" / f"{Path(model).name}-{weights}-openvino"


def export(model: str, weights: str, folder: Path) -> None:
    """Convert a repository or a folder into ``folder``.

    Raises:
        ModelLoadError: It cannot be found, read or converted.
        OSError: The folder cannot be written.
    """
    # They take seconds, and the arguments are checked first.
    from app.llm.engine.openvino.conversion import convert  # noqa: PLC0415
    from app.llm.engine.openvino.tracing import UnconvertibleError  # noqa: PLC0415

    source = "local" if Path(model).exists() else "hub"
    # An engine that does not read OpenVINO's format takes a repository's safetensors.
    settings = ModelSettings(name=model, source=source, quantization=weights, engine="transformers")
    token = load_settings().huggingface_token
    snapshot = find_model(
        settings, token=token.get_secret_value() if token else None, progress=log_progress
    )
    check_files(snapshot)
    if snapshot.weights:
        raise ModelLoadError(f"{model} is no safetensors model: OpenVINO reads it as it is")
    try:
        convert(settings.model_copy(update={"engine": "openvino"}), snapshot, folder, log_progress)
    except UnconvertibleError as error:
        raise ModelLoadError(f"{error}: serve it with transformers") from error


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
    configure_logging(LoggingSettings(format="text"))
    # The name is given at the end, so that a half-written model never has it.
    partial = output.with_name(f".{output.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        export(asked.model, asked.weights, partial)
        partial.rename(output)
    except (StartupError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        logging.shutdown()
    print(f"Done. Serve it with: MODEL__SOURCE=local MODEL__NAME={output} make run")
    return 0


if __name__ == "__main__":
    sys.exit(main())
