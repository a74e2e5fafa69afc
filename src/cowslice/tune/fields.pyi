import numpy as np
from numpy.typing import NDArray

ABSENT: int

def split_lines(
    text: bytes, separator: str, most: int
) -> tuple[NDArray[np.uint32], NDArray[np.uint32], NDArray[np.uint8]]: ...
def numbers(
    text: bytes, starts: NDArray[np.uint32], lengths: NDArray[np.uint32], hexadecimals: bool = False
) -> tuple[NDArray[np.uint64], NDArray[np.bool_]]: ...
def seconds(
    text: bytes, starts: NDArray[np.uint32], lengths: NDArray[np.uint32]
) -> tuple[NDArray[np.int64], NDArray[np.bool_]]: ...
def words(
    text: bytes, starts: NDArray[np.uint32], lengths: NDArray[np.uint32], known: tuple[bytes, ...]
) -> NDArray[np.uint8]: ...
def cut(text: bytes, starts: NDArray[np.uint32], lengths: NDArray[np.uint32], mark: str) -> NDArray[np.uint32]: ...
def spellings(
    text: bytes, starts: NDArray[np.uint32], lengths: NDArray[np.uint32], chosen: NDArray[np.bool_]
) -> tuple[NDArray[np.int32], list[bytes]]: ...
