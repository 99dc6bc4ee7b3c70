"""A fake API server for each test that asks for one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.ops.fake_api import FakeApi


@pytest.fixture
def api(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeApi]:
    """The fake, with the environment pointing at it."""
    fake = FakeApi(tmp_path)
    monkeypatch.setenv("KUBECONFIG", str(fake.kubeconfig))
    try:
        yield fake
    finally:
        fake.stop()
