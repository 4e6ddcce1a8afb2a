"""Signals that stop a run after the current step."""

from __future__ import annotations

import os
import signal

import pytest

from pretrain.train import signals
from pretrain.train.signals import STOP_SIGNALS, StopFlag


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_signal_sets_the_flag_and_its_handler_is_restored(number: signal.Signals) -> None:
    previous = signal.signal(number, signal.SIG_DFL)
    try:
        with StopFlag() as stop:
            assert not stop.is_set
            os.kill(os.getpid(), number)
            assert stop.is_set
        assert signal.getsignal(number) is signal.SIG_DFL
    finally:
        signal.signal(number, previous)


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGINT])
def test_ignored_signals_stay_ignored(number: signal.Signals) -> None:
    """As under nohup, or in the background of a shell."""
    previous = signal.signal(number, signal.SIG_IGN)
    try:
        with StopFlag() as stop:
            os.kill(os.getpid(), number)
            assert not stop.is_set
    finally:
        signal.signal(number, previous)


def test_a_later_second_signal_ends_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(signals.time, "monotonic", lambda: now)
    with StopFlag() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        now += 1.0
        os.kill(os.getpid(), signal.SIGTERM)  # forwarded by the launcher
        assert stop.is_set
        now += 5.0
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGUSR1)


def test_a_second_ctrl_c_ends_at_once() -> None:
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with StopFlag():
            os.kill(os.getpid(), signal.SIGINT)
            with pytest.raises(KeyboardInterrupt):
                os.kill(os.getpid(), signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, previous)
