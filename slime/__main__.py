"""``python -m slime``, see :mod:`slime.data.command`."""

from __future__ import annotations

import sys


def main() -> int:
    """Run the console script ``slime`` and return its exit status."""
    try:
        from .data.command import run

        return run(sys.argv[1:])
    except ImportError as error:  # some formats need the extra
        sys.stderr.write(f'slime: {error.name} is missing. In SLiMe\'s folder run: python -m pip install ".[data]"\n')
        return 1


if __name__ == "__main__":
    raise SystemExit(main())
