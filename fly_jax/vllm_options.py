"""Options of vLLM's command line that ``serve`` does not have: those that change nothing here, and those that would.

Whoever moves a command line from vLLM gets a warning for the first kind and, for the second, a sentence instead of an
answer that is not what they asked for.
"""

from __future__ import annotations

import argparse
import logging
from typing import Any

from fly_jax.sampling_params import MAX_LOGPROBS

logger = logging.getLogger(__name__)

# What they set is decided otherwise here, and answers are the same with any value.
HARMLESS_SWITCHES = (
    "--aggregate-engine-logging",
    "--async-scheduling",
    "--calculate-kv-scales",
    "--disable-access-log-for-endpoints",
    "--disable-cascade-attn",
    "--disable-custom-all-reduce",
    "--disable-fastapi-docs",
    "--disable-frontend-multiprocessing",
    "--disable-log-requests",
    "--disable-log-stats",
    "--disable-uvicorn-access-log",
    "--enable-chunked-prefill",
    "--enable-log-requests",
    "--enable-prefix-caching",
    "--enforce-eager",
    "--no-async-scheduling",
    "--no-enable-chunked-prefill",
    "--no-enable-log-requests",
    "--no-enable-prefix-caching",
    "--no-trust-remote-code",
    "--no-use-tqdm-on-load",
    "--trust-remote-code",
    "--use-tqdm-on-load",
)
HARMLESS_VALUES = (
    "--api-server-count",
    "--compilation-config",
    "--cuda-graph-sizes",
    "--distributed-executor-backend",
    "--download-dir",
    "--kv-cache-metrics-sample",
    "--max-log-len",
    "--max-parallel-loading-workers",
    "--max-seq-len-to-capture",
    "--num-scheduler-steps",
    "--swap-space",
    "--tokenizer-pool-size",
    "--uvicorn-log-level",
)
# Values of refused options that ask for what is done anyway.
NEUTRAL = {
    "--kv-cache-dtype": ("auto",),
    "--pipeline-parallel-size": ("1",),
    "--runner": ("auto", "generate"),
    "--task": ("auto", "generate"),
    "--tokenizer-mode": ("auto", "hf"),
}
SHORT = {"--api-server-count": "-asc", "--pipeline-parallel-size": "-pp", "--quantization": "-q"}
# Any other value of these would change answers, or what the server may be asked.
REFUSED = {
    "--allow-credentials": "answers to web pages never carry credentials",
    "--allowed-headers": "with --allowed-origins any header is allowed",
    "--allowed-methods": "with --allowed-origins GET and POST are allowed",
    "--chat-template": "the folder's own chat template is used: put yours into the folder as chat_template.jinja",
    "--code-revision": "no code of a model is run",
    "--config": "write the options on the command line",
    "--cpu-offload-gb": "weights stay on the devices",
    "--enable-auto-tool-choice": "tools are not supported",
    "--enable-lora": "LoRA adapters are not supported: merge the adapter into the weights",
    "--enable-reasoning": "reasoning is not parsed out of answers",
    "--enable-sleep-mode": "weights stay on the devices",
    "--hf-overrides": "change config.json in the folder",
    "--hf-token": "models are read from a local folder: download it first",
    "--kv-cache-dtype": "the KV cache has the dtype of the weights",
    "--kv-transfer-config": "KV is moved between this server's own devices only",
    "--limit-mm-per-prompt": "only text is supported",
    "--logits-processors": "logits processors are not supported",
    "--lora-modules": "LoRA adapters are not supported: merge the adapter into the weights",
    "--max-lora-rank": "LoRA adapters are not supported: merge the adapter into the weights",
    "--max-loras": "LoRA adapters are not supported: merge the adapter into the weights",
    "--max-logprobs": f"a request may ask for {MAX_LOGPROBS} alternatives",
    "--middleware": "code of others is not loaded into the server",
    "--pipeline-parallel-size": "layers are not split over devices: use --tensor-parallel-size",
    "--quantization": "quantised weights are not supported",
    "--reasoning-parser": "reasoning is not parsed out of answers",
    "--response-role": "the role is always assistant",
    "--return-tokens-as-token-ids": "tokens are written as text",
    "--revision": "models are read from a local folder: download that revision",
    "--root-path": "let the proxy remove the prefix",
    "--rope-scaling": "change config.json in the folder",
    "--rope-theta": "change config.json in the folder",
    "--runner": "models generate text only",
    "--speculative-config": "speculative decoding is not supported",
    "--ssl-certfile": "TLS is not supported: put a proxy in front",
    "--ssl-keyfile": "TLS is not supported: put a proxy in front",
    "--task": "models generate text only",
    "--tokenizer": "the tokenizer is read from the model's folder: put its files there",
    "--tokenizer-mode": "the folder's tokenizer.json is used",
    "--tool-call-parser": "tools are not supported",
    "--uds": "the server listens on a TCP port",
}


def _note(namespace: argparse.Namespace, option: str | None) -> None:
    namespace.ignored_options = [*getattr(namespace, "ignored_options", []), option]


class _Ignored(argparse.Action):
    """Notes the option's name; :func:`warn_of_ignored` tells all of them in one line."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option: str | None = None
    ) -> None:
        del parser, values
        _note(namespace, option)


class _Refused(argparse.Action):
    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option: str | None = None
    ) -> None:
        if values in NEUTRAL.get(self.option_strings[0], ()):
            _note(namespace, option)
            return
        parser.error(f"{option} is vLLM's and not supported here: {REFUSED[self.option_strings[0]]}")


def add_vllm_options(parser: argparse.ArgumentParser) -> None:
    """Takes the options that ``parser`` has not itself; none of them is in its help."""
    for names, action, nargs in (
        (HARMLESS_SWITCHES, _Ignored, 0),
        (HARMLESS_VALUES, _Ignored, 1),
        (tuple(REFUSED), _Refused, "?"),
    ):
        for name in names:
            short = (SHORT[name],) if name in SHORT else ()
            parser.add_argument(name, *short, dest="vllm_option", action=action, nargs=nargs, help=argparse.SUPPRESS)


def warn_of_ignored(options: argparse.Namespace) -> None:
    """One line for all of vLLM's options that change nothing here."""
    ignored = getattr(options, "ignored_options", [])
    if ignored:
        logger.warning("ignoring options of vLLM that change nothing here: %s", ", ".join(ignored))
