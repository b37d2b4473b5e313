"""Every planted fault."""

from tests.laws.mutants_of_advice_and_bounds import ADVICE_AND_BOUNDS
from tests.laws.mutants_of_drafting import DRAFTING
from tests.laws.mutants_of_drawing import DRAWING
from tests.laws.mutants_of_text_and_cells import TEXT_AND_CELLS

MUTANTS = [*TEXT_AND_CELLS, *ADVICE_AND_BOUNDS, *DRAWING, *DRAFTING]
