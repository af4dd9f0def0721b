"""The rollout: sampling of responses, the KV cache for decoding, and the join of what several processes sampled."""
