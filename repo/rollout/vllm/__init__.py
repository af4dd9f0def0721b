"""vLLM as the engine of the rollout, in an environment and a process of its own."""
