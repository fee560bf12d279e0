"""The official OpenAI SDK with this server: chat, stream, switch models.

    make run
    .venv/bin/pip install openai
    .venv/bin/python examples/openai_sdk.py

OPENAI_BASE_URL names another server, OPENAI_API_KEY its key, OTHER_MODEL a second model to switch
to.
"""

import os

from openai import OpenAI

client = OpenAI(
    base_url=os.environ.get("OPENAI_BASE_URL", "http://127.0.0.1:5000/v1"),
    api_key=os.environ.get("OPENAI_API_KEY", "not-needed"),
)


def chat(model: str) -> None:
    """One question, one answer."""
    answer = client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": "What is a lighthouse?"}],
        max_tokens=30,
        temperature=0,
    )
    usage = answer.usage
    print(f"{model}: {answer.choices[0].message.content}")
    if usage:
        print(f"({usage.prompt_tokens} tokens of prompt, {usage.completion_tokens} of answer)")


def stream(model: str) -> None:
    """The same, as the tokens come."""
    chunks = client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": "Count to five."}],
        max_tokens=30,
        stream=True,
        stream_options={"include_usage": True},
    )
    for chunk in chunks:
        for choice in chunk.choices:
            print(choice.delta.content or "", end="", flush=True)
    print()


def main() -> None:
    """Chat with the resident model, then with another one, then with the first again."""
    models = client.models.list().data
    for model in models:
        if getattr(model, "loaded", False):
            print(f"in memory: {model.id}")
    default = "smollm2-135m-instruct"
    chat(default)
    stream(default)
    if other := os.environ.get("OTHER_MODEL"):
        chat(other)  # the server drains, evicts and loads; this call waits for it
        chat(default)


if __name__ == "__main__":
    main()
