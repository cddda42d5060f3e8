"""The command line: finds the command, and turns errors into messages and exit codes."""

from __future__ import annotations

import argparse
import errno
import re
import sys
from collections.abc import Callable, Sequence

from safesteer_lite.errors import REFUSES_TOO_LITTLE, Interrupted, SafeSteerError, UsageError, WeakRefusalError
from safesteer_lite.foreign import forbid_hub_kernels
from safesteer_lite.hardware.allocator import grow_segments
from safesteer_lite.shell.arguments import build_parser
from safesteer_lite.shell.commands import evaluating, exporting, machine, results, training
from safesteer_lite.shell.commands.shared import on_terminal, open_settings, run_settings
from safesteer_lite.shell.completion import script
from safesteer_lite.shell.streams import complain, protect, tell


def main(arguments: Sequence[str] | None = None, untold: tuple[type[SafeSteerError], ...] = ()) -> int:
    """Run one command.

    Args:
        arguments: the command line; None for this process's own.
        untold: errors of which nothing is said, because the caller does.

    Returns:
        The exit code.
    """
    protect()
    forbid_hub_kernels()
    grow_segments()
    parser = build_parser()
    options = parser.parse_args(arguments)
    if options.print_completion:
        tell(script(parser, options.print_completion))
        return 0
    if not hasattr(options, "command"):
        if not on_terminal():
            parser.print_help()
            return 2
        options.command = ""
    try:
        return COMMANDS[options.command](options) if options.command else wizard()
    except KeyboardInterrupt:
        return _complain("Stopped.", "Whatever was published or saved stays; `safesteer-lite resume` goes on.", 130)
    except Interrupted as error:
        return _complain(error.message, error.hint or "Go on with `safesteer-lite resume`.", 130)
    except untold as error:
        return _code_of(error)
    except UsageError as error:
        return _complain(error.message, error.hint, 2)
    except SafeSteerError as error:
        return _complain(error.message, error.hint, _code_of(error))
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package in ("", "safesteer_lite"):
            raise
        return _complain(
            f"The package {package} is not installed.",
            "Install safesteer-lite again, with what it needs; `safesteer-lite doctor` looks at all of them.",
            1,
        )
    except BrokenPipeError:
        sys.stderr.close()
        return 1
    except (MemoryError, OSError) as error:
        return _complain(*_of_the_system(error, options.command), 1)
    except RuntimeError as error:
        from safesteer_lite.method.memory import is_out_of_memory

        if not is_out_of_memory(error):
            raise
        return _complain(*_of_the_system(error, options.command), 1)


def _code_of(error: Exception) -> int:
    return REFUSES_TOO_LITTLE if isinstance(error, WeakRefusalError) else 1


def _of_the_system(error: Exception, command: str) -> tuple[str, str]:
    """What happened, and what to do about it, by what the system says."""
    number = error.errno if isinstance(error, OSError) else errno.ENOMEM
    place = getattr(error, "filename", None) or "something that is needed"
    match number:
        case errno.ENOMEM:
            # Batches have been made smaller by themselves before anybody reads this.
            message, hint = "Out of memory: not even one prompt at a time fits.", "Close other programs."
        case errno.ENOENT:
            message, hint = f"There is no {place}.", "Check the path."
        case errno.EACCES | errno.EPERM:
            message, hint = f"There is no permission for {place}.", "Change its rights, or choose another place."
        case errno.EROFS:
            message, hint = f"{place} is on a disk that cannot be written to.", "Choose another place."
        case errno.ENOSPC | errno.EDQUOT:
            message, hint = f"The disk is full: no room for {place}.", "Free some space."
        case _:
            return f"The system said: {str(error) or type(error).__name__}.", _RESUME if command in _TRAINING else ""
    if command in _TRAINING:
        hint = f"{hint} {_RESUME}"
        if number == errno.ENOMEM:
            hint += " With --set distill.chunk=16 it takes less memory."
    return message, hint


_TRAINING = ("run", "demo", "resume", "continue")
_RESUME = "What was saved stays: `safesteer-lite resume` goes on with it."


def _complain(message: str, hint: str, code: int) -> int:
    # Our own further lines are indented; a new line in the name of a file shall not look like a message of its own.
    told = re.sub(r"\n(?!  )", r"\\n", message + (f"\n  {hint}" if hint else ""))
    complain(f"safesteer-lite: {told}")
    return code


def wizard() -> int:
    """No command at all: questions, the run, its results."""
    from safesteer_lite.runs import folder as run_folders
    from safesteer_lite.shell.console import SafeConsole
    from safesteer_lite.shell.wizard.ask import forget_typed_ahead
    from safesteer_lite.shell.wizard.flow import start
    from safesteer_lite.shell.wizard.program import Program

    def execute(line: Sequence[str]) -> int:
        code = main(line, untold=(WeakRefusalError,))
        forget_typed_ahead()
        return code

    parser = build_parser()
    exports = {
        ("--to", "merged"): "16-bit safetensors: for transformers, or to convert further",
        ("--to", "gguf", "--quant", "Q8_0"): "GGUF Q8_0, about half the size: for llama.cpp, Ollama, LM Studio",
        ("--to", "gguf", "--quant", "Q5_K_M"): "GGUF Q5_K_M, smaller; can cost safety, which is measured",
        ("--to", "gguf", "--quant", "Q4_K_M"): "GGUF Q4_K_M, smaller still; can cost more of it",
        ("--to", "adapter"): "the LoRA adapter alone",
        (
            "--to",
            "lora-gguf",
        ): "the LoRA adapter as GGUF: for llama.cpp on the base's file, its strength can be turned there",
    }
    return start(
        Program(
            execute=execute,
            run_settings=lambda line: run_settings(parser.parse_args(line)),
            open_settings=lambda path: open_settings(run_folders.open_run(path)),
            exports=exports,
            runs=run_folders.RUNS_FOLDER,
            console=SafeConsole(),
        )
    )


COMMANDS: dict[str, Callable[[argparse.Namespace], int]] = {
    "run": training.run_command,
    "demo": training.demo_command,
    "resume": training.resume_command,
    "continue": training.continue_command,
    "eval": evaluating.eval_command,
    "export": exporting.export_command,
    "verify": exporting.verify_command,
    "strength": results.strength_command,
    "chat": results.chat_command,
    "report": results.report_command,
    "runs": results.runs_command,
    "presets": machine.presets_command,
    "doctor": machine.doctor_command,
}

if __name__ == "__main__":
    sys.exit(main())
