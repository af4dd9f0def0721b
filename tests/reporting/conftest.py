"""A report that the tests of its parts share."""

import pytest

from repo.reporting.document import write_report
from tests.support.recorded import write_run


@pytest.fixture(scope="session")
def evaluated(tmp_path_factory):
    """A report with everything in it."""
    run = write_run(tmp_path_factory.mktemp("runs") / "evaluated", steps=30, held_out=40)
    return write_report(run).parent
