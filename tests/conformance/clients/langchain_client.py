"""langchain-openai: a chat model and a completion model, whole, streamed and in batches, and a context overflow."""

from __future__ import annotations

from checks import ANSWER, MODEL, PROMPT, QUESTION, TOO_LONG, expect, server_url
from langchain_core.exceptions import ContextOverflowError
from langchain_openai import ChatOpenAI, OpenAI

server = {"base_url": f"{server_url()}/v1", "api_key": "none", "max_retries": 0, "temperature": 0}

chat = ChatOpenAI(model=MODEL, max_tokens=16, **server)
answer = chat.invoke(QUESTION)
expect("chat", answer.content, ANSWER.strip())
expect("its usage", answer.usage_metadata["output_tokens"] > 0, True)
expect("streamed chat", "".join(chunk.content for chunk in chat.stream(QUESTION)), ANSWER.strip())
expect("batch", [part.content for part in chat.batch([QUESTION] * 3)], [ANSWER.strip()] * 3)
with_logprobs = chat.bind(logprobs=True, top_logprobs=2).invoke(QUESTION)
expect("alternatives", len(with_logprobs.response_metadata["logprobs"]["content"][0]["top_logprobs"]), 2)
try:
    chat.invoke(TOO_LONG)
except ContextOverflowError:
    pass
else:
    raise SystemExit("a prompt that is too long was accepted")

completion = OpenAI(model=MODEL, max_tokens=16, **server)
expect("completion", completion.invoke(PROMPT), ANSWER)
expect("streamed completion", "".join(completion.stream(PROMPT)), ANSWER)
