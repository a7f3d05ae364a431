"""litellm: both of its providers for servers like this one, and that it knows a context overflow when it sees one."""

from __future__ import annotations

import litellm
from checks import ANSWER, MODEL, PROMPT, QUESTION, TOO_LONG, expect, server_url

litellm.num_retries = 0
messages = [{"role": "user", "content": QUESTION}]
for provider in ("openai", "hosted_vllm"):
    server = {"model": f"{provider}/{MODEL}", "api_base": f"{server_url()}/v1", "api_key": "none"}
    whole = litellm.completion(messages=messages, temperature=0, max_tokens=16, **server)
    expect(f"{provider} chat", whole.choices[0].message.content, ANSWER.strip())
    chunks = litellm.completion(messages=messages, temperature=0, max_tokens=16, stream=True, **server)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    expect(f"{provider} streamed chat", text, ANSWER.strip())
    for stream in (False, True):
        try:
            litellm.completion(messages=[{"role": "user", "content": TOO_LONG}], stream=stream, **server)
        except litellm.ContextWindowExceededError:
            pass
        else:
            raise SystemExit(f"{provider}: a prompt that is too long was accepted")

text = litellm.text_completion(
    model=f"text-completion-openai/{MODEL}",
    prompt=PROMPT,
    api_base=f"{server_url()}/v1",
    api_key="none",
    temperature=0,
    max_tokens=16,
)
expect("completion", text.choices[0].text, ANSWER)
