"""The bundled model on OpenVINO, inside the test process."""

import pytest

from app.llm.models import bundled
from tests.support.backends import load_bundled
from tests.support.vocabularies import own_and_librarys_vocabulary


@pytest.mark.model
def test_the_bundled_model_is_run_by_openvino() -> None:
    """OpenVINO runs the bundled model with its context length, weights and vocabulary."""
    if not bundled.is_fetched():
        pytest.skip("the bundled model is not here: make model")
    info = load_bundled("auto").info
    assert (info.backend, info.dtype, info.context_length) == ("openvino", "q4_1", 8192)
    own, librarys = own_and_librarys_vocabulary(bundled.bundled_model_path())
    assert own == librarys
