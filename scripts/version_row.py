"""Print a row for docs/versions.md, from the versions of this environment and a JUnit file of pytest.

Usage: python scripts/version_row.py RESULTS.xml PART
PART says which tests were run, for example "whole suite".
"""

from __future__ import annotations

import platform
import sys
import xml.etree.ElementTree as ElementTree
from collections import Counter
from datetime import datetime, timezone
from importlib import metadata

PACKAGES = ("torch", "triton", "numpy", "transformers", "lightning")


def row(results: str, part: str) -> str:
    """The row in Markdown."""
    cases = list(ElementTree.parse(results).iter("testcase"))
    skipped = [case.find("skipped") for case in cases]
    reasons = Counter(skip.get("message", "") for skip in skipped if skip is not None)
    failed = sum(case.find("failure") is not None or case.find("error") is not None for case in cases)
    why = "; ".join(f"{count} {reason}" for reason, count in reasons.most_common()).replace("|", "/") or "-"
    passed = len(cases) - failed - reasons.total()
    today = datetime.now(timezone.utc).date()
    versions = [_version(name) for name in PACKAGES]
    cells = [today, platform.python_version(), *versions, part, passed, failed, reasons.total(), why]
    return "| " + " | ".join(map(str, cells)) + " |"


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "-"


if __name__ == "__main__":
    print(row(*sys.argv[1:]))
