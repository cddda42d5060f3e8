"""The card's memory, as torch sees it while it works."""

from __future__ import annotations


def free_memory() -> int:
    """Bytes that torch can still take on the current card: what is free there, what torch holds for reuse, and no more
    than a cap on this process allows.

    The cap is `torch.cuda.set_per_process_memory_fraction`, which the driver's own figure knows nothing of.
    """
    import torch

    free, total = torch.cuda.mem_get_info()
    reserved, allocated = torch.cuda.memory_reserved(), torch.cuda.memory_allocated()
    # Older versions of torch cannot say what the cap is.
    fraction = getattr(torch.cuda, "get_per_process_memory_fraction", lambda: 1.0)()
    return min(free + reserved - allocated, int(fraction * total) - allocated)
