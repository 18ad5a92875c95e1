"""The BIDS validator, started without a network."""

import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

# The installed package itself, not a script of that name elsewhere on PATH.
COMMAND = (sys.executable, "-c", "from bids_validator_deno import cli; cli()")


class Verdict(NamedTuple):
    """What the validator says of a data set."""

    exit_code: int
    report: dict[str, Any]

    def issues(self, severity: str) -> list[dict[str, Any]]:
        return [issue for issue in self.report["issues"]["issues"] if issue["severity"] == severity]

    def codes(self, severity: str) -> Counter[tuple[str, str | None]]:
        """Code and field of each issue, and how often it was found."""
        return Counter((issue["code"], issue.get("subCode")) for issue in self.issues(severity))


def validate(data_set: Path) -> Verdict:
    """Validate a data set with bids-validator-deno."""
    with tempfile.TemporaryDirectory() as cache:
        environment = os.environ | {"DENO_DIR": cache, "DENO_NO_UPDATE_CHECK": "1"}
        command = [*COMMAND, str(data_set), "--format", "json"]
        process = subprocess.run(
            command, capture_output=True, text=True, env=environment, check=False
        )
    assert process.stdout.startswith("{"), f"no report from bids-validator-deno: {process.stderr}"
    return Verdict(process.returncode, json.loads(process.stdout))
