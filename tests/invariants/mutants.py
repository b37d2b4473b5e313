"""Every planted fault."""

from tests.invariants.mutants_of_advice_and_bounds import ADVICE_AND_BOUNDS
from tests.invariants.mutants_of_drafting import DRAFTING
from tests.invariants.mutants_of_drawing import DRAWING
from tests.invariants.mutants_of_groups import GROUPS
from tests.invariants.mutants_of_many import OF_MANY
from tests.invariants.mutants_of_scores import SCORES, SCORES_OF_MANY
from tests.invariants.mutants_of_text_and_slots import TEXT_AND_CELLS

MUTANTS = [*TEXT_AND_CELLS, *ADVICE_AND_BOUNDS, *DRAWING, *DRAFTING, *GROUPS, *OF_MANY, *SCORES, *SCORES_OF_MANY]
