"""Tools and JSON over chat, responses and messages, by OpenAI's and Anthropic's SDKs."""

import json

from anthropic import Anthropic
from openai import OpenAI
from report import MODEL, URL, case, run

openai = OpenAI(base_url=f"{URL}/v1", api_key="none", max_retries=0)
anthropic = Anthropic(base_url=URL, api_key="none", max_retries=0)

ASKED = "What is the weather in Paris?"
RESULT = "snow"
PARAMETERS = {"type": "object", "properties": {"location": {"type": "string"}}, "required": ["location"]}
FUNCTION = {"name": "get_weather", "description": "Current weather", "parameters": PARAMETERS}
CHAT_TOOLS = [{"type": "function", "function": FUNCTION}]
RESPONSES_TOOLS = [{"type": "function", **FUNCTION}]
MESSAGES_TOOLS = [{"name": "get_weather", "description": "Current weather", "input_schema": PARAMETERS}]
SCHEMA = {
    "type": "object",
    "properties": {
        "sum": {"type": "integer"},
        "text": {"type": "string"},
        "of": {"type": "array", "items": {"type": "string"}},
    },
    "required": ["sum", "text", "of"],
    "additionalProperties": False,
}


def is_call(name, arguments):
    arguments = json.loads(arguments) if isinstance(arguments, str) else arguments
    assert (name, arguments) == ("get_weather", {"location": "Paris"}), (name, arguments)


def chat(messages=None, **fields):
    messages = messages or [{"role": "user", "content": ASKED}]
    return openai.chat.completions.create(
        **{"model": MODEL, "messages": messages, "temperature": 0, "max_tokens": 200, "tools": CHAT_TOOLS, **fields}
    )


def called(choice):
    assert choice.finish_reason == "tool_calls", choice
    (call,) = choice.message.tool_calls
    is_call(call.function.name, call.function.arguments)
    return call


@case
def chat_calls_a_tool_by_itself():
    called(chat().choices[0])


@case
def chat_calls_a_tool_that_is_required():
    called(chat(tool_choice="required", parallel_tool_calls=False).choices[0])


@case
def chat_calls_a_tool_that_is_named():
    (call,) = chat(tool_choice={"type": "function", "function": {"name": "get_weather"}}).choices[0].message.tool_calls
    is_call(call.function.name, call.function.arguments)


@case
def chat_streams_a_call():
    name, arguments, reasons = "", "", []
    for chunk in chat(stream=True):
        for choice in chunk.choices:
            reasons.append(choice.finish_reason)
            assert not choice.delta.content, choice
            for call in choice.delta.tool_calls or ():
                name += call.function.name or ""
                arguments += call.function.arguments or ""
    is_call(name, arguments)
    assert reasons[-1] == "tool_calls", reasons


@case
def chat_answers_from_what_the_tool_returned():
    message = chat().choices[0].message
    result = {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": RESULT}
    made = chat([{"role": "user", "content": ASKED}, message, result]).choices[0]
    assert made.finish_reason == "stop", made
    assert RESULT in made.message.content, made


@case
def chat_answers_by_itself_where_no_tool_is_needed():
    for fields in ({}, {"tool_choice": "none"}):
        made = chat([{"role": "user", "content": "What is KServe?"}], **fields).choices[0]
        assert made.finish_reason == "stop", made
        assert not made.message.tool_calls, made
        assert "KServe is a platform" in made.message.content, made


@case
def chat_ends_json_under_a_schema():
    form = {"type": "json_schema", "json_schema": {"name": "found", "schema": SCHEMA, "strict": True}}
    for asked in ("What is 17 + 25?", ASKED, "Hello"):
        made = chat([{"role": "user", "content": asked}], response_format=form, tools=None).choices[0]
        assert made.finish_reason == "stop", made
        assert set(json.loads(made.message.content)) == {"sum", "text", "of"}, made


@case
def chat_ends_json_without_a_schema():
    made = chat(response_format={"type": "json_object"}, tools=None).choices[0]
    assert made.finish_reason == "stop", made
    assert isinstance(json.loads(made.message.content), dict), made


def respond(asked=ASKED, **fields):
    return openai.responses.create(
        **{
            "model": MODEL,
            "input": asked,
            "temperature": 0,
            "max_output_tokens": 200,
            "tools": RESPONSES_TOOLS,
            **fields,
        }
    )


def response_call(made):
    (call,) = [item for item in made.output if item.type == "function_call"]
    is_call(call.name, call.arguments)
    return call


@case
def responses_call_a_tool():
    for choice in ("auto", "required", {"type": "function", "name": "get_weather"}):
        made = respond(tool_choice=choice)
        assert made.status == "completed", made
        response_call(made)


@case
def responses_stream_a_call():
    events = list(respond(stream=True))
    arguments = "".join(event.delta for event in events if event.type == "response.function_call_arguments.delta")
    is_call("get_weather", arguments)
    (done,) = [event for event in events if event.type == "response.function_call_arguments.done"]
    assert done.arguments == arguments, done
    assert events[-1].type == "response.completed", events[-1]
    response_call(events[-1].response)


@case
def responses_answer_from_what_the_tool_returned():
    call = response_call(respond())
    output = {"type": "function_call_output", "call_id": call.call_id, "output": RESULT}
    made = respond([{"role": "user", "content": ASKED}, call, output])
    assert RESULT in made.output_text, made


@case
def responses_answer_after_a_stored_response():
    made = respond()
    output = {"type": "function_call_output", "call_id": response_call(made).call_id, "output": RESULT}
    assert RESULT in respond([output], previous_response_id=made.id).output_text


@case
def responses_end_json_under_a_schema():
    form = {"format": {"type": "json_schema", "name": "found", "schema": SCHEMA, "strict": True}}
    made = respond("What is 17 + 25?", text=form, tools=[])
    assert made.status == "completed", made
    assert set(json.loads(made.output_text)) == {"sum", "text", "of"}, made


def message(messages=None, **fields):
    messages = messages or [{"role": "user", "content": ASKED}]
    return {
        "model": MODEL,
        "messages": messages,
        "max_tokens": 200,
        "tools": MESSAGES_TOOLS,
        "extra_body": {"temperature": 0},  # of which this version of the SDK has no argument
        **fields,
    }


def message_call(made):
    assert made.stop_reason == "tool_use", made
    (block,) = [block for block in made.content if block.type == "tool_use"]
    is_call(block.name, block.input)
    return block


@case
def messages_call_a_tool():
    for choice in ({"type": "auto"}, {"type": "any"}, {"type": "tool", "name": "get_weather"}):
        message_call(anthropic.messages.create(**message(tool_choice=choice)))


@case
def messages_stream_a_call():
    with anthropic.messages.stream(**message()) as stream:
        kinds = [event.type for event in stream]
        message_call(stream.get_final_message())
    assert kinds[0] == "message_start", kinds
    assert kinds[-1] == "message_stop", kinds
    assert "input_json" in kinds, kinds


@case
def messages_answer_from_what_the_tool_returned():
    made = anthropic.messages.create(**message())
    result = {"type": "tool_result", "tool_use_id": message_call(made).id, "content": RESULT}
    turns = [{"role": "user", "content": ASKED}, {"role": "assistant", "content": made.content}]
    made = anthropic.messages.create(**message([*turns, {"role": "user", "content": [result]}]))
    assert made.stop_reason == "end_turn", made
    assert RESULT in made.content[0].text, made


run()
