"""litellm's providers: OpenAI-like, vLLM's own, and Anthropic's."""

import os

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # no look at the network

import litellm
from report import MODEL, QUESTION, URL, case, run

litellm.num_retries = 0
_MESSAGES = [{"role": "user", "content": QUESTION}]


def ask(provider="openai", **fields):
    base = URL if provider == "anthropic" else f"{URL}/v1"
    fields = {"messages": _MESSAGES, "max_tokens": 8, "temperature": 0, "model": f"{provider}/{MODEL}", **fields}
    return litellm.completion(api_base=base, api_key="none", **fields)


def answers(provider):
    made = ask(provider)
    assert made.choices[0].message.content
    assert made.usage.completion_tokens > 0
    text = "".join(chunk.choices[0].delta.content or "" for chunk in ask(provider, stream=True) if chunk.choices)
    assert text == made.choices[0].message.content, text


@case
def openai_s_provider_answers_and_streams():
    answers("openai")


@case
def vllm_s_provider_answers_and_streams():
    answers("hosted_vllm")


@case
def anthropic_s_provider_answers_and_streams():
    answers("anthropic")


@case
def a_stream_ends_with_usage():
    chunks = list(ask(stream=True, stream_options={"include_usage": True}))
    assert chunks[-1].usage.completion_tokens > 0


@case
def an_unknown_model_is_not_found():
    try:
        ask(model="openai/nobody")
    except litellm.NotFoundError as error:
        assert "nobody" in str(error)
    else:
        raise AssertionError("it was not refused")


@case
def a_prompt_over_the_context_is_told_as_that():
    try:
        ask(messages=[{"role": "user", "content": "word " * 4000}])
    except litellm.ContextWindowExceededError:
        return
    raise AssertionError("it was not refused")


@case
def a_wrong_value_is_a_bad_request():
    try:
        ask(temperature=-1)
    except litellm.BadRequestError as error:
        assert "temperature" in str(error)
    else:
        raise AssertionError("it was not refused")


@case
def embeddings_of_a_model_that_has_none_are_refused():
    try:
        litellm.embedding(model=f"openai/{MODEL}", input=["a"], api_base=f"{URL}/v1", api_key="none")
    except (litellm.BadRequestError, litellm.NotFoundError):
        return
    raise AssertionError("it was not refused")


run()
