"""A target of tests/fuzz/targets.py under atheris: libFuzzer, guided by the lines that are reached.

    python -m tests.fuzz.guided TARGET [LIBFUZZER-OPTION ...]

libFuzzer ends the process itself; status 0 says that every run was as it should be.
"""

import sys

import atheris


def main() -> None:
    """Fuzz the target that the first argument names."""
    name, *options = sys.argv[1:]
    # Only what is imported in here is measured; the libraries beneath it are not ours to fuzz.
    with atheris.instrument_imports(include=["app"]):
        from tests.fuzz.targets import TARGETS
    atheris.Setup([sys.argv[0], *options], TARGETS[name])
    atheris.Fuzz()


if __name__ == "__main__":
    main()
