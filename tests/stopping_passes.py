"""Passes that do not come back by themselves, or that interrupt."""

from __future__ import annotations

import itertools
import os
import queue
import signal
import threading
import time
from concurrent import futures

import torch

from kpt.specs import Variant
from slow_models import DirectScale, fast_forward


class Sleeps(DirectScale):
    def apply(self, model, variant):
        time.sleep(1000.0)


class WaitsInForward(DirectScale):
    """Right in the first two calls; the third waits for what never comes, and so does every later one."""

    def replacement(self):
        calls = itertools.count()

        def forward(self, x):
            if next(calls) >= 2:
                queue.Queue().get()
            return fast_forward(self, x)

        return forward


class UndoWaits(DirectScale):
    def apply(self, model, variant):
        super().apply(model, variant)
        return lambda: time.sleep(1000.0)


class WrongAndUndoWaits(UndoWaits):
    def replacement(self):
        return lambda self, x: fast_forward(self, x) * 1.01


class UndoTakesLong(DirectScale):
    """Its undo runs in Python code, so that it could be stopped anywhere."""

    ended: list[bool] = []

    def apply(self, model, variant):
        undo = super().apply(model, variant)

        def slowly():
            until = time.monotonic() + 0.5
            while time.monotonic() < until:
                time.sleep(0.001)
            undo()
            self.ended.append(True)

        return slowly


#: Ends the threads of the passes below.
ended = threading.Event()


class StartsAThread(DirectScale):
    """Wrong, and leaves a thread behind."""

    def replacement(self):
        return lambda self, x: fast_forward(self, x) * 1.01

    def apply(self, model, variant):
        undo = super().apply(model, variant)
        ended.clear()
        self.start()
        return undo

    def start(self):
        threading.Thread(target=ended.wait, name="left-behind", daemon=True).start()


class StartsAPool(StartsAThread):
    def start(self):
        pool = futures.ThreadPoolExecutor(1, thread_name_prefix="left-behind")
        pool.submit(ended.wait)


class EndsItsThread(StartsAThread):
    def apply(self, model, variant):
        undo = super().apply(model, variant)

        def end():
            undo()
            ended.set()

        return end


class SleepsInSteps(DirectScale):
    def apply(self, model, variant):
        while True:
            time.sleep(0.01)


class Loops(DirectScale):
    def replacement(self):
        def forward(self, x):
            while True:
                x = x + 0.0

        return forward


class SwallowsEverything(DirectScale):
    """Takes every exception for its own and tries again."""

    def replacement(self):
        def forward(self, x):
            while True:
                try:
                    while True:
                        x = x + 0.0
                except BaseException:
                    self.__dict__["caught"] = self.__dict__.get("caught", 0) + 1
                    if self.__dict__["caught"] >= 5:
                        raise

        return forward


class ProposesForEver(DirectScale):
    def propose(self, observation, hardware):
        while True:
            time.sleep(0.01)
            yield Variant(f"v{time.monotonic_ns()}", predicted_gain=0.5)


class InterruptsApply(DirectScale):
    def apply(self, model, variant):
        super().apply(model, variant)
        raise KeyboardInterrupt


class InterruptsForward(DirectScale):
    def replacement(self):
        def forward(self, x):
            self.weight.data.add_(1.0)
            torch.manual_seed(5)
            raise KeyboardInterrupt

        return forward


class InterruptsUndo(DirectScale):
    def replacement(self):
        return lambda self, x: fast_forward(self, x) * 1.01

    def apply(self, model, variant):
        super().apply(model, variant)

        def undo():
            raise KeyboardInterrupt

        return undo


class SignalsItself(DirectScale):
    """A real Ctrl-C in the middle of a trial, after it wrote where it must not."""

    def replacement(self):
        def forward(self, x):
            self.bias.data.add_(1.0)
            os.kill(os.getpid(), signal.SIGINT)
            while True:
                x = x + 0.0

        return forward
