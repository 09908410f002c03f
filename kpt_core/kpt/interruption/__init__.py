"""How running work is stopped when its deadline passes.

A trial is Python code that calls native code and starts compilers. Four things stop it:

* an exception raised asynchronously in its thread, delivered between two bytecodes;
* a signal, where the thread is the main one: it ends a wait in the operating system (a sleep, a lock, a pipe,
  a child process), during which there are no bytecodes;
* the end of its compilers: their processes are killed, so that whoever waits for them fails;
* repetition of all of it until the block is left, because foreign code may swallow the exception.

What can't be interrupted is a single native call (one matrix product, one weight packing, loading a
shared library), and a wait in another thread than the main one: the exception arrives when it returns. The
import of a module is not interrupted either, for ten seconds: what is imported half is left registered
elsewhere, and the library can't be imported again in this process.
"""

from __future__ import annotations

from kpt.interruption.compilers import descendants, stop_workers
from kpt.interruption.deadlines import DeadlinePassed, contained, deadline

__all__ = ["DeadlinePassed", "contained", "deadline", "descendants", "stop_workers"]
