"""grpclib, over the messages of Triton's and KServe's V2."""

import asyncio
from pathlib import Path

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from grpclib.client import Channel, StreamStreamMethod, UnaryUnaryMethod
from grpclib.const import Status
from grpclib.exceptions import GRPCError
from report import GRPC, MODEL, QUESTION, case, run_async

_FILES = descriptor_pb2.FileDescriptorSet.FromString(Path("v2.bin").read_bytes())
_POOL = descriptor_pool.DescriptorPool()
for _file in _FILES.file:
    _POOL.Add(_file)


def message(name, /, **fields):
    return message_factory.GetMessageClass(_POOL.FindMessageTypeByName(f"inference.{name}"))(**fields)


def method(channel, name, kind=UnaryUnaryMethod, answer=None):
    request = "ModelInfer" if name == "ModelStreamInfer" else name
    types = type(message(f"{request}Request")), type(message(answer or f"{name}Response"))
    return kind(channel, f"/inference.GRPCInferenceService/{name}", *types)


def prompt(stream=False, model=MODEL, tokens=8):
    asked = message("ModelInferRequest", model_name=model)
    text = asked.inputs.add(name="text_input", datatype="BYTES", shape=[1])
    text.contents.bytes_contents.append(QUESTION.encode())
    if stream:
        asked.inputs.add(name="stream", datatype="BOOL", shape=[1]).contents.bool_contents.append(True)
    asked.parameters["max_tokens"].int64_param = tokens
    asked.parameters["temperature"].double_param = 0
    return asked


def texts(answer):
    raw = answer.raw_output_contents
    return "".join(
        (raw[index][4:] if raw else output.contents.bytes_contents[0]).decode()
        for index, output in enumerate(answer.outputs)
        if output.name == "text_output"
    )


def channel():
    host, port = GRPC.rsplit(":", 1)
    return Channel(host, int(port))


@case
async def live_ready_and_metadata():
    async with channel() as made:
        assert (await method(made, "ServerLive")(message("ServerLiveRequest"), timeout=30)).live
        assert (await method(made, "ModelReady")(message("ModelReadyRequest", name=MODEL), timeout=30)).ready


@case
async def a_unary_call_answers():
    async with channel() as made:
        assert texts(await method(made, "ModelInfer")(prompt(), timeout=60))


@case
async def a_stream_gives_what_a_unary_call_gives():
    async with channel() as made:
        whole = texts(await method(made, "ModelInfer")(prompt(), timeout=60))
        async with method(made, "ModelStreamInfer", StreamStreamMethod).open(timeout=60) as stream:
            await stream.send_message(prompt(stream=True), end=True)
            answers = [each async for each in stream]
        text = "".join(texts(each.infer_response) for each in answers)
        assert len(answers) > 1, answers
        assert whole.endswith(text), (whole, text)


@case
async def an_unknown_model_is_not_found():
    async with channel() as made:
        try:
            await method(made, "ModelInfer")(prompt(model="nobody"), timeout=60)
        except GRPCError as error:
            assert error.status is Status.NOT_FOUND, error
        else:
            raise AssertionError("it was not refused")


@case
async def many_calls_share_one_connection():
    async with channel() as made:
        ask = method(made, "ModelInfer")
        assert all(texts(each) for each in await asyncio.gather(*(ask(prompt(), timeout=60) for _ in range(16))))


asyncio.run(run_async())
