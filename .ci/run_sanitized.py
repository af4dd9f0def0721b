"""Run pytest on the package in the current folder, whose extension was built with sanitizers (`make test-asan`).

An editable install of the same package would be imported first; its finder is removed.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.meta_path = [finder for finder in sys.meta_path if "ScikitBuild" not in type(finder).__name__]
sys.path.insert(0, str(Path.cwd()))

import repo_kernels._cpu  # noqa: E402

where = Path(repo_kernels._cpu.__file__)
if Path.cwd() not in where.parents or "libasan" not in Path("/proc/self/maps").read_text():
    sys.exit(f"the extension at {where} is not the one with sanitizers, or their runtime was not preloaded")
sys.exit(pytest.main(sys.argv[1:]))
