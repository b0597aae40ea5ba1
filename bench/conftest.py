"""Every result as a line in the file that PPSSL_BENCH_LINES names, as soon as it is there: a run that is cut off keeps them."""

from __future__ import annotations

import json
import os
from collections.abc import Generator

import pytest


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    lines, benchmark = os.environ.get("PPSSL_BENCH_LINES"), getattr(item, "funcargs", {}).get("benchmark")
    if lines and benchmark is not None and call.when == "call":
        stats = benchmark.stats.stats if benchmark.stats else None
        line = {
            "name": item.name, "outcome": report.outcome, "extra_info": benchmark.extra_info,
            "stats": {"min": stats.min} if stats and stats.data else {},
        }  # fmt: skip
        with open(lines, "a", encoding="utf-8") as file:
            file.write(json.dumps(line, default=str) + "\n")
    return report
