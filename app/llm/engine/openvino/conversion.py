"""Converts safetensors to OpenVINO's own format: the process that :mod:`.converted` starts."""

import gc
import os
import shutil
import sys
from pathlib import Path
from typing import Any, Final

from app.core.config import ModelSettings
from app.llm.engine.openvino.converted import FAILED
from app.llm.engine.openvino.loading import keep_telemetry_out, load_openvino
from app.llm.models.description import context_length, fixed_rope_limit, pretrained_source
from app.llm.models.load_errors import explaining, one_line
from app.llm.models.progress import Progress
from app.llm.models.snapshot import OPENVINO_MODEL, Snapshot
from app.utils.parent import end_with_parent

if __name__ == "__main__":
    # Before the imports, which take seconds.
    end_with_parent()
keep_telemetry_out()

import openvino  # noqa: E402 - not before the line above
import torch  # noqa: E402
from transformers import AutoModelForCausalLM  # noqa: E402
from transformers.utils import logging as transformers_logging  # noqa: E402

from app.llm.engine.openvino.compression import weight_constant  # noqa: E402
from app.llm.engine.openvino.tracing import UnconvertibleError, to_openvino  # noqa: E402
from app.llm.engine.transformers.loading import check_weights  # noqa: E402
from app.llm.engine.transformers.start_check import StartCheck  # noqa: E402
from app.llm.engine.transformers.tensor_progress import counting_tensors  # noqa: E402
from app.llm.engine.transformers.weights import choose_weights_precision  # noqa: E402

# Largest difference of a likeliest token's log-probability, in nats, where not all is computed in
# float32. A part that is missing or in the wrong place makes differences of several.
_TOLERANCES: Final = {16: 0.5, 8: 0.5, 4: 3.0}
# A prompt goes past a window of this size at most, since longer ones take minutes.
_LONGEST_WINDOW: Final = 1024


def convert(settings: ModelSettings, snapshot: Snapshot, folder: Path, progress: Progress) -> None:
    """Write a model in OpenVINO's format into a folder, and compare its answers.

    Raises:
        UnconvertibleError: The result would not answer as the model does.
        ModelLoadError: The model cannot be loaded.
        OSError: The folder cannot be written.
    """
    choice = choose_weights_precision(settings, snapshot, None, max_running=1, weight_bytes=2)
    bits = choice.bits or 16
    progress(what := f"converting {settings.label} for OpenVINO, once: reading the weights")
    with explaining("model", settings, snapshot), counting_tensors(what, progress):
        model = _load(settings, snapshot)
    is_exact = bits == 16 and settings.dtype == "float32"
    config, text = model.config, model.config.get_text_config()
    kind = str(model.dtype).removeprefix("torch.") if bits == 16 else f"int{bits}"
    check = StartCheck(
        model,
        tolerance=None if is_exact else _TOLERANCES[bits],
        window=min(getattr(text, "sliding_window", None) or 0, _LONGEST_WINDOW),
    )
    try:
        check.prepare("openvino")
    except ValueError as error:
        raise UnconvertibleError(str(error)) from error
    progress(f"converting {settings.label} for OpenVINO, once: writing it")
    graph = to_openvino(
        model,
        # The embedding and the output layer, on which most depends, have 8 bits at least.
        lambda weight: (
            weight_constant(weight, max(bits, 8), grouped=False)
            if len(weight) == text.vocab_size
            else weight_constant(weight, bits)
        ),
    )
    del model
    graph.set_rt_info(kind, ["nncf", "weight_compression", "mode"])
    folder.mkdir(parents=True, exist_ok=True)
    try:
        openvino.save_model(graph, folder / OPENVINO_MODEL, compress_to_fp16=False)
    except RuntimeError as error:
        # The library's text is "iostream error".
        raise OSError(f"{folder} cannot be written, is the disk full? ({error})") from error
    del graph
    gc.collect()
    _copy_texts(snapshot.directory, folder)
    # Beyond that length the rotary embedding would be another for all tokens.
    text.max_position_embeddings = int(min(context_length(config), fixed_rope_limit(config)))
    config.save_pretrained(folder)
    progress(f"converting {settings.label} for OpenVINO, once: comparing its answers")
    backend = load_openvino(
        settings, Snapshot(folder, OPENVINO_MODEL), max_running=4, progress=lambda *_: None
    )
    if not check.passes("openvino", backend):
        raise UnconvertibleError("its tokens differ from those of transformers")


def _load(settings: ModelSettings, snapshot: Snapshot) -> Any:
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    model, report = AutoModelForCausalLM.from_pretrained(  # nosec B615 - a local folder
        snapshot.directory,
        # As stored, because the conversion computes nothing.
        dtype=settings.dtype if settings.dtype == "auto" else getattr(torch, settings.dtype),
        use_safetensors=True,
        output_loading_info=True,
        ignore_mismatched_sizes=True,
        **pretrained_source(snapshot),
    )
    check_weights(settings.label, model, report)
    return model


def _copy_texts(source: Path, folder: Path) -> None:
    """Copy the tokenizer, the chat templates and the generation settings."""
    for path in source.iterdir():
        if path.suffix in {".json", ".jinja", ".txt", ".model"} and "safetensors" not in path.name:
            shutil.copyfile(path, folder / path.name)
        elif path.name == "additional_chat_templates":
            shutil.copytree(path, folder / path.name)


def main(arguments: list[str]) -> None:
    """Convert, with the progress or the reason of a failure as lines on standard output.

    A line is a message, and where it is known a tab and the per cent of its stage.

    Args:
        arguments: The ``model`` section as JSON, the model's folder, and the folder to fill.
    """
    settings = ModelSettings.model_validate_json(arguments[0])
    snapshot = Snapshot(Path(arguments[1]), None)
    # What a library prints goes to standard error.
    with os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8") as output:
        os.dup2(sys.stderr.fileno(), sys.stdout.fileno())

        def say(line: str, percent: int | None = None, /) -> None:
            output.write(f"{line}\n" if percent is None else f"{line}\t{percent}\n")
            output.flush()

        try:
            convert(settings, snapshot, Path(arguments[2]), say)
        except Exception as error:  # noqa: BLE001 - libraries raise anything
            say(FAILED + one_line(error)[:300])


if __name__ == "__main__":
    main(sys.argv[1:])
    # Without the libraries' own end, which takes a second.
    os._exit(0)
