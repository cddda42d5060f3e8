"""The process that llama.cpp runs in: a request a line in, an answer a line out, both JSON.

It is a process of its own because llama.cpp ends whoever it runs in, or waits for ever, where a file makes one of its threads
throw. Nothing is imported here but llama.cpp itself, so that the process is there at once.
"""

from __future__ import annotations

import json
import os


def serve(file: str, context: str, threads: str, adapter: str = "") -> None:
    """Load a GGUF file, say so, and answer until standard input ends.

    Args:
        file: the GGUF file.
        context: the longest prompt with its answer, in tokens.
        threads: CPU threads.
        adapter: the GGUF file of a LoRA adapter to put on it, as it was trained; empty for none.
    """
    # llama.cpp may write to standard output too: that goes to standard error, and the answers to where nothing else does.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def tell(answer: object) -> None:
        answers.write(json.dumps(answer) + "\n")
        answers.flush()

    import xllamacpp

    parameters = xllamacpp.CommonParams()
    parameters.model.path = file
    parameters.n_ctx, parameters.n_parallel = int(context), 1
    parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = int(threads)
    parameters.verbosity, parameters.warmup = -1, False
    if adapter:
        lora = xllamacpp.CommonAdapterLoraInfo()
        lora.path, lora.scale = adapter, 1.0
        parameters.lora_adapters = [lora]
    try:
        server = xllamacpp.Server(parameters)
    except RuntimeError as error:
        tell({"error": {"message": str(error)}})
        os._exit(1)
    tell({"ready": True})
    ways = {"completion": server.handle_completions, "chat": server.handle_chat_completions}
    with os.fdopen(0, encoding="utf-8") as requests:
        for line in requests:
            request = json.loads(line)
            try:
                tell(ways[request.pop("way")](request))
            except Exception as error:
                tell({"error": {"message": str(error) or type(error).__name__}})
    # Without the server's own end, which waits for its threads although one that threw is gone: the system frees all of it.
    os._exit(0)
