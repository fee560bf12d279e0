"""The one thread of all masks outlives what its jobs raise, and is there in forked processes."""

from __future__ import annotations

import os
import threading

from transformers_api.serving.constraints.mask_worker import MaskWorker


class Panic(BaseException):
    """What a panic of a Rust library is in Python."""


def works(worker: MaskWorker) -> bool:
    ran = threading.Event()
    worker.submit(ran.set)
    return ran.wait(30)


def fail() -> None:
    raise Panic


def test_a_job_that_panics_leaves_the_thread_to_the_next():
    worker = MaskWorker()
    assert works(worker)
    worker.submit(fail)
    assert works(worker)


def test_a_forked_process_makes_a_thread_of_its_own():
    worker = MaskWorker()
    assert works(worker)
    child = os.fork()
    if child == 0:
        os._exit(0 if works(worker) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert works(worker)
