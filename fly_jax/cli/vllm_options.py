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

# What they set is decided otherwise here, and answers are the same with any value. Each has a --no- form too.
HARMLESS_SWITCHES = (
    "--aggregate-engine-logging",
    "--async-scheduling",
    "--calculate-kv-scales",
    "--disable-async-output-proc",
    "--disable-cascade-attn",
    "--disable-custom-all-reduce",
    "--disable-fastapi-docs",
    "--disable-frontend-multiprocessing",
    "--disable-hybrid-kv-cache-manager",
    "--disable-log-requests",
    "--disable-log-stats",
    "--disable-uvicorn-access-log",
    "--enable-chunked-prefill",
    "--enable-dbo",
    "--enable-eplb",
    "--enable-expert-parallel",
    "--enable-log-deltas",
    "--enable-log-outputs",
    "--enable-log-requests",
    "--enable-offline-docs",
    "--enable-prefix-caching",
    "--enable-prompt-tokens-details",
    "--enable-request-id-headers",
    "--enable-server-load-tracking",
    "--enforce-eager",
    "--exclude-tools-when-tool-choice-none",
    "--fail-on-environ-validation",
    "--language-model-only",
    "--log-error-stack",
    "--multi-step-stream-outputs",
    "--ray-workers-use-nsight",
    "--trust-remote-code",
    "--use-tqdm-on-load",
    "--use-v2-block-manager",
)
HARMLESS_VALUES = (
    "--allowed-local-media-path",
    "--api-server-count",
    "--compilation-config",
    "--disable-access-log-for-endpoints",
    "--distributed-executor-backend",
    "--download-dir",
    "--guided-decoding-backend",
    "--ignore-patterns",
    "--kv-cache-metrics-sample",
    "--long-prefill-token-threshold",
    "--max-cudagraph-capture-size",
    "--max-log-len",
    "--max-long-partial-prefills",
    "--max-num-partial-prefills",
    "--max-parallel-loading-workers",
    "--max-seq-len-to-capture",
    "--model-impl",
    "--model-loader-extra-config",
    "--num-lookahead-slots",
    "--num-scheduler-steps",
    "--preemption-mode",
    "--prefix-caching-hash-algo",
    "--pt-load-map-location",
    "--safetensors-load-strategy",
    "--scheduler-delay-factor",
    "--show-hidden-metrics-for-version",
    "--stream-interval",
    "--structured-outputs-config",
    "--swap-space",
    "--tokenizer-pool-size",
    "--uvicorn-log-level",
)
HARMLESS_LISTS = ("--cuda-graph-sizes", "--cudagraph-capture-sizes")
# Values of refused options that ask for what is done anyway.
NEUTRAL = {
    "--chat-template-content-format": ("auto", "string"),
    "--config-format": ("auto", "hf"),
    "--cpu-offload-gb": ("0",),
    "--data-parallel-backend": ("mp",),
    "--device": ("auto",),
    "--kv-cache-dtype": ("auto",),
    "--logprobs-mode": ("raw_logprobs",),
    "--max-logprobs": (str(MAX_LOGPROBS),),
    "--nnodes": ("1",),
    "--pipeline-parallel-size": ("1",),
    "--response-role": ("assistant",),
    "--runner": ("auto", "generate"),
    "--task": ("auto", "generate"),
    "--tokenizer-mode": ("auto", "hf"),
}
SHORT = {
    "--api-server-count": "-asc",
    "--data-parallel-backend": "-dpb",
    "--nnodes": "-n",
    "--pipeline-parallel-size": "-pp",
    "--quantization": "-q",
}
# Any other value of these would change answers, or what the server may be asked.
REFUSED = {
    "--additional-config": "it is for plugins, and there are none",
    "--allow-credentials": "answers to web pages never carry credentials",
    "--allowed-headers": "with --allowed-origins any header is allowed",
    "--allowed-methods": "with --allowed-origins GET and POST are allowed",
    "--chat-template": "the folder's own chat template is used: put yours into the folder as chat_template.jinja",
    "--chat-template-content-format": "parts of a message are joined to one text",
    "--code-revision": "no code of a model is run",
    "--collect-detailed-traces": "traces are not exported",
    "--config": "write the options on the command line",
    "--config-format": "config.json of the folder is read",
    "--cpu-offload-gb": "weights stay on the devices",
    "--data-parallel-address": "one process serves all devices",
    "--data-parallel-backend": "one process serves all devices",
    "--data-parallel-rank": "one process serves all devices",
    "--data-parallel-size-local": "one process serves all devices: use --data-parallel-size",
    "--default-chat-template-kwargs": "send chat_template_kwargs with the request",
    "--device": "give --devices, how many to use; which kind is what jax finds",
    "--disable-sliding-window": "config.json of the folder says which layers have a window",
    "--enable-auto-tool-choice": "tools are not supported",
    "--enable-force-include-usage": "a stream tells usage where stream_options asks for it",
    "--enable-lora": "LoRA adapters are not supported: merge the adapter into the weights",
    "--enable-prompt-embeds": "prompts are text or token ids",
    "--enable-reasoning": "reasoning is not parsed out of answers",
    "--enable-sleep-mode": "weights stay on the devices",
    "--enable-ssl-refresh": "TLS is not supported: put a proxy in front",
    "--enable-tokenizer-info-endpoint": "there is no such endpoint",
    "--h11-max-header-count": "the size of headers is bounded, not their number",
    "--h11-max-incomplete-event-size": "the size of headers is bounded by h11",
    "--headless": "one process serves all devices",
    "--hf-config-path": "config.json of the folder is read",
    "--hf-overrides": "change config.json in the folder",
    "--hf-token": "models are read from a local folder: download it first",
    "--kv-cache-dtype": "the KV cache has the dtype of the weights",
    "--kv-cache-memory-bytes": "use --num-gpu-blocks-override or --gpu-memory-utilization",
    "--kv-events-config": "events of the KV cache are not published",
    "--kv-transfer-config": "KV is moved between this server's own devices only",
    "--limit-mm-per-prompt": "only text is supported",
    "--log-config-file": "use fly-jax --log-level",
    "--logits-processors": "logits processors are not supported",
    "--logprobs-mode": "log-probabilities are of the model's own distribution",
    "--lora-modules": "LoRA adapters are not supported: merge the adapter into the weights",
    "--max-logprobs": f"a request may ask for {MAX_LOGPROBS} alternatives",
    "--max-lora-rank": "LoRA adapters are not supported: merge the adapter into the weights",
    "--max-loras": "LoRA adapters are not supported: merge the adapter into the weights",
    "--middleware": "code of others is not loaded into the server",
    "--nnodes": "one process serves all devices",
    "--num-speculative-tokens": "speculative decoding is not supported",
    "--otlp-traces-endpoint": "traces are not exported",
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
    "--skip-tokenizer-init": "the tokenizer is read from the model's folder",
    "--speculative-config": "speculative decoding is not supported",
    "--speculative-model": "speculative decoding is not supported",
    "--ssl-ca-certs": "TLS is not supported: put a proxy in front",
    "--ssl-cert-reqs": "TLS is not supported: put a proxy in front",
    "--ssl-certfile": "TLS is not supported: put a proxy in front",
    "--ssl-keyfile": "TLS is not supported: put a proxy in front",
    "--task": "models generate text only",
    "--tokenizer": "the tokenizer is read from the model's folder: put its files there",
    "--tokenizer-mode": "the folder's tokenizer.json is used",
    "--tokenizer-revision": "models are read from a local folder: download that revision",
    "--tool-call-parser": "tools are not supported",
    "--tool-parser-plugin": "tools are not supported",
    "--tool-server": "tools are not supported",
    "--trust-request-chat-template": "the folder's own chat template is used",
    "--uds": "the server listens on a TCP port",
    "--worker-cls": "code of others is not loaded into the server",
    "--worker-extension-cls": "code of others is not loaded into the server",
}

# Refused options that begin so take no value; their --no- forms ask for what is done anyway.
SWITCH_VERBS = ("--allow-", "--disable-", "--enable-", "--return-", "--skip-", "--trust-")


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
    refused_switches = (name for name in REFUSED if name.startswith(SWITCH_VERBS))
    negated = tuple(f"--no-{name.removeprefix('--')}" for name in (*HARMLESS_SWITCHES, *refused_switches))
    for names, action, nargs in (
        ((*HARMLESS_SWITCHES, *negated), _Ignored, 0),
        (HARMLESS_VALUES, _Ignored, 1),
        (HARMLESS_LISTS, _Ignored, "+"),
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
