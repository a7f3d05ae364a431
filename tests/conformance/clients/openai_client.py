"""OpenAI's own client: models, completions and chat, whole and streamed, log-probabilities, errors by their class."""

from __future__ import annotations

import openai
from checks import ANSWER, MODEL, PROMPT, QUESTION, TOO_LONG, expect, server_url

client = openai.OpenAI(base_url=f"{server_url()}/v1", api_key="none", max_retries=0)
messages = [{"role": "user", "content": QUESTION}]

expect("models", [model.id for model in client.models.list()], [MODEL])
expect("a model", client.models.retrieve(MODEL).id, MODEL)

whole = client.completions.create(model=MODEL, prompt=PROMPT, temperature=0, max_tokens=16, logprobs=2)
expect("completion", whole.choices[0].text, ANSWER)
expect("finish reason", whole.choices[0].finish_reason, "stop")
expect("tokens of the log-probabilities", "".join(whole.choices[0].logprobs.tokens).startswith(ANSWER), True)
expect("usage", whole.usage.total_tokens, whole.usage.prompt_tokens + whole.usage.completion_tokens)

stopped = client.completions.create(model=MODEL, prompt=PROMPT, temperature=0, max_tokens=16, stop=[" kite"])
expect("text before a stop string", stopped.choices[0].text, " red")

several = client.completions.create(model=MODEL, prompt=[PROMPT, PROMPT], n=2, temperature=0, max_tokens=16)
expect("choices of two prompts", [choice.text for choice in several.choices], [ANSWER] * 4)

chunks = list(
    client.completions.create(
        model=MODEL, prompt=PROMPT, temperature=0, max_tokens=16, stream=True, stream_options={"include_usage": True}
    )
)
expect("streamed completion", "".join(chunk.choices[0].text for chunk in chunks if chunk.choices), ANSWER)
expect("streamed usage", chunks[-1].usage.total_tokens, whole.usage.total_tokens)

chat = client.chat.completions.create(
    model=MODEL, messages=messages, temperature=0, max_completion_tokens=16, logprobs=True, top_logprobs=2
)
expect("chat", (chat.choices[0].message.role, chat.choices[0].message.content), ("assistant", ANSWER.strip()))
expect("alternatives of a chat token", len(chat.choices[0].logprobs.content[0].top_logprobs), 2)

deltas = client.chat.completions.create(model=MODEL, messages=messages, temperature=0, max_tokens=16, stream=True)
text = "".join(chunk.choices[0].delta.content or "" for chunk in deltas if chunk.choices)
expect("streamed chat", text, ANSWER.strip())

with client.chat.completions.stream(model=MODEL, messages=messages, temperature=0, max_tokens=16) as stream:
    for _ in stream:
        pass
    expect("accumulated chat", stream.get_final_completion().choices[0].message.content, ANSWER.strip())

try:
    client.completions.create(model="another", prompt=PROMPT)
except openai.NotFoundError as error:
    expect("code of an unknown model", error.code, "model_not_found")
else:
    raise SystemExit("an unknown model was accepted")
try:
    client.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": TOO_LONG}])
except openai.BadRequestError as error:
    expect("code of a prompt that is too long", error.code, "context_length_exceeded")
else:
    raise SystemExit("a prompt that is too long was accepted")
