"""An agent: it asks a model, does what the model calls, and asks again with the results.

    make run
    .venv/bin/python examples/agent.py "What is 17 times 23?"

Needs `pip install openai`. OPENAI_BASE_URL names another server, MODEL another model. The default
model is far too small to reason: what it calls is always valid, and seldom clever.
"""

import json
import os
import sys

import openai

MODEL = os.environ.get("MODEL", "smollm2-135m-instruct")
NUMBERS = {"type": "object", "required": ["a", "b"], "additionalProperties": False}
NUMBERS["properties"] = {name: {"type": "number"} for name in ("a", "b")}
TOOLS = {
    "add": lambda a, b: a + b,
    "multiply": lambda a, b: a * b,
}


def main(question: str) -> None:
    """Three turns at most; the first one has to call."""
    client = openai.OpenAI(
        base_url=os.environ.get("OPENAI_BASE_URL", "http://127.0.0.1:5000/v1"),
        api_key=os.environ.get("OPENAI_API_KEY", "none"),
    )
    tools = [
        {
            "type": "function",
            "name": name,
            "description": f"{name} two numbers",
            "parameters": NUMBERS,
        }
        for name in TOOLS
    ]
    items = [{"role": "user", "content": question}]
    for turn in range(3):
        response = client.responses.create(
            model=MODEL,
            input=items,
            tools=tools,
            tool_choice="auto" if turn else "required",
            parallel_tool_calls=False,
            max_output_tokens=200,
        )
        items += [item.model_dump(exclude_none=True) for item in response.output]
        calls = [item for item in response.output if item.type == "function_call"]
        if not calls:
            break
        for call in calls:
            result = TOOLS[call.name](**json.loads(call.arguments))
            print(f"{call.name}({call.arguments}) = {result}")
            items.append(
                {"type": "function_call_output", "call_id": call.call_id, "output": str(result)}
            )
    print(response.output_text)


if __name__ == "__main__":
    main(" ".join(sys.argv[1:]) or "What is 17 times 23?")
