"""Runs the tests that need a card, and writes down what came of each.

    python -m reports.validation.card_tests OUT

OUT gets how many tests of each name passed, failed or were skipped, and on what.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from xml.etree import ElementTree

from reports.validation.accuracy import write_record

TESTS = ("tests/streamed/test_on_card.py", "tests/test_generating_on_card.py")


def outcomes(report: Path) -> dict[str, dict[str, int]]:
    """By the name of a test: how many of its cases passed, failed or were skipped, of pytest's JUnit report.

    Tests of all files have names of their own.
    """
    found: dict[str, Counter[str]] = {}
    for case in ElementTree.parse(report).getroot().iter("testcase"):
        kinds = {child.tag for child in case}
        what = "failed" if kinds & {"failure", "error"} else "skipped" if "skipped" in kinds else "passed"
        found.setdefault(str(case.get("name")).partition("[")[0], Counter())[what] += 1
    return {name: dict(each) for name, each in found.items()}


def main() -> int:
    """See the module's docstring."""
    if len(sys.argv) != 2:
        print(__doc__)
        return 2
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        code = subprocess.run([sys.executable, "-m", "pytest", *TESTS, f"--junitxml={report}"], check=False).returncode
        write_record(Path(sys.argv[1]), {"what": f"tests on a card: {', '.join(TESTS)}", "outcomes": outcomes(report)})
    return code


if __name__ == "__main__":
    raise SystemExit(main())
