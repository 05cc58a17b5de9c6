# SPDX-License-Identifier: Apache-2.0
"""The one import of tensorflow, without what its libraries print on standard error while they are loaded."""

from __future__ import annotations

import os
import sys
import tempfile

_NOISE = ("oneDNN custom operations are on", "before absl::InitializeLog() is called")


def load_tensorflow() -> None:
    """Imports tensorflow; called where it may be the first time, so that any `import` after it is silent.

    With oneDNN, which tensorflow uses by default, RandAugment takes a fifth less time. But it announces itself on
    standard error whatever the log level. Other lines are passed on.
    """
    if "tensorflow" in sys.modules:
        return
    sys.stderr.flush()
    kept = os.dup(2)
    with tempfile.TemporaryFile() as said:
        os.dup2(said.fileno(), 2)
        try:
            import tensorflow  # noqa: F401
        finally:
            os.dup2(kept, 2)
            os.close(kept)
            said.seek(0)
            lines = said.read().decode("utf-8", "replace").splitlines(keepends=True)
            sys.stderr.write("".join(line for line in lines if not any(noise in line for noise in _NOISE)))
