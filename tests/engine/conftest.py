"""Hypothesis profiles of this room: `ci` for every day, `nightly` for the long run (PAGEWIRE_HYPOTHESIS_PROFILE)."""

from __future__ import annotations

from hypothesis import HealthCheck, Phase, settings

_checks = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much]
settings.register_profile(
    "engine-ci",
    max_examples=150,
    stateful_step_count=50,
    deadline=None,
    derandomize=True,
    suppress_health_check=_checks,
)
settings.register_profile(
    "engine-nightly", max_examples=1500, stateful_step_count=80, deadline=None, suppress_health_check=_checks
)
settings.register_profile(
    "engine-mutation",
    settings.get_profile("engine-ci"),
    phases=[Phase.generate],  # that it is red is all one wants to know
)
