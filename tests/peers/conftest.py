"""Tests against other packages run only where ``-m`` names the marker: ``pytest -m peers``."""

from __future__ import annotations

import pytest


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if "peers" in config.option.markexpr:
        return
    left_out = [item for item in items if item.get_closest_marker("peers")]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if item not in left_out]
