from contextlib import AbstractContextManager

class Claims:
    def on(self, first: int, end: int) -> AbstractContextManager[None]: ...
