"""Ask one InferenceService whether it is ready and then for one completion (or embedding)."""

import json
import sys
import time
import urllib.error
import urllib.request

base, model, task, patience = sys.argv[1], sys.argv[2], sys.argv[3], float(sys.argv[4])


def ask(path, body=None):
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(base + path, data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        return answer.read()


deadline = time.monotonic() + patience
while True:
    try:
        ask("/v2/health/ready")
        break
    except OSError as error:
        if time.monotonic() > deadline:
            sys.exit(f"{model} is not ready after {patience:.0f} s: {error}")
        time.sleep(2)
try:
    if task == "embed":
        result = json.loads(ask("/openai/v1/embeddings", {"model": model, "input": "Hello"}))
        found = len(result["data"][0]["embedding"])
        print(f"{model} is ready and embeds into {found} dimensions")
    else:
        result = json.loads(ask("/openai/v1/completions", {"model": model, "prompt": "Hello", "max_tokens": 8}))
        found = result["usage"]["completion_tokens"]
        print(f"{model} is ready and wrote {found} tokens")
except urllib.error.HTTPError as error:
    sys.exit(f"{model} answers {error.code}: {error.read().decode(errors='replace')[:500]}")
if not found:
    sys.exit(f"{model} answered with nothing: {result}")
