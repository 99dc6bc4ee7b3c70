"""For the scripts that drive a client: a line of JSON for each case."""

import json
import os
import traceback

URL, GRPC, MODEL = os.environ["URL"], os.environ["GRPC"], os.environ["MODEL"]
QUESTION = "What is 2 + 3?"
CASES = []


def case(function):
    """A case, in the order of the file; an exception fails it."""
    CASES.append(function)
    return function


def _say(name, error):
    detail = "" if error is None else "".join(traceback.format_exception_only(error))
    print(json.dumps({"case": name.replace("_", " "), "ok": error is None, "detail": detail}), flush=True)


def run():
    """All cases that are plain functions."""
    for function in CASES:
        try:
            function()
            _say(function.__name__, None)
        except Exception as error:
            _say(function.__name__, error)


async def run_async():
    """All cases that are coroutines."""
    for function in CASES:
        try:
            await function()
            _say(function.__name__, None)
        except Exception as error:
            _say(function.__name__, error)
