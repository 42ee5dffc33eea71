"""OpenVINO computes with the weights that a GGUF file has."""

from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type

from tests.support.backends import load_local, logprobs, request, run
from tests.support.tiny_gguf import make_tiny_gguf


@pytest.mark.no_cover
@pytest.mark.usefixtures("tokenizer_here")
@pytest.mark.parametrize("kind", [Type.Q4_0, Type.Q4_1, Type.Q8_0])
def test_weights_of_each_type(tmp_path: Path, kind: Type) -> None:
    """Log-probabilities are those of transformers with the same file, but for the rounding.

    OpenVINO rounds activations to 8 bits, which moves them by 0.02 to 0.03 here, and weights of 8
    bits instead of Q4_1 move them by 0.05. Rounded offsets of Q4_1 move them by 0.28.
    """
    path = make_tiny_gguf(tmp_path / "tiny.gguf", packed=kind)
    engines = ("openvino", "transformers")
    both = [load_local(path, engine=engine) for engine in engines]
    assert tuple(backend.info.backend for backend in both) == engines
    prompts = np.random.default_rng(0).integers(3, 260, (12, 9)).tolist()
    asked = [request(str(n), prompt, 1, logprobs=True) for n, prompt in enumerate(prompts)]
    own, expected = ([logprobs(run(b, a)[a.id])[0] for a in asked] for b in both)
    assert np.abs(np.subtract(own, expected)).mean() < 0.12
