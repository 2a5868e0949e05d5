"""Backends, each imported when it is asked for.

OpenMP's idle threads must sleep, not spin: where another process (the scheduler, say) wants a core, a spinning team waits
for the member that has none, and a step takes ten times as long. libgomp reads this when it is loaded, so it is set
here, before any backend imports torch.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
