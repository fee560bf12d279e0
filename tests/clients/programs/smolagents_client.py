# /// script
# dependencies = ["smolagents[openai]", "pytest"]
# ///
"""smolagents: an agent of calls and an agent of code."""

import os

from smolagents import CodeAgent, OpenAIModel, ToolCallingAgent, tool


@tool
def get_weather(city: str) -> str:
    """Weather of a city.

    Args:
        city: its name
    """
    return f"sunny in {city}"


def model():
    return OpenAIModel(
        os.environ["MODEL"], api_base=os.environ["SCRIPTED_URL"] + "/v1", api_key="none"
    )


def test_calls():
    agent = ToolCallingAgent(tools=[get_weather], model=model(), verbosity_level=0, max_steps=3)
    said = agent.run('CALL get_weather {"city": "Gent"}\nCALL final_answer {"answer": "Sun."}')
    assert said == "Sun."
    assert agent.memory.steps[1].observations == "sunny in Gent"


def test_code():
    agent = CodeAgent(tools=[get_weather], model=model(), verbosity_level=0, max_steps=3)
    said = agent.run('SAY <code>final_answer(get_weather("Gent"))</code>')
    assert said == "sunny in Gent"
