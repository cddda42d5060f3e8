"""Does the shortlist find what the authors' full sweep finds? Every (position, layer) is scored, then both picks are compared.

python -m tests.benchmarks.shortlist [MODEL_FOLDER] [name=value ...]
"""

from __future__ import annotations

import sys
import time

from safesteer_lite.config.constants import DEPTH_LIMIT
from safesteer_lite.method import directions as method
from safesteer_lite.prompts.plan import texts
from safesteer_lite.stages.contrast import keep_clear, read
from safesteer_lite.stages.direction import describe, score
from tests.benchmarks.common import say, session


def main() -> None:
    """Print both picks, the rank that separation gave each good candidate, and the time of both ways."""
    work = session(sys.argv[1:])
    config, policy = work.config.direction, work.policy
    refusal = policy.token_ids(config.refusal_openings)
    selection = work.prompts.split("selection")
    groups = (*work.prompts.direction(), selection.harmful, selection.harmless)
    sets = [read(policy, texts(group), refusal, lambda done: None) for group in groups]
    kept, threshold = keep_clear(sets, config.minimum_prompts)
    say(f"threshold {threshold:.2f}, kept {[len(entry.prompts) for entry in kept]}")
    vectors = method.mean_difference(kept[0].activations, kept[1].activations)
    separation = method.separation(vectors, kept[2].activations, kept[3].activations)
    everything = method.shortlist(separation, DEPTH_LIMIT, 0)
    places = {(entry.position, entry.layer): place for place, entry in enumerate(everything, 1)}
    for size in (config.shortlist, 0):
        began = time.monotonic()
        chosen = method.shortlist(separation, DEPTH_LIMIT, size)
        scored, coefficient = score(work, policy, vectors, chosen, kept[2].prompts, kept[3].prompts, refusal)
        say(f"{len(chosen)} candidates: {time.monotonic() - began:.0f} s, coefficient {coefficient:g}")
        for entry in scored[:6]:
            say(f"  separation rank {places[entry.position, entry.layer]:3}: {describe(entry)}")


if __name__ == "__main__":
    main()
