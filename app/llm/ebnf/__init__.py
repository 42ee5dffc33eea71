"""Translates grammars to EBNF, which xgrammar reads, the library inside openvino-genai.

xgrammar's own translation of JSON Schema ignores some keywords, allows endless white space, and
gets some characters wrong. This one rejects what it cannot enforce, and runs in both processes.
docs/adr/0017 has the measurements.
"""
