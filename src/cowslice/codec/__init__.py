"""What stands between stored bytes and guest bytes: compression, ciphers, keys.

It does not know where the bytes come from: no I/O, no clock. Randomness only enters as an argument.
"""
