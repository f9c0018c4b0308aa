"""Runs a module with Python's wall clock shifted: `python -m tests.faults.shifted 7200 llmtuner worker training`.

The monotonic clock stays correct. (Debian's faketime 0.9.10 breaks Python 3.11: timed waits never end, or time.sleep
rejects its argument.)
"""

from __future__ import annotations

import runpy
import sys
import time

if __name__ == "__main__":
    shift, module = float(sys.argv[1]), sys.argv[2]
    real, real_ns = time.time, time.time_ns
    time.time = lambda: real() + shift
    time.time_ns = lambda: real_ns() + int(shift * 1e9)
    sys.argv = [module, *sys.argv[3:]]
    runpy.run_module(module, run_name="__main__", alter_sys=True)
