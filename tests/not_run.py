"""What a part of the tests says of those it leaves out; a worker of pytest-xdist hands it to the summary's process."""

import pytest

NOT_RUN = pytest.StashKey[str]()
