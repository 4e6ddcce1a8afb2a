"""Work in the background, and copies of a state that training does not change."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from concurrent.futures import Future, wait
from typing import Any

import torch
from torch import Tensor

from pretrain.checkpoint.format import tensor_name
from pretrain.parallel.state_fragments import Fragment


class Task:
    """Work in a thread that does not keep the process alive, or none."""

    def __init__(
        self, work: Callable[[], Any] | None = None, *, in_background: bool = False
    ) -> None:
        self.in_background = in_background
        self._future = Future[Any]()

        def run() -> None:
            try:
                self._future.set_result(work() if work else None)
            except BaseException as error:  # noqa: BLE001 - `result` raises it
                self._future.set_exception(error)

        if in_background:
            threading.Thread(target=run, name="checkpoint", daemon=True).start()
        else:
            run()

    def is_done(self) -> bool:
        """Whether the work has ended."""
        return self._future.done()

    def wait(self) -> None:
        """Wait until it has ended."""
        wait([self._future])

    def result(self) -> Any:
        """Its result; raises its exception. Waits until it has ended."""
        return self._future.result()


def copy_to_buffers(
    fragments: Iterable[Fragment], buffers: dict[str, Tensor] | None
) -> list[Fragment]:
    """Fragments with values on CPU that do not change any more, in `buffers`; unchanged if None."""
    if buffers is None:
        return list(fragments)
    copies = []
    on_gpu = False
    for fragment in fragments:
        values: dict[str, Tensor] = {}
        for kind, value in fragment.values.items():
            name = tensor_name(fragment.name, fragment.start, kind)
            if name not in buffers or buffers[name].shape != value.shape:
                buffers[name] = torch.empty(
                    value.shape, dtype=value.dtype, pin_memory=value.is_cuda
                )
            values[kind] = buffers[name].copy_(value, non_blocking=True)
            on_gpu = on_gpu or value.is_cuda
        copies.append(fragment._replace(values=values))
    if on_gpu:
        torch.cuda.synchronize()
    return copies
