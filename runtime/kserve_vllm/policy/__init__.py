"""What decides about requests: each module alone, none of them knows a transport or vLLM."""
