"""LLM FastAPI Service: one process, one Hugging Face language model, behind HTTP."""

__version__ = "0.1.0"
