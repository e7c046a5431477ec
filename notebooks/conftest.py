"""For `pytest --nbval`: a kernel that dies fails its cell within seconds. nbval itself waits until the cell's timeout."""

import time
from queue import Empty

from nbval.kernel import RunningKernel

SECONDS = 5  # between two looks at the kernel
wait_for_reply = RunningKernel.await_reply


def await_reply(kernel, msg_id, timeout=float("inf")):
    """nbval's own waiting in short turns. `Empty` after `timeout` seconds, `RuntimeError` when there is no kernel left."""
    end = time.monotonic() + timeout
    while True:
        try:
            return wait_for_reply(kernel, msg_id, timeout=min(SECONDS, max(0, end - time.monotonic())))
        except Empty:
            if not kernel.is_alive():
                raise RuntimeError("the kernel died in this cell: it was killed, or ran out of memory") from None
            if time.monotonic() >= end:
                raise


RunningKernel.await_reply = await_reply
