"""Prints how far every number of every mode is from its reference: `python -m tests.modes [mode ...]`."""

import os
import sys

# an error inside of the monitor is not hidden behind missing numbers
os.environ["LIGHTNING_GRADFLOW_RAISE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")

import logging
import math

import torch

from .harness import lines
from .modes import MODES


def main(names: list[str]) -> int:
    """Prints the table of the named modes, or of all; 1 if a line misses its bar."""
    unknown = sorted(set(names) - set(MODES))
    if unknown:
        sys.exit(f"modes must be among {list(MODES)}, got {unknown}")
    torch.set_num_threads(1)
    for logger in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(logger).setLevel(logging.ERROR)
    table = [line for name in names or MODES for line in lines(name)]
    missing = [line for line in table if math.isnan(line.error)]
    print("| mode | quantity | reference | largest relative error | bar | |")
    print("|---|---|---|---:|---:|---|")
    for line in sorted((line for line in table if line not in missing), key=lambda line: (line.mode, line.quantity)):
        verdict = "" if line.holds else f"MISSED: {line.worst}"
        print(f"| {line.mode} | {line.quantity} | {line.reference} | {line.error:.1e} | {line.bar:.0e} | {verdict} |")
    missed = sum(not line.holds for line in table)
    print(f"\n{len(table)} lines, {missed} missed; {len(missing)} of them missing in both, as they should be.")
    return int(missed > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
