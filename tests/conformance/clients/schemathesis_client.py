"""schemathesis: for a minute, requests made from the OpenAPI document, right and wrong ones.

None may end in a 5xx, and every answer has the status, the media type and the form that the document promises.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

from checks import server_url

SECONDS = 60
SEED = 12  # what fails here fails there again
FOUND = 1  # the exit code when a check failed; others mean that it did not run
CHECKS = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance"

with tempfile.TemporaryDirectory() as folder:
    command = [
        str(Path(sys.executable).with_name("st")), "run", f"{server_url()}/openapi.json", "--max-time", str(SECONDS),
        "--checks", CHECKS, "--continue-on-failure", "--suppress-health-check", "all", "--seed", str(SEED),
        "--phases", "coverage,fuzzing", "--request-timeout", "60", "--no-color", "--generation-database", "none",
    ]  # fmt: skip
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
if done.returncode:
    raise SystemExit(f"schemathesis {'found' if done.returncode == FOUND else 'failed'}:\n{done.stdout}{done.stderr}")
for line in done.stdout.splitlines():
    if "generated," in line or line.startswith("Seed"):
        print(f"note: {line.strip()}")
