"""The README tells the truth: its support matrix is the generated one, and its five lines run."""

from __future__ import annotations

import re
from pathlib import Path

from pyext.support import matrix

README = (Path(__file__).parents[1] / "README.md").read_text()


def test_support_matrix_is_the_generated_one():
    written = re.search(r"<!-- support matrix.*?-->\n(.*?)\n<!-- end", README, re.DOTALL).group(1)
    assert written == matrix(), "run `python -m pyext.support` and put its table into README.md"


def test_five_lines_run(capsys):
    example = re.search(r"```python\n(.*?)```", README, re.DOTALL).group(1)
    scope: dict = {}
    exec(example, scope)
    assert scope["logits"].shape == (8, 100)
    assert "SMG" in capsys.readouterr().out
