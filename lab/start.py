"""What a script needs to know before it starts: who launched it, and on which device it is to work."""

import contextlib
import os
import sys
import traceback

import torch


def launched() -> tuple[int, int]:
    """This process's rank and the number of ranks, as torchrun says, or 0 and 1 without it.

    Raises ValueError where only a part of torchrun's variables is set, as by a cluster's own launcher: such a process
    would wait for others that do not exist, or do a part of the work and call it done."""
    wanted = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    given = {name: os.environ.get(name, "") for name in wanted}
    if not given["RANK"] and not given["WORLD_SIZE"]:
        return 0, 1
    numbers = [given[name] for name in wanted if name != "MASTER_ADDR"]
    if not given["MASTER_ADDR"] or not all(text.isdecimal() for text in numbers):
        said = ", ".join(f"{name}={text}" for name, text in given.items() if text)
        raise ValueError(
            f"torchrun's variables are set in part ({said}): start with torchrun, or unset RANK, WORLD_SIZE"
        )
    rank, count = int(given["RANK"]), int(given["WORLD_SIZE"])
    if rank >= count:
        raise ValueError(f"RANK={rank} is not below WORLD_SIZE={count}")
    return rank, count


def start_output() -> None:
    """From now on what the terminal cannot show, in the name of a file, is spelled out instead of ending the script,
    and where there is no terminal at all, what is said goes nowhere."""
    sys.stdout, sys.stderr = (stream or open(os.devnull, "w") for stream in (sys.stdout, sys.stderr))
    with contextlib.suppress(AttributeError):  # whatever stands in for the terminal in a notebook
        sys.stdout.reconfigure(errors="backslashreplace")


def out_of_memory(error: Exception) -> bool:
    """Is this what torch or numpy says where memory, of a GPU or of the machine, is not enough?"""
    known = isinstance(error, (MemoryError, torch.OutOfMemoryError))
    return known or "allocate memory" in str(error) or "not enough memory" in str(error)


def last_words(error: Exception, model: str | None) -> str | None:
    """What evaluate.py says of what ended it, or None for a fault of its own. model: somebody's, under attack."""
    said = (str(error).strip() or type(error).__name__).splitlines()[0]
    if isinstance(error, OSError):  # a full disk, say
        return f"{said}; the same command goes on from the last finished chunk"
    if out_of_memory(error):
        return f"the memory is not enough ({said}): choose a smaller --limit, --chunk or --samples"
    last = traceback.extract_tb(error.__traceback__)[-1]
    where = f"{last.filename}, line {last.lineno}"
    return model and f"{model} failed under attack ({said}; {where}); what is finished is kept"


def start_device(device: str | None) -> None:
    """Before anything is computed: ValueError if nothing can be on this device here (None is left to the caller), and
    cuDNN is told to repeat itself, so that on a GPU, too, what was stopped ends as if it had not been."""
    torch.backends.cudnn.deterministic = True
    if device == "cuda" and os.environ.get("LOCAL_RANK"):  # its own, or every process would take memory of the first
        device = f"cuda:{os.environ['LOCAL_RANK']}"
    try:
        torch.empty(1, device=device or "cpu").add(1)
    except Exception as error:  # torch raises anything, from AssertionError to NotImplementedError
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"--device {device} cannot be used here ({reason}); leave it out") from None
