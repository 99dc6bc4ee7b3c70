"""Start one worker of a multi-node service: find this node's rank, then become `kserve-vllm serve`."""

import os
import socket
import sys
import time

nodes = int(os.environ["PIPELINE_PARALLEL_SIZE"])
me = os.environ["VLLM_HOST_IP"]
service = os.environ.get("WORKER_SVC", "")
rank = 1
# /tmp outlives a restart of the container: what the liveness probe remembered of the head is void.
if os.path.exists("/tmp/head-started"):
    os.remove("/tmp/head-started")
if nodes > 2:
    # Workers are pods of one Deployment and have no number. All of them see the same addresses behind
    # the headless service, so the place in the sorted list is a number that they agree on.
    if not service:
        sys.exit("more than two nodes need a KServe that sets WORKER_SVC")
    peers = []
    while len(peers) != nodes - 1 or me not in peers:
        try:
            found = socket.getaddrinfo(service, None, proto=socket.IPPROTO_TCP)
            peers = sorted({address[4][0] for address in found})
        except socket.gaierror:
            peers = []
        if len(peers) != nodes - 1 or me not in peers:
            print(f"waiting for {nodes - 1} workers behind {service}, have {peers}", flush=True)
            time.sleep(2)
    rank = peers.index(me) + 1
os.execvp("kserve-vllm", ["kserve-vllm", "serve", *sys.argv[1:], f"--node-rank={rank}"])
