def reward(prompts, responses):
    return [10.0 * r.count("e") / max(1, len(r)) for r in responses]
def cost(prompts, responses):
    return [20.0 * r.count("a") / max(1, len(r)) - 1.0 for r in responses]
