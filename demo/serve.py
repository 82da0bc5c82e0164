"""Run a ComfyUI server with this extension and the tiny model, until Ctrl+C."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from testing.server import ComfyServer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base", type=Path, help="folder to keep models, input and output in; temporary by default")
    options, rest = parser.parse_known_args()
    with ComfyServer(base=options.base, options=tuple(rest)) as server:
        sys.stdout.write(f"ComfyUI with SLiMe: {server.address}   (Ctrl+C ends it; its files: {server.base})\n")
        sys.stdout.flush()
        try:
            while True:
                time.sleep(1)
        except KeyboardInterrupt:
            sys.stdout.write("stopped\n")


if __name__ == "__main__":
    main()
