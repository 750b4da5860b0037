"""Forks test processes that have imported everything already; run by `tests.processes`.

Reads one JSON object per line, and answers each with one: ``{"run": [module, argument, ...], "environment": {...},
"output": file}`` with the number of the new process, ``{"poll": number}`` with how it ended, or null while it runs.
"""

import json
import os
import runpy
import sys
import warnings

import lightning.pytorch  # noqa: F401 - for the processes
import torch
import torch.distributed.checkpoint  # noqa: F401
import torchrec.distributed  # noqa: F401

import lightning_embcomp  # noqa: F401


def become(request: dict) -> None:
    """Run a module as the main one of this process, and end."""
    code = 1
    try:
        output = os.open(request["output"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        for stream in (1, 2):
            os.dup2(output, stream)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        sys.stdout, sys.stderr = (os.fdopen(stream, "w", 1, closefd=False) for stream in (1, 2))
        os.environ.update(request["environment"])
        module, *arguments = request["run"]
        sys.argv = [module, *arguments]
        warnings.simplefilter("ignore")
        torch.set_num_threads(1)
        runpy.run_module(module, run_name="__main__", alter_sys=True)
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        # An interpreter that has run collectives aborts at exit now and then.
        os._exit(code)


def main() -> None:
    """Answer requests until the input ends."""
    answers = os.fdopen(os.dup(1), "w", 1)
    print(json.dumps("ready"), file=answers)
    for line in sys.stdin:
        request = json.loads(line)
        if "poll" in request:
            number, status = os.waitpid(request["poll"], os.WNOHANG)
            print(json.dumps(os.waitstatus_to_exitcode(status) if number else None), file=answers)
            continue
        sys.stdout.flush()
        number = os.fork()
        if number == 0:
            become(request)
        print(json.dumps(number), file=answers)


if __name__ == "__main__":
    main()
