"""The ``llm`` command, with the server as one of its extra OpenAI models."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from checks import ANSWER, MODEL, PROMPT, QUESTION, expect, server_url

models = [
    {"model_id": "chat", "model_name": MODEL, "api_base": f"{server_url()}/v1"},
    {"model_id": "text", "model_name": MODEL, "api_base": f"{server_url()}/v1", "completion": True},
]
with tempfile.TemporaryDirectory() as folder:
    # JSON is YAML too.
    (Path(folder) / "extra-openai-models.yaml").write_text(json.dumps(models))

    def ask(model: str, prompt: str, *options: str) -> str:
        command = [
            sys.executable,
            "-m",
            "llm",
            "-m",
            model,
            "--key",
            "none",
            "-o",
            "temperature",
            "0",
            *options,
            "--",
            prompt,
        ]
        environment = {**os.environ, "LLM_USER_PATH": folder}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"llm ended with {done.returncode}: {done.stderr.strip()}")
        return done.stdout.strip()

    for streaming in ((), ("--no-stream",)):
        expect(f"chat {streaming}", ask("chat", QUESTION, "-o", "max_tokens", "16", *streaming), ANSWER.strip())
        expect(f"completion {streaming}", ask("text", PROMPT, "-o", "max_tokens", "16", *streaming), ANSWER.strip())
