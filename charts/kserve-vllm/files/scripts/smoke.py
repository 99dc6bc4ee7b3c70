"""Ask one InferenceService whether it is ready and then for one completion (or embedding).

Arguments: address, model, task, seconds to wait, path that says ready, path of the API, `keys` or `open`. A service
that asks for API keys gets the one in API_KEY; without one the test is content when it is asked for it.
"""

import json
import os
import sys
import time
import urllib.error
import urllib.request

base, model, task, patience = sys.argv[1], sys.argv[2], sys.argv[3], float(sys.argv[4])
ready, api, access = sys.argv[5], sys.argv[6], sys.argv[7]
key = os.environ.get("API_KEY", "").strip()


def ask(path, body=None):
    data = None if body is None else json.dumps(body).encode()
    headers = {"Content-Type": "application/json"}
    if key:
        headers["Authorization"] = f"Bearer {key}"
    request = urllib.request.Request(base + path, data, headers)
    with urllib.request.urlopen(request, timeout=60) as answer:
        return answer.read()


deadline = time.monotonic() + patience
while True:
    try:
        ask(ready)
        break
    except OSError as error:
        if time.monotonic() > deadline:
            sys.exit(f"{model} is not ready after {patience:.0f} s: {error}")
        time.sleep(2)
try:
    if api == "/v2/models":
        found = len(json.loads(ask(f"{api}/{model}/generate", {"text_input": "Hello", "max_tokens": 8}))["text_output"])
        result = "empty text"
        print(f"{model} is ready and wrote {found} characters")
    elif task == "embed":
        result = json.loads(ask(f"{api}/embeddings", {"model": model, "input": "Hello"}))
        found = len(result["data"][0]["embedding"])
        print(f"{model} is ready and embeds into {found} dimensions")
    else:
        result = json.loads(ask(f"{api}/completions", {"model": model, "prompt": "Hello", "max_tokens": 8}))
        found = result["usage"]["completion_tokens"]
        print(f"{model} is ready and wrote {found} tokens")
    if access == "keys" and not key:
        sys.exit(f"{model} should ask for an API key, and answered without one")
except urllib.error.HTTPError as error:
    if error.code == 401 and access == "keys" and not key:
        print(f"{model} is ready and asks for an API key; give one in tests.apiKey to test more")
        sys.exit(0)
    sys.exit(f"{model} answers {error.code}: {error.read().decode(errors='replace')[:500]}")
if not found:
    sys.exit(f"{model} answered with nothing: {result}")
