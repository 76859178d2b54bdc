"""`python -m reports.render`: write every generated page, block and picture; `--check` only compares.

Exits with 0 where all is well, 1 where a file differs (``--check``), 2 where a block cannot be rendered.
"""

from __future__ import annotations

import argparse
import sys

from reports.render.documents import ROOT, Refusal, outdated, rendered, write


def main() -> int:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(prog="python -m reports.render", description=str(__doc__).splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing, tell which files are out of date")
    given = parser.parse_args()
    refusals: list[Refusal] = []
    documents = rendered(refusals)
    stale = outdated(documents)
    if not given.check:
        write(documents)
    for path in stale:
        print(f"{'out of date' if given.check else 'written'}: {path.relative_to(ROOT)}")
    for refusal in refusals:
        print(f"error: {refusal}", file=sys.stderr)
    return 2 if refusals else int(given.check and bool(stale))


if __name__ == "__main__":
    raise SystemExit(main())
