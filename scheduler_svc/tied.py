"""`python -m scheduler_svc.tied PARENT_PID MODULE [ARGUMENT …]`: runs a module that the kernel ends with its parent."""

from __future__ import annotations

import runpy
import sys

from scheduler_svc.spawn import die_with


def main() -> int:
    parent, module = int(sys.argv[1]), sys.argv[2]
    if not die_with(parent):
        return 1
    sys.argv = [module, *sys.argv[3:]]
    runpy.run_module(module, run_name="__main__", alter_sys=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
