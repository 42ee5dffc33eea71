"""``python -m app``: the same as ``llm-service``, see :mod:`app.cli`."""

import sys

from app.cli import main

sys.exit(main())
