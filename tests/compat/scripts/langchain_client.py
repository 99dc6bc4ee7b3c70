"""LangChain's ChatOpenAI and OpenAI."""

import asyncio

from langchain_openai import ChatOpenAI, OpenAI
from report import MODEL, QUESTION, URL, case, run

_FIELDS = {"base_url": f"{URL}/v1", "api_key": "none", "model": MODEL, "temperature": 0, "max_retries": 0}


def chat(**fields):
    return ChatOpenAI(**{**_FIELDS, "max_tokens": 8, **fields})


@case
def invoke_answers_with_usage():
    made = chat().invoke(QUESTION)
    assert made.content
    assert made.usage_metadata["output_tokens"] > 0


@case
def stream_gives_what_invoke_gives():
    parts = list(chat(stream_usage=True).stream(QUESTION))
    assert "".join(part.content for part in parts) == chat().invoke(QUESTION).content
    assert sum((part.usage_metadata or {}).get("output_tokens", 0) for part in parts) > 0


@case
def a_batch_and_async_answer():
    assert all(each.content for each in chat().batch([QUESTION] * 4))
    assert asyncio.run(chat().ainvoke(QUESTION)).content


@case
def roles_of_a_conversation_are_taken():
    assert chat().invoke([("system", "Be brief."), ("human", "Hello"), ("ai", "Hello!"), ("human", QUESTION)]).content


@case
def responses_answer():
    assert chat(use_responses_api=True).invoke(QUESTION).content


@case
def completions_answer():
    assert OpenAI(**_FIELDS, max_tokens=4).invoke(QUESTION)


@case
def a_schema_gives_its_object():
    schema = {"title": "Found", "type": "object", "properties": {"ok": {"type": "boolean"}}, "required": ["ok"]}
    made = chat(max_tokens=64).with_structured_output(schema, method="json_schema").invoke(QUESTION)
    assert isinstance(made["ok"], bool), made


@case
def tools_of_a_model_that_has_none_are_refused():
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}
    try:
        chat().bind_tools([tool]).invoke(QUESTION)
    except Exception as error:
        assert "tool" in str(error), error
    else:
        raise AssertionError("it was not refused")


run()
