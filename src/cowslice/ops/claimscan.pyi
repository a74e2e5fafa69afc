from _typeshed import ReadableBuffer

def claims(
    table: ReadableBuffer, wanted: ReadableBuffer, *, cluster_bits: int, extended: bool
) -> list[tuple[int, int]]: ...
