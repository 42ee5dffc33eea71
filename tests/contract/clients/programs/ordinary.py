"""What the programs share: the service's address, questions, a schema and a runner."""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, Field

URL, KEY = os.environ["CLIENT_URL"], os.environ["CLIENT_KEY"]
BUSY_URL = os.environ["CLIENT_BUSY_URL"]
QUESTION: Any = [{"role": "user", "content": "What is the capital of France?"}]
ANSWER = "The capital of France is Paris."
STORY = "Tell me a very long story about a lighthouse."
WEATHER = "What is the weather in Paris?"
PERSON = "Describe Ada, an engineer who speaks English."


class Person(BaseModel):
    """A person."""

    name: str = Field(max_length=20)
    role: Literal["engineer", "painter"]
    languages: list[Literal["de", "en", "fr"]] = Field(max_length=3)


def run(*parts: Callable[[], object]) -> None:
    """Run the parts of a program, and print the name of each that has succeeded."""
    for part in parts:
        part()
        print(f"  {Path(sys.argv[0]).stem}: {part.__name__}", flush=True)  # noqa: T201 - for who runs it
