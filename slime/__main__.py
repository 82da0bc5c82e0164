"""``python -m slime``, see :mod:`slime.data.command`."""

from __future__ import annotations

import sys


def main() -> int:
    """The console script ``slime``."""
    from .data.command import run

    return run(sys.argv[1:])


if __name__ == "__main__":
    raise SystemExit(main())
