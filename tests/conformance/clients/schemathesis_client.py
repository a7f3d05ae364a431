"""schemathesis: for a minute, requests made from the OpenAPI document, right and wrong ones. None may end in a 5xx."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

from checks import server_url

SECONDS = 60
FOUND = 1  # the exit code when a check failed; others mean that it did not run

with tempfile.TemporaryDirectory() as folder:
    command = [
        str(Path(sys.executable).with_name("st")), "run", f"{server_url()}/openapi.json", "--max-time", str(SECONDS),
        "--checks", "not_a_server_error", "--continue-on-failure", "--suppress-health-check", "all",
        "--phases", "examples,coverage,fuzzing", "--request-timeout", "60", "--no-color",
        "--generation-database", "none",
    ]  # fmt: skip
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
if done.returncode:
    raise SystemExit(f"schemathesis {'found' if done.returncode == FOUND else 'failed'}:\n{done.stdout}{done.stderr}")
print("\n".join(line for line in done.stdout.splitlines() if "generated" in line or "passed" in line))
