"""Grammars as EBNF, for engines whose library reads that: openvino-genai, and xgrammar inside it.

The library's own translation of JSON Schema leaves keywords out with at most a line in the log,
allows white space without an end, and mistakes some letters; so the translation is here, and what
it cannot honour it refuses. It needs no engine, so that the API process refuses a grammar with the
same code with which the engine process translates it. docs/adr/0017 has the measurements.
"""
