"""Hypothesis profiles: a small one for every day, `nightly` for the long run (PAGEWIRE_HYPOTHESIS_PROFILE)."""

from __future__ import annotations

import os

from hypothesis import HealthCheck, settings

_checks = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much]
settings.register_profile(
    "ci", max_examples=40, stateful_step_count=40, deadline=None, derandomize=True, suppress_health_check=_checks
)
settings.register_profile(
    "nightly", max_examples=1500, stateful_step_count=80, deadline=None, suppress_health_check=_checks
)
settings.load_profile(os.environ.get("PAGEWIRE_HYPOTHESIS_PROFILE", "ci"))
