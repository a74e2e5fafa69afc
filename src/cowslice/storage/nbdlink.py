"""One connection to an NBD server that many threads share: each asks, one thread of ours receives.

It does not know what is asked. What must hold: nobody but the receiving thread ends a request, so a buffer is never
touched after its request has ended; and once the connection is broken every request, old or new, fails with the reason.
"""

from __future__ import annotations

import copy
import errno
import os
import threading
import time
from collections.abc import Callable

from cowslice.errors import Closed, CowsliceError, InternalError, StorageError
from cowslice.nbd.client_side import ClientTransmission
from cowslice.nbd.events import Completed, Need
from cowslice.storage.nbdchannel import Channel

RECEIVED_AT_ONCE = 1 << 16

Ask = Callable[[ClientTransmission], int]


class Call:
    """A request under way."""

    __slots__ = ("answer", "asked", "done", "fault")

    def __init__(self) -> None:
        self.asked = time.monotonic()
        self.done = threading.Event()
        self.answer: Completed | None = None
        self.fault: CowsliceError | None = None


class NbdLink:
    """A session over a channel, which becomes ours. `timeout` is how many seconds the server may be silent when asked.

    Raises StorageError when the system has no more threads.
    """

    def __init__(self, channel: Channel, transmission: ClientTransmission, *, name: str, timeout: float) -> None:
        self.session = transmission.session
        self._name = name
        self._timeout = timeout
        self._channel = channel
        self._transmission = transmission
        self._state = threading.Lock()  # guards the transmission, the calls and the fault; never held while waiting
        self._sending = threading.Lock()  # guards the way out; taken before `_state`
        self._calls: dict[int, Call] = {}
        self._fault: CowsliceError | None = None
        self._heard = 0.0
        self._thread = threading.Thread(target=self._receive_all, name="cowslice-nbd-client", daemon=True)
        channel.begin_transmission(timeout)
        try:
            self._thread.start()
        except RuntimeError:
            raise self._failed("the system has no more threads", errno.EAGAIN) from None

    @property
    def in_flight(self) -> int:
        """Requests that are not answered."""
        return len(self._calls)

    @property
    def is_broken(self) -> bool:
        """Whether every further request fails."""
        return self._fault is not None

    def submit(self, ask: Ask) -> Call:
        """Send what `ask` requests of the transmission, then `finish` the call. Raises why the connection is broken."""
        call = Call()
        with self._state:
            if self._fault is not None:
                raise copy.copy(self._fault)
            self._calls[ask(self._transmission)] = call
        try:
            self._send_waiting()
        except BaseException:  # an interrupt: the buffer is the server's until the request has ended
            self.wait(call)
            raise
        return call

    def finish(self, call: Call) -> Completed:
        """Wait for the answer, which may be an error. Raises StorageError, RemoteProtocolError, CryptoError, Closed."""
        try:
            self.wait(call)
        except BaseException:  # here too
            self.wait(call)
            raise
        if call.answer is None:
            raise copy.copy(call.fault or self._failed("a request was lost", errno.EIO))
        return call.answer

    def wait(self, call: Call) -> None:
        """Return when the call has ended, somehow. A server that is silent for too long loses the connection."""
        while True:
            left = max(self._heard, call.asked) + self._timeout - time.monotonic()
            if left <= 0:
                self._abort(self._failed(f"the server did not answer for {self._timeout:g} seconds", errno.ETIMEDOUT))
                call.done.wait()
            if call.done.wait(left):
                return

    def close(self) -> None:
        """Say goodbye, fail what is under way, and end the thread. It may be called twice and by any thread."""
        with self._state:
            self._fault = self._fault or Closed(f"cannot use '{self._name}': it is closed")
            self._transmission.disconnect()
        if self._sending.acquire(blocking=False):
            try:
                with self._state:
                    parts = self._transmission.data_to_send()
                if parts:
                    self._channel.say_last(parts)
            finally:
                self._sending.release()
        self._channel.shut()
        self._thread.join()
        with self._sending:  # whoever was sending has failed by now
            self._channel.close()

    def _send_waiting(self) -> None:
        """Send what waits to be sent: who comes first sends for all."""
        with self._sending:
            with self._state:
                parts = self._transmission.data_to_send()
            try:
                self._channel.send(parts)
            except CowsliceError as fault:
                self._abort(fault)
            except OSError as error:
                self._abort(self._lost(error))
            except BaseException:  # an interrupt: nobody knows how much of a message was sent
                self._abort(self._failed("sending was interrupted", errno.EINTR))
                raise

    def _abort(self, fault: CowsliceError) -> None:
        """Break the connection; the receiving thread tells everybody."""
        with self._state:
            self._fault = self._fault or fault
        self._channel.shut()

    def _receive_all(self) -> None:
        try:
            while self._receive():
                pass
            fault: CowsliceError = self._failed("the server closed the connection", errno.ECONNRESET)
        except CowsliceError as error:
            fault = error
        except OSError as error:
            fault = self._lost(error)
        except BaseException as error:
            fault = InternalError(f"the connection to '{self._name}' ended: {error!r}")
        self._channel.shut()
        with self._state:
            fault = self._fault = self._fault or fault
            calls, self._calls = self._calls, {}
        for call in calls.values():
            call.fault = fault
            call.done.set()

    def _receive(self) -> bool:
        """Take in what has come, and end the requests that it completes. False at the end."""
        target = self._transmission.payload_target()  # set and taken away by this thread alone
        if target is not None:
            count = self._channel.recv_into(target)
            with self._state:
                self._transmission.payload_received(count)
        else:
            received = self._channel.recv(RECEIVED_AT_ONCE)
            count = len(received)
            with self._state:
                self._transmission.receive(received)
        self._heard = time.monotonic()
        return bool(count) and self._end_completed()

    def _end_completed(self) -> bool:
        while True:
            with self._state:
                try:
                    event = self._transmission.next_event()
                except CowsliceError as fault:  # known before anybody else may ask
                    self._fault = self._fault or fault
                    raise
                if isinstance(event, Need):
                    return True
                call = self._calls.pop(event.cookie)
            call.answer = event
            call.done.set()

    def _lost(self, error: OSError) -> StorageError:
        if isinstance(error, TimeoutError) and not error.errno:
            return self._failed(f"the server took nothing for {self._timeout:g} seconds", errno.ETIMEDOUT)
        return self._failed(os.strerror(error.errno) if error.errno else str(error), error.errno or errno.EIO)

    def _failed(self, reason: str, code: int) -> StorageError:
        return StorageError(f"the connection to '{self._name}' is lost: {reason}", errno=code, filename=self._name)
