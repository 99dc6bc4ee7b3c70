"""Options and fixtures of the chart's tests.

pytest tests/charts                   compare with the golden files
pytest tests/charts --update-golden   write them anew; read the difference before you commit it
"""

from __future__ import annotations

import pytest

from tests.charts.schemas import crds_present
from tests.charts.support import CRDS

_SKIPPED = pytest.StashKey[int]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-golden", action="store_true", help="write the golden renders of the catalogue anew")


@pytest.fixture(scope="session")
def update_golden(request: pytest.FixtureRequest) -> bool:
    """True when the golden files are to be written and not compared."""
    return bool(request.config.getoption("--update-golden", default=False))


@pytest.fixture
def crds(request: pytest.FixtureRequest) -> None:
    """Skips, loudly, where the published CRD schemas are not at hand."""
    if not crds_present():
        request.config.stash[_SKIPPED] = request.config.stash.get(_SKIPPED, 0) + 1
        pytest.skip(f"NO CRD SCHEMAS at {CRDS}")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    skipped = config.stash.get(_SKIPPED, 0)
    if skipped:
        terminalreporter.section("CRD SCHEMAS ARE MISSING", sep="!", red=True, bold=True)
        terminalreporter.line(f"{skipped} tests were NOT run: nothing was validated against KServe's, Knative's or")
        terminalreporter.line(f"Prometheus' schemas. Put them at {CRDS} or set KSERVE_VLLM_CRDS.")
