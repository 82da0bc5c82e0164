"""Command line of the package; see its docstring."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from testing.inprocess import import_comfyui, load_extension

from ..rows import read_rows, say_row, say_table, write_rows
from . import ON_A_SERVER, TASKS, __doc__, run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS))
    parser.add_argument("--quick", action="store_true", help="a tenth of the trials, and none on a server")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="where the rows go; tasks that are in it are not run again")
    options = parser.parse_args()
    tasks = options.tasks or [task for task in TASKS if not (options.quick and task in ON_A_SERVER)]
    import_comfyui()
    load_extension()
    rows = read_rows(options.json)
    for task in tasks:
        count = max(1, TASKS[task][1] // (10 if options.quick else 1))
        about = {"task": task, "asked": count, "seed": options.seed}
        if any(about.items() <= row.items() for row in rows):
            continue
        rows = [row for row in rows if row["task"] != task] + [about | run(task, count, options.seed).row()]
        say_row(rows[-1])
        write_rows(options.json, rows)
    rows.sort(key=lambda row: list(TASKS).index(row["task"]))
    head = ["task", "trials", "refused or stopped", "failures", "slowest, s", "largest, MB", ""]
    keys = ("task", "trials", "refused", "failed", "slowest_s", "largest_MB", "remark")
    say_table(head, [[f"{row[k]:.2f}" if isinstance(row[k], float) else str(row[k]) for k in keys] for row in rows])
    failures = [failure for row in rows for failure in row["failures"]]
    for failure in failures:
        sys.stdout.write(f"failed: {failure}\n")
    raise SystemExit(1 if failures else 0)


if __name__ == "__main__":
    main()
