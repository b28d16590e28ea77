"""Hypothesis profiles: a short one with fixed examples for every test run, a long one with new examples."""

import os

from hypothesis import HealthCheck, Phase, settings

# The fixture that fills uninitialised memory is the same for every example.
COMMON = {"deadline": None, "suppress_health_check": [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]}
settings.register_profile("short", derandomize=True, database=None, max_examples=150, phases=[Phase.generate], **COMMON)
settings.register_profile("long", max_examples=int(os.environ.get("PYEXT_FUZZ_EXAMPLES", "2000")), **COMMON)
settings.load_profile(os.environ.get("PYEXT_FUZZ", "short"))
