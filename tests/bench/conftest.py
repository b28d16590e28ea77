"""Makes the benchmarks' package importable; last, so that an installed pyext stays the one that is tested."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[2]))
