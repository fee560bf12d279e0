"""The OpenAI SDK: list the models, complete a prompt.

    make run
    .venv/bin/pip install openai
    .venv/bin/python examples/openai_client_demo.py

OPENAI_BASE_URL names another server, MODEL another model, such as GPT3-dev-350m-2805.
"""

import os

from openai import APIConnectionError, OpenAI

BASE_URL = os.environ.get("OPENAI_BASE_URL", "http://127.0.0.1:5000/v1")
MODEL = os.environ.get("MODEL", "smollm2-135m-instruct")


def main() -> None:
    """List, then complete."""
    # The SDK wants some key; a server without API keys takes any.
    client = OpenAI(base_url=BASE_URL, api_key=os.environ.get("OPENAI_API_KEY", "not-needed"))
    print("Models:")
    for model in client.models.list():
        print(f"  {model.id}")
    prompt = "he is a doctor. His main goal is"
    completion = client.completions.create(model=MODEL, prompt=prompt, max_tokens=64)
    print(f"\n{completion.model}: {prompt}{completion.choices[0].text}")


if __name__ == "__main__":
    try:
        main()
    except APIConnectionError:
        raise SystemExit(f"Nothing answers at {BASE_URL}; start the server: make run") from None
