"""`python -m pyext` is the `pyext` command."""

import sys

from pyext.cli import main

sys.exit(main())
