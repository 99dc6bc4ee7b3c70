"""Liveness of a worker: fail once the head that it joined is another process or is gone for good."""

import os
import pathlib
import sys
import urllib.request

memory = pathlib.Path("/tmp/head-started")
head = os.environ["HEAD_SVC"]
seen = memory.read_text() if memory.exists() else ""
started = "alive"
try:
    with urllib.request.urlopen(f"http://{head}:8080/metrics", timeout=5) as answer:
        for line in answer.read().decode().splitlines():
            if line.startswith("process_start_time_seconds"):
                started = line.split()[-1]
except OSError as error:
    # Before the first answer the head may still be pulling its image.
    print(f"head does not answer: {error}")
    sys.exit(1 if seen else 0)
if seen and seen != started:
    sys.exit(f"head started anew: {seen} was {started}")
memory.write_text(started)
