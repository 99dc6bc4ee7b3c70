"""OpenAI's Agents SDK: its loop of calls, results and answers, over chat and over responses."""

import asyncio

from agents import (
    Agent,
    ModelSettings,
    OpenAIChatCompletionsModel,
    OpenAIResponsesModel,
    Runner,
    function_tool,
    set_tracing_disabled,
)
from openai import AsyncOpenAI
from report import MODEL, URL, case, run_async

set_tracing_disabled(True)
CLIENT = AsyncOpenAI(base_url=f"{URL}/v1", api_key="none", max_retries=0)
ASKED = "What is the weather in Paris?"
PLACES = []


@function_tool
def get_weather(location: str) -> str:
    """Current weather."""
    PLACES.append(location)
    return "snow"


def agent(model):
    settings = ModelSettings(temperature=0, max_tokens=200)
    return Agent(name="weather", model=model(MODEL, CLIENT), tools=[get_weather], model_settings=settings)


async def loops(model):
    PLACES.clear()
    made = await Runner.run(agent(model), ASKED, max_turns=4)
    assert PLACES == ["Paris"], PLACES
    assert "snow" in made.final_output, made.final_output


async def streams(model):
    PLACES.clear()
    made = Runner.run_streamed(agent(model), ASKED, max_turns=4)
    kinds = [event.type async for event in made.stream_events()]
    assert PLACES == ["Paris"], PLACES
    assert "snow" in made.final_output, made.final_output
    assert "run_item_stream_event" in kinds, kinds


@case
async def an_agent_over_chat_calls_its_tool_and_answers():
    await loops(OpenAIChatCompletionsModel)


@case
async def an_agent_over_responses_calls_its_tool_and_answers():
    await loops(OpenAIResponsesModel)


@case
async def an_agent_over_chat_streams():
    await streams(OpenAIChatCompletionsModel)


@case
async def an_agent_over_responses_streams():
    await streams(OpenAIResponsesModel)


@case
async def a_second_turn_of_the_conversation_is_taken():
    first = await Runner.run(agent(OpenAIChatCompletionsModel), ASKED, max_turns=4)
    turns = [*first.to_input_list(), {"role": "user", "content": "Thank you."}]
    assert (await Runner.run(agent(OpenAIChatCompletionsModel), turns, max_turns=4)).final_output


asyncio.run(run_async())
