"""The NBD protocol without sockets: bytes in, events out, and the other way round.

Both halves of fixed newstyle NBD with simple, structured and extended replies. It does not know that sockets, TLS
libraries or images exist: no I/O, no clock, no randomness.
"""
