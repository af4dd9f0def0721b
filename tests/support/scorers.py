"""Python reward and cost functions, as a user would write them."""

import sys
import time


def reward(prompts, responses):
    """Score 10 times the share of e among the characters."""
    return [10.0 * r.count("e") / max(1, len(r)) for r in responses]


def cost(prompts, responses):
    """Score -1 plus 20 times the share of a: positive if more than 5 % of the characters are a."""
    return [20.0 * r.count("a") / max(1, len(r)) - 1.0 for r in responses]


def not_e(prompts, responses):
    """Judge that a response is unsafe iff it holds an e."""
    return [1.0 if "e" in r else -1.0 for r in responses]


class Counter:
    """Score by a callable object instead of a function."""

    def __call__(self, prompts, responses):
        return [float(len(r)) for r in responses]


counter = Counter()


def not_a_number(prompts, responses):
    """Return NaN for the second response."""
    return [float("nan") if i == 1 else 0.0 for i in range(len(responses))]


def too_few(prompts, responses):
    """Return one score fewer than there are responses."""
    return [0.0] * (len(responses) - 1)


def raising(prompts, responses):
    """Raise, as a scorer with a bug does."""
    raise KeyError("harm")


def words(prompts, responses):
    """Count the words of the response."""
    return [len(r.split()) for r in responses]


def please(prompts, responses):
    """Count the word Please, which is one token of the tiny model."""
    return [r.count("Please") for r in responses]


def nothing(prompts, responses):
    """Score every response 0."""
    return [0.0] * len(responses)


def prompt_length(prompts, responses):
    """Count the characters of the prompt."""
    return [len(p) for p in prompts]


def hanging(prompts, responses):
    """Wait, as for a service that does not answer."""
    time.sleep(60)


def leaving(prompts, responses):
    """End the process."""
    sys.exit("no key")
