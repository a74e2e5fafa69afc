from collections.abc import Callable

from cowslice.image.claims import Claims
from cowslice.image.dirtybits import Marks
from cowslice.image.supply import Supply
from cowslice.image.translation import Translation

class Placing(Translation):
    marks: Marks
    def supply_writes(self, claims: Claims, supply: Supply, provider: Callable[[int], object]) -> None: ...
