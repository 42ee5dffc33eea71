"""What most programs of the tests import, for the process that they are forked from."""

import gc
import importlib

# None of them reads an environment variable or a file that a test sets.
_IMPORTED = ("uvicorn", "app.main", "app.llm.chain", "transformers.utils.chat_template_utils")

# Collections would take a tenth of the time.
gc.disable()
for name in _IMPORTED:
    importlib.import_module(name)
gc.enable()
# The collections of a child would copy every page of this.
gc.freeze()
