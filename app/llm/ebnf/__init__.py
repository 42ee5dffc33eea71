"""Translates grammars to EBNF, which xgrammar reads, the library inside openvino-genai.

xgrammar's own translation of JSON Schema ignores some keywords, allows endless white space, and
gets some characters wrong. This translation rejects what it cannot enforce. It needs no engine, so
the API process checks a grammar with the code that the engine process compiles it with.
docs/adr/0017 has the measurements.
"""
