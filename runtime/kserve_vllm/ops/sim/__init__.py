"""Discrete events: requests, replicas with continuous batching, and the autoscalers that start and stop them."""
