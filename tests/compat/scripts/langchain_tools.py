"""LangChain's ChatOpenAI with tools, over chat and over responses."""

from langchain_core.messages import HumanMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI
from report import MODEL, URL, case, run

ASKED = HumanMessage("What is the weather in Paris?")


@tool
def get_weather(location: str) -> str:
    """Current weather."""
    return "snow"


def chat(**fields):
    base = {"base_url": f"{URL}/v1", "api_key": "none", "model": MODEL, "temperature": 0, "max_retries": 0}
    return ChatOpenAI(**{**base, "max_tokens": 200, **fields})


def loops(model):
    made = model.invoke([ASKED])
    (call,) = made.tool_calls
    assert (call["name"], call["args"]) == ("get_weather", {"location": "Paris"}), call
    answer = model.invoke([ASKED, made, get_weather.invoke(call)])
    assert "snow" in answer.text, answer


@case
def a_bound_tool_is_called_and_answered_from():
    loops(chat().bind_tools([get_weather]))


@case
def the_same_over_responses():
    loops(chat(use_responses_api=True).bind_tools([get_weather]))


@case
def a_stream_adds_up_to_the_call():
    parts = list(chat().bind_tools([get_weather]).stream([ASKED]))
    whole = parts[0]
    for part in parts[1:]:
        whole += part
    assert [(call["name"], call["args"]) for call in whole.tool_calls] == [("get_weather", {"location": "Paris"})], (
        whole
    )


@case
def structured_output_by_a_tool_and_by_a_schema():
    schema = {"title": "find_word", "type": "object", "properties": {"word": {"type": "string"}}, "required": ["word"]}
    for method in ("function_calling", "json_schema"):
        made = chat().with_structured_output(schema, method=method).invoke("Use find_word for apple.")
        assert isinstance(made["word"], str), (method, made)


run()
