from typing import Final

FORMS: Final[tuple[str, ...]]
