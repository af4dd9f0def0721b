"""Python reward and cost functions, as a user would write them."""

import sys
import time


def reward(prompts, responses):
    """Letters e per character."""
    return [10.0 * r.count("e") / max(1, len(r)) for r in responses]


def cost(prompts, responses):
    """Positive for responses with more than 10 % vowels a."""
    return [20.0 * r.count("a") / max(1, len(r)) - 1.0 for r in responses]


class Counter:
    """A scorer that is no function."""

    def __call__(self, prompts, responses):
        return [float(len(r)) for r in responses]


counter = Counter()


def not_a_number(prompts, responses):
    """NaN for the second response."""
    return [float("nan") if i == 1 else 0.0 for i in range(len(responses))]


def too_few(prompts, responses):
    """One score less than responses."""
    return [0.0] * (len(responses) - 1)


def raising(prompts, responses):
    """A scorer with a bug."""
    raise KeyError("harm")


def words(prompts, responses):
    """Words of the response."""
    return [len(r.split()) for r in responses]


def prompt_length(prompts, responses):
    """Characters of the prompt."""
    return [len(p) for p in prompts]


def hanging(prompts, responses):
    """A scorer that waits for a service that does not answer."""
    time.sleep(60)


def leaving(prompts, responses):
    """A scorer that ends the process."""
    sys.exit("no key")
