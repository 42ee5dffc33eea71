"""A target of tests/fuzz/targets.py under atheris: libFuzzer, guided by the lines that are reached.

    python -m tests.fuzz.guided TARGET [LIBFUZZER-OPTION ...]

libFuzzer ends the process itself; its status is 0 if no run failed.
"""

import sys

import atheris


def main() -> None:
    """Fuzz the target that the first argument names."""
    name, *options = sys.argv[1:]
    # Only modules that are imported here are guided by coverage.
    with atheris.instrument_imports(include=["app"]):
        from tests.fuzz.targets import TARGETS
    atheris.Setup([sys.argv[0], *options], TARGETS[name])
    atheris.Fuzz()


if __name__ == "__main__":
    main()
